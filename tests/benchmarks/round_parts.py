"""Where a deployed round goes: seconds of each part, in every process, measured from inside it.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.round_parts [--sites 3] [--parameters 50000] [--rounds 30]

Real server, real clients, as in tests/benchmarks/deployed_round.py, but each started by this file, which first puts a
watch around the functions named in `SERVER`, `CLIENT` and `TRAINING`. Printed are medians over rounds, of hospitals
the slowest: wall seconds, which a busy machine stretches, and the processor seconds of the thread, which it does not.
Parts of different processes overlap, and parts of a process may contain one another: they need not add up.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from common.privacy.randomness import Randomness

# (module, name in it) -> what it is called in the table
SERVER = {
    ("server.strategy", "FederatedAveraging.configure_train"): "makes the requests",
    ("server.superlink", "SuperLink.push"): "hands them to Flower's state",
    ("server.superlink", "SuperLink.replies"): "looks for replies and puts them together",
    ("server.strategy", "FederatedAveraging.aggregate_train"): "checks the replies, averages, steps",
    ("server.progress", "append"): "metrics.jsonl, synced",
    ("server.coordinator", "save"): "checkpoint, synced",
    ("server.superlink", "SuperLink.clear"): "clears the round away",
}
CLIENT = {
    ("client.fleet", "Fleet._content"): "fetches the weights",
    ("client.trainer", "Trainer.answer"): "waits for its training process",
    ("client.fleet", "Fleet.push"): "sends the update",
}
TRAINING = {
    ("client.hospital", "Hospital.answer"): "answers, all of it",
    ("client.entry_file", "EntryFile.__init__"): "opens the ledger and checks every entry",
    ("client.entry_file", "EntryFile.append"): "ledger entries, synced",
    ("client.site", "train_round"): "trains",
}
WHO = {**dict.fromkeys(SERVER.values(), "server"), **dict.fromkeys(CLIENT.values(), "client, connection")}


def watch(parts: dict[tuple[str, str], str], file: Path) -> None:
    """Put a watch around each part; `file` gets a line `label, began, ended, processor seconds` for each call."""
    for (module, name), label in parts.items():
        owner: Any = importlib.import_module(module)
        *outer, last = name.split(".")
        for one in outer:
            owner = getattr(owner, one)
        setattr(owner, last, _watched(getattr(owner, last), label, file))


def _watched(function: Callable[..., Any], label: str, file: Path) -> Callable[..., Any]:
    @wraps(function)
    def timed(*arguments: Any, **named: Any) -> Any:
        began, used = time.monotonic(), time.thread_time()
        try:
            return function(*arguments, **named)
        finally:
            spent, ended = time.thread_time() - used, time.monotonic()
            with file.open("a") as out:
                out.write(f"{label}\t{began}\t{ended}\t{spent}\n")

    return timed


@dataclass(frozen=True)
class Watching:
    """(round, attempt) -> real randomness; the first call, in the training process, puts the watches there."""

    file: Path

    def __call__(self, round_number: int, attempt: int) -> Randomness:
        from common.privacy.randomness import Randomness

        if not hasattr(sys, "_wardround_watched"):
            sys._wardround_watched = True  # type: ignore[attr-defined]  # once a process, whatever imports this file
            watch(TRAINING, self.file)
        return Randomness()


def serve(study: str, file: Path) -> None:
    """`wardround server run`, watched."""
    from server.commands import app

    watch(SERVER, file)
    app(["run", study])


def take_part(site: Path, file: Path) -> None:
    """`wardround client run`, watched."""
    from client.commands.opening import opened

    opened(site)
    from client.service import serve as take_part_in

    watch(CLIENT, file)
    take_part_in(site, randomness=Watching(file))


def table(files: list[Path], stamps: list[float]) -> str:
    """Medians over rounds, of hospitals the slowest. `stamps`: when each checkpoint was written, monotonic."""
    rounds = list(itertools.pairwise(stamps))[1:]  # the first ones hold imports and watches
    wall: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(rounds))
    processor: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(rounds))
    for file in files:
        mine: dict[str, list[list[float]]] = defaultdict(lambda: [[0.0, 0.0] for _ in rounds])
        for line in file.read_text().splitlines():
            label, *numbers = line.split("\t")
            began, ended, used = map(float, numbers)
            for index, (start, end) in enumerate(rounds):
                if start < ended <= end:
                    mine[label][index][0] += ended - began
                    mine[label][index][1] += used
        for label, spans in mine.items():
            for index, (seconds, used) in enumerate(spans):
                wall[label][index] = max(wall[label][index], seconds)
                processor[label][index] = max(processor[label][index], used)
    whole = statistics.median(end - start for start, end in rounds)
    rows = [f"| a round, checkpoint to checkpoint | | {1000 * whole:.0f} | |"]
    for label in (*SERVER.values(), *CLIENT.values(), *TRAINING.values()):
        who = WHO.get(label, "client, training")
        seconds, used = statistics.median(wall[label]), statistics.median(processor[label])
        rows.append(f"| {label} | {who} | {1000 * seconds:.0f} | {1000 * used:.0f} |")
    return "\n".join(("| part | process | ms | processor ms |", "|---|---|---:|---:|", *rows))


def measure(sites: int, parameters: int, rounds: int) -> None:
    """Run one study and print where its rounds went."""
    from tests.benchmarks.deployed_round import PATIENCE, connected, real_client, study_of
    from tests.benchmarks.machine import conditions
    from tests.server.hospitals import wait_until
    from tests.server.processes import ROOT, Server, make_folder

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        study = study_of(sites, parameters, rounds)
        folder = make_folder(work / "study", study, {})
        me = [sys.executable, "-m", __spec__.name]

        class Watched(Server):
            """The server, started by this file."""

            def __post_init__(self) -> None:
                self.output = work / "server.txt"
                command = [*me, "--serve", str(folder.path / "study.yaml"), str(work / "server.spans")]
                with self.output.open("ab") as output:
                    self.process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)

        server = Watched(folder)
        processes = [server.process]
        try:
            server.up()
            for site in study.sites:
                file = real_client(folder, site, work)[-2]
                command = [*me, "--take-part", file, str(work / f"{site}.spans")]
                processes.append(subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL))
                wait_until(
                    lambda: connected(folder) >= len(processes) - 1 or server.process.poll() is not None, PATIENCE
                )
            wait_until(lambda: server.process.poll() is not None, PATIENCE)
            assert server.process.returncode == 0, server.output.read_text()
        finally:
            for process in processes:
                process.kill()
                process.wait()
        spans = [line.split("\t") for line in (work / "server.spans").read_text().splitlines()]
        stamps = [float(span[2]) for span in spans if span[0] == SERVER["server.coordinator", "save"]]
        print(conditions(), end="\n\n")
        print(table([work / f"{one}.spans" for one in ("server", *study.sites)], stamps))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--parameters", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--take-part", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve[0], Path(arguments.serve[1]))
    elif arguments.take_part:
        take_part(*map(Path, arguments.take_part))
    else:
        measure(arguments.sites, arguments.parameters, arguments.rounds)


if __name__ == "__main__":
    main()
