"""Deployed studies under random kill -9 of clients, training processes and the server, for so many minutes.

    python -m tests.e2e.faults.soak [--minutes 30] [--every 20] [--rounds 100]

A study of `--rounds` rounds after the other, two hospitals and a server as processes of the command line, until the
minutes are over; the last one is then left to finish. About every `--every` seconds a process is chosen and killed,
now and then all of them; it is started again up to five seconds later. Each study must complete with its books in
order (`Stage.check_books`): every ledger has each round once, spare steps are the attempts that failed, and the
server's final weights are, to the last bit, those that follow from the attempts that the ledgers say were released.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e.deployment import wait_until
from tests.e2e.faults.kill_everywhere import cohort
from tests.e2e.faults.stage import DECLARED, Stage, next_round, staged

PATIENCE = 1800.0
ALL_AT_ONCE = 0.1  # of the deaths are of every process
LATER = 5.0  # seconds until what was killed is started again, at most


@dataclass
class Soak:
    """What happened so far."""

    deaths: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    rounds: int = 0
    spares: int = 0
    studies: int = 0

    def __str__(self) -> str:
        deaths = ", ".join(f"{name} {count}" for name, count in sorted(self.deaths.items()))
        waits = sorted(self.seconds) or [0.0]
        return (
            f"{self.studies} studies completed, {self.rounds} rounds; {sum(self.deaths.values())} processes killed "
            f"({deaths}); {self.spares} spare steps used; seconds from a death to the end of the next round: median "
            f"{statistics.median(waits):.1f}, largest {waits[-1]:.1f}; load {os.getloadavg()[0]:.1f} on "
            f"{os.cpu_count()} cores"
        )


def victims(stage: Stage, chosen: random.Random) -> dict[str, int]:
    """Whom to kill: name -> process id. Empty if the chosen one has no such process at the moment."""
    clients = {name: one.process.pid for name, one in stage.running.items()}
    if chosen.random() < ALL_AT_ONCE:
        return clients
    name = chosen.choice(sorted(clients))
    if name == "server" or chosen.random() < 0.5:
        return {name: clients[name]}
    child = trainer_of(clients[name])
    return {} if child is None else {f"{name}'s training process": child}


def trainer_of(client: int) -> int | None:
    """The training process of a client (Linux); None while there is none."""
    for child in Path(f"/proc/{client}/task/{client}/children").read_text().split():
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            return int(child)
    return None


def one_study(root: Path, records: Mapping[str, Path], rounds: int, every: float, until: float, soak: Soak) -> None:
    """One study under fire until `until` (monotonic seconds), and then to its end."""
    chosen = random.Random(len(soak.seconds) + soak.studies)
    with staged(root, records, rounds, spares=rounds) as stage:
        for site in DECLARED:
            stage.start(site)
        wait_until(lambda: bool(stage.rounds), "the first round", PATIENCE)
        while not stage.finished and time.monotonic() < until:
            pause(stage, chosen.uniform(0.5, 1.5) * every, until)
            if stage.finished or time.monotonic() > until:
                break
            at, killed = time.time(), victims(stage, chosen)
            for name, process in killed.items():
                os.kill(process, signal.SIGKILL)
                soak.deaths[name] += 1
            if killed:
                time.sleep(chosen.uniform(0, LATER))  # somebody takes that long to start it again
                recover(stage, at, soak)
        wait_until(lambda: not stage.start_what_was_killed() and stage.finished, "the end of the study", PATIENCE)
        stage.end()
        soak.spares += sum(stage.check_books().values())
        soak.rounds += rounds
        soak.studies += 1


def pause(stage: Stage, seconds: float, until: float) -> None:
    """Wait, but not beyond the study's end or `until`."""
    end = min(time.monotonic() + seconds, until)
    wait_until(lambda: stage.finished or time.monotonic() > end, "a pause", PATIENCE)


def recover(stage: Stage, at: float, soak: Soak) -> None:
    """Start again what was killed, and wait for the next round; the study may have ended with that very round."""
    stage.start_what_was_killed()
    if not stage.finished:
        if stage.rounds[-1]["round"] == stage.study.training.rounds:  # killed after the last round, before the weights
            return
        soak.seconds.append(next_round(stage, at, PATIENCE))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--every", type=float, default=20, help="seconds between deaths")
    parser.add_argument("--rounds", type=int, default=100, help="of each study")
    arguments = parser.parse_args()
    began, soak = time.monotonic(), Soak()
    with tempfile.TemporaryDirectory() as made:
        records = cohort(Path(made) / "cohort")
        until = began + 60 * arguments.minutes
        while time.monotonic() < until:
            root = Path(made) / f"study{soak.studies}"
            one_study(root, records, arguments.rounds, arguments.every, until, soak)
            print(f"{(time.monotonic() - began) / 60:.0f} min: {soak}", flush=True)


if __name__ == "__main__":
    main()
