"""A deployed study whose processes are killed: somebody starts them again, and at the end looks through the books.

Two hospitals, quorum two, the command line's own processes over TLS. The clients' randomness is the simulation's
without noise, which follows from (site, round, attempt): so from the ledgers alone, which say the attempt that each
round's update came from, the study can be computed once more, and every weight must be the server's.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from client.accounts import Account
from client.entries import Released
from client.entry_file import read_entries
from client.ledger_file import read_accounts
from client.state import LEDGER
from common.models.network import build_network
from common.study import Study, load_study
from common.training import state_of
from common.weights import Weights, digest_of, from_bytes
from server.rounds import RoundRecord, run
from server.strategy import FederatedAveraging
from simulations.hospitals import Hospitals
from simulations.local_grid import LocalGrid
from simulations.seeded import Silent
from tests.e2e.deployment import ROOT, Deployment, Hospital, Running, Server, deployed, enrol, wait_until, write_study

DECLARED = {"north": 80, "east": 50}
SEED = 4
SILENT = ROOT / "tests" / "e2e" / "silent_client.py"
KILL = ROOT / "tests" / "e2e" / "faults" / "kill"


@dataclass
class Stage:
    """A study and its processes, by name: server, north, east."""

    deployment: Deployment
    server: Server
    hospitals: dict[str, Hospital]
    records: Mapping[str, Path]
    faults: Path
    running: dict[str, Running] = field(default_factory=dict)

    def start(self, name: str) -> None:
        """A new process; a server goes on from its checkpoint."""
        if name == "server":
            self.running[name] = self.server.run("--resume")
            (self.faults / "server.pid").write_text(str(self.running[name].process.pid))
        else:
            self.running[name] = self.hospitals[name].run(str(SEED), how=(SILENT,))

    def start_what_was_killed(self) -> list[str]:
        """Start again whatever signal 9 has ended; their names."""
        dead = [name for name, one in self.running.items() if one.process.poll() == -signal.SIGKILL]
        for name in dead:
            self.start(name)
        return dead

    def arm(self, process: str, moment: str, *victims: str) -> None:
        """Have `process` kill `victims` when it next comes to `moment`: see kill/sitecustomize.py."""
        fresh = self.faults / "new"
        fresh.write_text(",".join(victims))
        fresh.rename(self.faults / "armed" / f"{process}-run@{moment}")

    def fired(self, process: str, moment: str) -> Path:
        """The file that is there once it has happened; take it away before the moment is armed again."""
        return self.faults / "fired" / f"{process}-run@{moment}"

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """The counted rounds' lines so far."""
        path = self.server.path / "state" / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        whole = [json.loads(line) for line in lines if line.endswith("}")]
        return [line for line in whole if line["counted"]]

    @property
    def finished(self) -> bool:
        """The server has ended by itself, with the final weights."""
        return self.running["server"].process.poll() == 0

    def end(self) -> None:
        """Ask the clients to end; the server has."""
        self.running["server"].finish()
        for site in self.hospitals:
            assert self.running[site].end() == 0

    def account(self, site: str) -> Account:
        """What the site's ledger says of the study."""
        accounts, _ = read_accounts(self.hospitals[site].state / LEDGER)
        return accounts.studies[self.study.digest()]

    @property
    def study(self) -> Study:
        """As the server has it."""
        return load_study(self.server.study)

    def check_books(self) -> dict[str, int]:
        """What must hold at the end of a completed study. Raises AssertionError.

        Returns:
            Spare steps used, by site.
        """
        study, used, attempts = self.study, {}, {}
        rounds = list(range(1, study.training.rounds + 1))
        assert sorted({line["round"] for line in self.rounds}) == rounds
        for site, hospital in self.hospitals.items():
            account = self.account(site)
            released = [e for e in read_entries(hospital.state / LEDGER).entries if isinstance(e, Released)]
            assert [entry.round_number for entry in released] == rounds  # each once, and none is missing
            attempts[site] = {entry.round_number: entry.number for entry in released}
            assert account.attempts == attempts[site]  # a stored round was never marked again
            assert account.steps_taken == sum(account.attempts.values())
            used[site] = account.steps_taken - len(rounds)
            assert account.spares_left == study.privacy.spare_rounds - used[site]
        final, asked = replayed(study, self.records, attempts)
        for site in self.hospitals:
            assert {r: release.weights_digest for r, release in self.account(site).released.items()} == asked
        assert digest_of(from_bytes(self.server.weights.read_bytes())) == digest_of(final)
        return used


def replayed(
    study: Study, records: Mapping[str, Path], attempts: Mapping[str, Mapping[int, int]]
) -> tuple[Weights, dict[int, str]]:
    """The study in this process, each round's update from the attempt that was released.

    Returns:
        The final weights, and for each round the digest of the weights that were sent.
    """

    def source(seed: int, site: str, round_number: int, _attempt: int) -> Silent:
        return Silent(seed, site, round_number, attempts[site][round_number])

    hospitals = Hospitals(study, dict(records), SEED, source)  # type: ignore[arg-type]  # called like the class
    start = state_of(build_network(study))
    asked = {1: digest_of(start)}

    def note(record: RoundRecord) -> None:
        if record.round_number < study.training.rounds:
            asked[record.round_number + 1] = digest_of(record.weights)

    with LocalGrid(hospitals.open, study.sites) as grid:
        strategy = FederatedAveraging(study, start, lambda: grid.roster)
        return run(grid, strategy, rounds=study.training.rounds, on_round=note), asked


@contextmanager
def staged(root: Path, records: Mapping[str, Path], rounds: int, spares: int) -> Iterator[Stage]:
    """Everybody has enrolled; the server runs, the clients do not yet."""
    faults = root.parent / f"{root.name}-faults"
    for name in ("armed", "fired"):
        (faults / name).mkdir(parents=True)
    study = write_study(
        root.parent / f"{root.name}-terms" / "study.yaml",
        DECLARED,
        quorum=2,
        model={"hidden": 8, "embedding": 4},
        training={"rounds": rounds},
        privacy={"spare_rounds": spares},
    )
    with deployed(root, watch=KILL, environment={"FAULTS": str(faults)}) as deployment:
        server = Server(deployment, study)
        hospitals = {site: Hospital(deployment, site, records[site], server) for site in DECLARED}
        stage = Stage(deployment, server, hospitals, {site: records[site] for site in DECLARED}, faults)
        stage.start("server")
        for hospital in hospitals.values():
            hospital.keygen()
            server.admit(hospital)
        enrol(hospitals.values())
        yield stage


def next_round(stage: Stage, since: float, seconds: float = 600.0) -> float:
    """Wait until a round is done that ended after `since`; how long after, in seconds."""
    found: list[float] = []

    def done() -> bool:
        stage.start_what_was_killed()
        found[:] = [line["time"] - since for line in stage.rounds if line["time"] > since]
        return bool(found)

    wait_until(done, "the next round", seconds)
    return found[0]
