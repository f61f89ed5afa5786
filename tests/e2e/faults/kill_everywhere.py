"""One deployed study in which every process is killed at every moment that matters; a table of what it cost.

    python -m tests.e2e.faults.kill_everywhere

The processes are those of the command line over TLS. Each line of KILLS is armed when the study has recovered from the
one before: the process that comes to that moment sends signal 9 there and then, so no death is a matter of luck.
"Seconds" are from the death to the end of the first round after it, the start of what was killed included: somebody
(systemd, Docker) starts it at once. "Spare steps" are what the site's ledger was charged for it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from simulations.cohort import PRESETS, write_cohort
from tests.e2e.deployment import wait_until
from tests.e2e.faults.stage import DECLARED, Stage, next_round, staged

ROUNDS, SPARES, PATIENCE = 60, 12, 900.0


@dataclass(frozen=True)
class Kill:
    """At which moment of which process who is killed, and the spare steps that it costs the site."""

    process: str
    moment: str
    victims: tuple[str, ...]
    spares: int
    says: str


def _client(process: str, moment: str, victim: str, spares: int) -> Kill:
    """A death of a client's training process or of the client itself."""
    in_child = moment not in ("sending", "sent")
    who = {"child": "self", "client": "parent"}[victim] if in_child else {"child": "child", "client": "self"}[victim]
    return Kill(process, moment, (who,), spares, f"{'training process' if victim == 'child' else 'client'}, {moment}")


FIRST = (_client("north", "admitting", "child", 0), _client("east", "admitting", "client", 0))
KILLS = (
    _client("north", "marking", "child", 0),
    _client("east", "marking", "client", 0),
    _client("north", "training", "child", 1),
    _client("east", "training", "client", 1),
    _client("north", "storing", "child", 1),
    _client("east", "storing", "client", 1),
    _client("north", "stored", "child", 0),
    _client("east", "stored", "client", 0),
    _client("north", "sending", "child", 0),
    _client("east", "sending", "client", 0),
    _client("north", "sent", "child", 0),
    _client("east", "sent", "client", 0),
    Kill("server", "aggregating", ("self",), 0, "server, aggregating"),
    Kill("server", "before the checkpoint", ("self",), 0, "server, round's line written, no checkpoint yet"),
    Kill("server", "checkpointing", ("self",), 0, "server, new checkpoint not yet in its place"),
    Kill("server", "between rounds", ("self",), 0, "server, between rounds"),
    Kill("north", "training", ("server", "parent"), 1, "server, client and training process, training"),
    Kill("east", "storing", ("server", "self"), 1, "server and training process, storing"),
    Kill("north", "sending", ("server", "self"), 0, "server and client, sending"),
)


@dataclass(frozen=True)
class Recovered:
    """A kill, the seconds until the next round was done, and the spare steps that the ledger says it cost."""

    kill: Kill
    seconds: float
    spares: int


def failed(stage: Stage, site: str) -> int:
    """Spare steps that attempts of rounds which are released have used so far."""
    account = stage.account(site)
    return sum(account.attempts[number] - 1 for number in account.released)


def carry_out(stage: Stage, kills: tuple[Kill, ...]) -> list[Recovered]:
    """Arm them one after the other; each must fire, and the study must go on."""
    found = []
    for kill in kills:
        stage.fired(kill.process, kill.moment).unlink(missing_ok=True)
        before = {site: failed(stage, site) for site in stage.hospitals}
        stage.arm(kill.process, kill.moment, *kill.victims)
        at = died(stage, kill)
        seconds = next_round(stage, at, PATIENCE)
        costs = {site: failed(stage, site) - before[site] for site in stage.hospitals}
        found.append(Recovered(kill, seconds, sum(costs.values())))
        print(line(found[-1]), flush=True)
        assert found[-1].spares == kill.spares, f"{kill.says}: {found[-1].spares} spare steps, not {kill.spares}"
    return found


def died(stage: Stage, kill: Kill) -> float:
    """Wait for the death; when it was, in epoch seconds."""
    fired = stage.fired(kill.process, kill.moment)

    def happened() -> bool:
        assert not stage.finished, f"the study ended before {kill.says}"
        return fired.exists() and fired.read_text().count("\n") == 1

    wait_until(happened, kill.says, PATIENCE)
    return float(fired.read_text().splitlines()[1])


def line(recovered: Recovered) -> str:
    """A row of the table."""
    return f"| {recovered.kill.says} | {recovered.seconds:.1f} | {recovered.spares} |"


def everything(root: Path, records: Mapping[str, Path], kills: tuple[Kill, ...] = KILLS) -> list[Recovered]:
    """The study, with the deaths while admitting first; returns what happened after the books were found in order."""
    with staged(root, records, ROUNDS, SPARES) as stage:
        for kill in FIRST:
            stage.arm(kill.process, kill.moment, *kill.victims)
        for site in DECLARED:
            stage.start(site)
        deaths = [died(stage, kill) for kill in FIRST]
        found = [Recovered(kill, next_round(stage, at, PATIENCE), 0) for kill, at in zip(FIRST, deaths, strict=True)]
        for one in found:
            print(line(one), flush=True)
        found += carry_out(stage, kills)
        wait_until(lambda: stage.finished, "the end of the study", PATIENCE)
        stage.end()
        used = stage.check_books()
        assert sum(used.values()) == sum(one.kill.spares for one in found), (used, found)
        return found


def cohort(folder: Path) -> dict[str, Path]:
    """The tiny synthetic cohort of the tests."""
    return {path.name: path for path in write_cohort(PRESETS["medium"], 3, folder, scale=0.02)}


def main() -> None:
    """Command line."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as made:
        print("| killed | seconds | spare steps |\n|---|---:|---:|", flush=True)
        found = everything(Path(made) / "d", cohort(Path(made) / "cohort"))
    print(
        f"\n{len(found)} deaths in one study of {ROUNDS} rounds, which completed; books in order; "
        f"{time.monotonic() - began:.0f} s; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )


if __name__ == "__main__":
    main()
