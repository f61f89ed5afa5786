"""Many hospitals against one server on one machine: seconds a round, and the memory of everybody.

    python -m tests.benchmarks.load [--sites 50] [--full 3] [--rounds 50] [--parameters 2000]
    python -m tests.benchmarks.load --sites 3 --full 0 --rounds 300 --parameters 50000
    python -m tests.benchmarks.load --sites 5 --full 1 --rounds 10 --parameters 5000000

The server is the command line's, over TLS on SQLite. `--full` of the sites are the command line's clients, two
processes each; the others are the same `client.service`, connection, key, durable ledger and private training, but in
threads of this process, which trains one of them at a time: 50 full clients hold more than 12 GB that they do not
share. The quorum is all sites, so a round that counts has an update of each. Linux only: it reads /proc.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from flwr.app import Message

from client.fleet import Fleet
from client.hospital import Hospital
from client.ledger_file import SqliteLedger
from client.network import trusted
from client.service import Service
from client.site import Site
from client.site_file import load_site_file
from client.state import KEY, LEDGER, StateFolder
from client.trainer import Ready
from common.batching import Dataset
from common.keys import generate, private_to_pem, write_private
from common.study import Study
from server.folder import ServerFolder
from server.progress import read
from simulations.cohort import PRESETS, write_cohort
from simulations.hospitals import Hospitals
from tests.benchmarks.deployed_round import child_of, connected, real_client, resident, start, study_of
from tests.benchmarks.machine import conditions
from tests.server.hospitals import wait_until
from tests.server.processes import Server, make_folder

PATIENCE = 7200.0
WARM = 0.3  # of the rounds are left out when memory's growth is fitted


class InThisProcess:
    """What `client.trainer.Trainer` is to the service, without a process of its own.

    Args:
        hospital: opened.
        turn: held while it trains.
    """

    def __init__(self, hospital: Hospital, turn: threading.Lock) -> None:
        self._hospital, self._turn = hospital, turn

    def start(self) -> Ready:
        """It is open."""
        return self._hospital.ready

    def answer(self, message: Message, node: int) -> Message:
        """The reply."""
        with self._turn:
            return self._hospital.answer(message, node)


def service_of(folder: ServerFolder, study: Study, site: str, work: Path, data: Dataset, turn: threading.Lock) -> Any:
    """A site's service, its key admitted, its ledger on disk; `run` it in a thread."""
    place = work / site
    place.mkdir()
    terms = {
        "version": 1,
        "site": site,
        "study": str(folder.path / "study.yaml"),
        "records": str(work),
        "policy": {"max_epsilon": 3.0, "delta": 1e-5},
        "server": {"address": f"localhost:{folder.terms.port}", "ca": str(folder.authority)},
        "state": str(place / "state"),
    }
    (place / "site.yaml").write_text(yaml.safe_dump(terms))
    opened = load_site_file(place / "site.yaml")
    state, key = StateFolder(Path(opened.state), create=True), generate()
    write_private(state / KEY, private_to_pem(key))
    folder.admit(site, key.public_key())
    _, trust = trusted(opened.server)
    with SqliteLedger(state / LEDGER, 3.0, 1e-5) as ledger:
        pass
    hospital = Hospital(Site(site, study, data, ledger, policy=opened.policy))
    enrolment: Any = _Agreed(study.digest())
    trainer: Any = InThisProcess(hospital, turn)
    return Service(opened, state, enrolment, trainer, lambda: Fleet(opened.server, key, trust=trust))


@dataclass(frozen=True)
class _Agreed:
    """What the service reads of an `Enrolment`."""

    study: str


@dataclass
class Memory:
    """The server's resident MB after each round."""

    rounds: list[int] = field(default_factory=list)
    resident: list[float] = field(default_factory=list)

    def note(self, number: int, mb: float) -> None:
        """One more round."""
        if not self.rounds or number > self.rounds[-1]:
            self.rounds.append(number)
            self.resident.append(mb)

    @property
    def growth(self) -> float:
        """MB a round after warm-up: the slope of a line through the rounds."""
        first = int(WARM * len(self.rounds))
        if len(self.rounds) - first < 2:
            return float("nan")
        return float(np.polyfit(self.rounds[first:], self.resident[first:], 1)[0])

    def __str__(self) -> str:
        middle = self.resident[len(self.resident) // 3]
        return (
            f"server {self.resident[0]:.0f} MB after the first round, {middle:.0f} after a third, "
            f"{self.resident[-1]:.0f} at the end: {self.growth:+.3f} MB a round after warm-up"
        )


def proportional(process: int) -> float:
    """MB of a process with each shared page divided among those who share it (Linux)."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def client_memory(clients: list[subprocess.Popen[bytes]]) -> str:
    """What a full client takes."""
    if not clients:
        return "no full client"
    pairs = [(one.pid, child_of(one.pid)) for one in clients]
    both = [proportional(parent) + proportional(child) for parent, child in pairs]
    parents, children = [[resident(pid) for pid in column] for column in zip(*pairs, strict=True)]
    return (
        f"a full client: {max(parents):.0f} + {max(children):.0f} MB resident (connection + training), "
        f"{max(both):.0f} MB when what {len(both)} share is divided among them"
    )


def measure(sites: int, full: int, rounds: int, parameters: int) -> None:
    """One study, and what it took."""
    torch.set_num_threads(1)
    study, memory, turn = study_of(sites, parameters, rounds), Memory(), threading.Lock()
    names = list(study.sites)
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        folder = make_folder(work / "study", study, {}, deadline_seconds=PATIENCE)
        write_cohort(PRESETS["medium"], 3, work / "cohort", scale=0.02)
        data = Hospitals(study, {names[0]: work / "cohort" / "north"}, 0).dataset(names[0], study.simulation.train)
        server, clients = Server(folder), list[subprocess.Popen[bytes]]()
        try:
            server.up()
            began = time.monotonic()
            clients += [start(real_client(folder, site, work), work / "said.txt") for site in names[:full]]
            wait_until(lambda: connected(folder) >= full, PATIENCE)
            alone = client_memory(clients)
            services = [service_of(folder, study, site, work, data, turn) for site in names[full:]]
            for service in services:
                in_a_thread(service.run)
            print(f"{sites} sites, {full} of them full; {alone}", flush=True)

            def done(least: int) -> bool:
                assert server.process.poll() in (None, 0), server.output.read_text()
                counted = [line["round"] for line in read(folder.metrics) if line["counted"]]
                if counted and server.process.poll() is None:
                    memory.note(counted[-1], resident(server.process.pid))
                return len(counted) >= least

            wait_until(lambda: done(1), PATIENCE)
            first = time.monotonic() - began
            wait_until(lambda: done(rounds), PATIENCE)
            lines = [line for line in read(folder.metrics) if line["counted"]]
            assert all(len(line["sites"]) == sites for line in lines)
            wait_until(lambda: server.process.poll() == 0, PATIENCE)
            seconds = [line["seconds"] for line in lines][1:]
            print(
                f"{conditions()}: {rounds} rounds, each with {sites} updates; first round {first:.0f} s after the "
                f"start of the first client; then mean {statistics.mean(seconds):.2f} s, median "
                f"{statistics.median(seconds):.2f}, largest {max(seconds):.2f}; {memory}; load {os.getloadavg()[0]:.1f}"
            )
            check(names[full:], work, rounds, study)
        except BaseException:
            print(server.output.read_text()[-2000:])
            raise
        finally:
            for process in (server.process, *clients):
                process.kill()
                process.wait()


def check(names: list[str], work: Path, rounds: int, study: Study) -> None:
    """Every ledger of this process has each round once, and no spare step was used."""
    for site in names:
        with SqliteLedger(work / site / "state" / LEDGER, 3.0, 1e-5, create=False) as ledger:
            account = ledger.accounts.studies[study.digest()]
            assert sorted(account.released) == list(range(1, rounds + 1))
            assert account.steps_taken == rounds


def in_a_thread(work: Callable[[], None]) -> None:
    """For as long as this process lives."""
    threading.Thread(target=work, daemon=True).start()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=50)
    parser.add_argument("--full", type=int, default=3, help="how many are the command line's clients")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--parameters", type=int, default=2000)
    arguments = parser.parse_args()
    measure(arguments.sites, arguments.full, arguments.rounds, arguments.parameters)


if __name__ == "__main__":
    main()
