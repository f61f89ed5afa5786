"""Seconds a round of a deployed study: `wardround server run` over TLS and SQLite on this machine.

    python -m tests.benchmarks.deployed_round [--client test|real] [--sites 3] [--parameters 50000] [--rounds 30]

With `--client test` sites answer at once with a made-up update, so that a round's seconds are what the server and its
port add to training. With `--client real` they are real clients (tests/benchmarks/timed_client.py) on a tiny synthetic
cohort, with their ledgers; the table says what deployment adds to training. The last site is started when the others
wait for it, so that its start is alone on the machine. Every site is a process of its own. Printed, too: processor
seconds a round, the server's memory after a third of the rounds and at the end, and the size of its database.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from common.keys import generate, load_private, private_to_pem, write_private
from common.models.network import build_network
from common.records import Reply, Request, Status
from common.study import Study, load_study
from common.terms import parse
from common.training import state_of
from server.folder import ServerFolder
from server.progress import read, read_now
from simulations.cohort import PRESETS, write_cohort
from tests.benchmarks.machine import processor
from tests.server.hospitals import Hospital, wait_until
from tests.server.processes import ROOT, Server, make_folder

PATIENCE = 600.0


def study_of(sites: int, parameters: int, rounds: int) -> Study:
    """The demo study with so many sites and rounds, and a GRU of about so many parameters."""
    demo = load_study(ROOT / "configs/demo.yaml")
    plain = demo.model_dump(mode="json", exclude_none=True)
    names = [f"site{number}" for number in range(sites)]

    def of(hidden: int) -> Study:
        changes: dict[str, Any] = {
            "model": {**plain["model"], "hidden": hidden},
            "training": {**plain["training"], "rounds": rounds},
            "sites": {name: {"declared_patients": 80} for name in names},
            "quorum": sites,
        }
        return parse(plain | changes, Study, "benchmark")

    def size(hidden: int) -> int:
        return sum(array.size for array in state_of(build_network(of(hidden))).values())

    hidden = min(range(8, 2000, 8), key=lambda h: abs(3 * h * (h + plain["model"]["embedding"] + 20) - parameters))
    print(f"{size(hidden):,} parameters (GRU of {hidden})")
    return of(hidden)


def answer(request: Request) -> Reply:
    """A small update that no other site makes."""
    random = np.random.default_rng()
    update = {n: random.normal(0, 1e-4, w.shape).astype(np.float32) for n, w in request.weights.items()}
    return Reply(request.header, Status.OK, update)


def take_part(address: str, key: Path, authority: Path) -> None:
    """A test site, until its process is ended."""
    with Hospital(address, load_private(key), answer, authority) as hospital:
        hospital._thread.join()


def made_up_client(folder: ServerFolder, site: str, work: Path) -> list[str]:
    """The command of a test site; admits its key."""
    key = generate()
    write_private(work / f"{site}.key", private_to_pem(key))
    folder.admit(site, key.public_key())
    address = f"localhost:{folder.terms.port}"
    return [sys.executable, "-m", __spec__.name, "--site", address, str(work / f"{site}.key"), str(folder.authority)]


def real_client(folder: ServerFolder, site: str, work: Path) -> list[str]:
    """The command of a real site; makes its records and key, admits it. The server must be up to enrol."""
    records = work / "cohort" / "north"
    if not records.exists():
        write_cohort(PRESETS["medium"], 3, work / "cohort", scale=0.02)
    (work / site).mkdir()
    terms = {
        "version": 1,
        "site": site,
        "study": str(folder.path / "study.yaml"),
        "records": str(records),
        "policy": {"max_epsilon": 3.0, "delta": 1e-5},
        "server": {"address": f"localhost:{folder.terms.port}", "ca": str(folder.authority)},
        "state": str(work / site / "state"),
    }
    file = work / site / "site.yaml"
    file.write_text(yaml.safe_dump(terms))
    client = [sys.executable, "-m", "wardround", "client"]
    subprocess.run([*client, "keygen", str(file)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    key = load_private(work / site / "state" / "key").public_key()
    folder.admit(site, key)
    wait_until(lambda: _enrolled([*client, "enrol", str(file), "--yes"]))
    return [sys.executable, "-m", "tests.benchmarks.timed_client", str(file), str(work / f"{site}.times")]


def _enrolled(command: list[str]) -> bool:
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0


def start(command: list[str], said: Path) -> subprocess.Popen[bytes]:
    """A site's process; what it says on standard error goes to `said`."""
    with said.open("ab") as file:
        return subprocess.Popen(command, cwd=ROOT, stderr=file)


def processor_seconds(process: int) -> float:
    """User and system seconds of a process so far (Linux)."""
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(process: int) -> float:
    """Resident MB of a process (Linux)."""
    line = next(row for row in Path(f"/proc/{process}/status").read_text().splitlines() if row.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def measure(client: str, sites: int, parameters: int, rounds: int) -> None:
    """Run one study and print what it took."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        study = study_of(sites, parameters, rounds)
        folder = make_folder(work / "study", study, {})
        server = Server(folder)
        hospitals: list[subprocess.Popen[bytes]] = []
        said = work / "hospitals.txt"
        try:
            server.up()
            commands = [
                (made_up_client if client == "test" else real_client)(folder, site, work) for site in study.sites
            ]
            hospitals += [start(command, said) for command in commands[:-1]]
            wait_until(lambda: connected(folder) >= sites - 1, PATIENCE)
            waiting = [(resident(one.pid), resident(child_of(one.pid))) for one in hospitals if client == "real"]
            started = time.monotonic()
            hospitals.append(start(commands[-1], said))

            def done() -> int:
                assert server.process.poll() in (None, 0), server.output.read_text()
                return len(read(folder.metrics))

            wait_until(lambda: done() >= max(1, rounds // 3), PATIENCE)
            early, began, first = resident(server.process.pid), processor_seconds(server.process.pid), done()
            wait_until(lambda: done() >= rounds - 1, PATIENCE)
            late, used, last = resident(server.process.pid), processor_seconds(server.process.pid), done()
            wait_until(lambda: server.process.poll() is not None, PATIENCE)
            seconds = [line["seconds"] for line in read(folder.metrics)][1:]
            database = (folder.state / "superlink.db").stat().st_size
            print(
                f"{client} client, {sites} sites, {rounds} rounds: mean {statistics.mean(seconds):.2f} s, "
                f"median {statistics.median(seconds):.2f}, largest {max(seconds):.2f}; server "
                f"{(used - began) / max(last - first, 1):.2f} processor s a round, {early:.0f} MB then {late:.0f} MB, "
                f"database {database / 1e6:.1f} MB; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
            )
            if client == "real":
                print(table(folder, [trained(work / f"{site}.times") for site in study.sites], started, waiting))
        except BaseException:
            print(said.read_text() if said.exists() else "")
            raise
        finally:
            for process in (server.process, *hospitals):
                process.kill()
                process.wait()


def connected(folder: ServerFolder) -> int:
    """How many sites the server says are connected."""
    now = read_now(folder.state / "now.json") or {}
    return sum(site["online"] for site in now.get("sites", {}).values())


def child_of(process: int) -> int:
    """The largest child of a process: the one that trains (Linux)."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return max(map(int, children), key=resident)


def trained(times: Path) -> list[tuple[float, float]]:
    """When a site's trainings began and ended, in monotonic seconds."""
    pairs = [line.split() for line in times.read_text().splitlines()]
    return [(float(began), float(ended)) for began, ended in pairs]


def table(
    folder: ServerFolder,
    trained: list[list[tuple[float, float]]],
    started: float,
    waiting: list[tuple[float, float]],
) -> str:
    """What deployment costs, beside its goals.

    Args:
        folder: of the finished study.
        trained: for each site, when each round's training began and ended.
        started: when the last site's client was started, in monotonic seconds.
        waiting: (connection, training process) of each site that waited for the others: resident MB.
    """
    stamps = [line["time"] for line in read(folder.metrics)]
    rounds = [after - before for before, after in itertools.pairwise(stamps)]
    longest = [max(ended - began for began, ended in sites) for sites in zip(*trained, strict=True)][1:]
    added = [whole - training for whole, training in zip(rounds, longest, strict=True)]
    rows = (
        ("a round, from one checkpoint to the next", "", f"{statistics.median(rounds):.2f} s"),
        ("of it the longest training of a site", "", f"{statistics.median(longest):.2f} s"),
        ("**added by deployment**, median", "0.6 s", f"{statistics.median(added):.2f} s"),
        ("added, 9 of 10 rounds at most", "1.0 s", f"{statistics.quantiles(added, n=10)[-1]:.2f} s"),
        ("start of a client to its first training", "12 s", f"{trained[-1][0][0] - started:.1f} s"),
        ("memory of the waiting client: connection", "120 MB", f"{max(one for one, _ in waiting):.0f} MB"),
        ("memory of the waiting client: records and torch", "", f"{max(one for _, one in waiting):.0f} MB"),
    )
    load = " ".join(f"{one:.1f}" for one in os.getloadavg())
    lines = [
        f"{datetime.now(UTC):%Y-%m-%d}, {processor()}, {os.cpu_count()} cores, load {load}:",
        "",
        f"| {len(trained)} sites, TLS, SQLite, synced ledgers | at most | measured |",
        "|---|---:|---:|",
        *(f"| {what} | {goal} | {found} |" for what, goal, found in rows),
    ]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--client", choices=("test", "real"), default="test")
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--parameters", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--site", nargs=3, metavar=("ADDRESS", "KEY", "CA"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.site:
        take_part(arguments.site[0], Path(arguments.site[1]), Path(arguments.site[2]))
    else:
        measure(arguments.client, arguments.sites, arguments.parameters, arguments.rounds)


if __name__ == "__main__":
    main()
