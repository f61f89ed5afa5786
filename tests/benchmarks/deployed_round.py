"""Seconds a round of a deployed study: `wardround server run` over TLS and SQLite on this machine.

    python -m tests.benchmarks.deployed_round [--client test|real] [--sites 3] [--parameters 50000] [--rounds 30]

With `--client test` sites answer at once with a made-up update, so that a round's seconds are what the deployment
adds to training. With `--client real` they are `wardround client run` on a tiny synthetic cohort, training included.
Every site is a process of its own. Printed: seconds a round (the first left out), processor seconds a round, the
server's memory after a third of the rounds and at the end, and the size of its database.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
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
from server.progress import read
from simulations.cohort import PRESETS, write_cohort
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
    return [*client, "run", str(file)]


def _enrolled(command: list[str]) -> bool:
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0


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
        try:
            server.up()
            for site in study.sites:
                command = (made_up_client if client == "test" else real_client)(folder, site, work)
                hospitals.append(subprocess.Popen(command, cwd=ROOT))

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
        finally:
            for process in (server.process, *hospitals):
                process.kill()
                process.wait()


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
