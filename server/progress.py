"""What a run tells people, in files: a line a round, the present moment, and the summary that `server status` prints.

`metrics.jsonl` has a line for every round that was asked for: who answered, why others did not (a word of the closed
list, or what the server found wrong), seconds. `now.json` is replaced every few seconds: which phase, who is
connected. Both hold public facts only. Reading them needs no port, so it works beside a running server and without.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from common.errors import WardroundError
from server.files import append_line, write_atomically

if TYPE_CHECKING:
    from common.study import Study
    from server.grid import Presence
    from server.rounds import RoundRecord

log = logging.getLogger("wardround.server")

STALE = 20.0  # seconds after which a server that writes every `EVERY` is taken for gone
EVERY = 5.0
FEW = 10  # latest rounds that the time left is judged by
Phase = Literal["starting", "waiting", "round", "metrics", "finished", "stopped"]


def append(path: Path, record: RoundRecord, *, counted: bool) -> None:
    """Add a round's line. `counted`: it had its quorum."""
    line = {
        "round": record.round_number,
        "time": round(time.time(), 3),
        "seconds": round(record.seconds, 3),
        "counted": counted,
        "sites": list(record.sites),
        "refused": record.refused,
    }
    append_line(path, json.dumps(line))


def read(path: Path, upto: int | None = None) -> list[dict[str, Any]]:
    """The lines so far. What is no whole line is left out; of a counted round only its last line stays.

    A crash between a round's line and its checkpoint leaves a line of a round that did not count; `upto`, the
    checkpoint's round, leaves those out.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    lines: list[dict[str, Any]] = []
    for raw in content.splitlines():
        line = _plain(raw, round=int, counted=bool, seconds=(int, float), sites=list, refused=dict)
        if line is None:
            continue
        if not line["counted"] or upto is None or line["round"] <= upto:
            lines.append(line)
    last = {line["round"]: index for index, line in enumerate(lines) if line["counted"]}
    return [line for index, line in enumerate(lines) if not line["counted"] or last[line["round"]] == index]


@dataclass
class Now:
    """The present moment, for readers in other processes.

    Args:
        path: now.json.
    """

    path: Path
    phase: Phase = "starting"
    round_number: int = 0
    note: str = ""
    presence: Mapping[str, Presence] = field(default_factory=dict)
    _written: float = 0.0

    def show(self, phase: Phase, round_number: int, note: str = "") -> None:
        """A new phase, written at once."""
        self.phase, self.round_number, self.note = phase, round_number, note
        self._write()

    def beat(self, presence: Mapping[str, Presence]) -> None:
        """Still here; written if the last time is `EVERY` seconds ago or someone has come or gone."""
        changed = {n: p.online for n, p in presence.items()} != {n: p.online for n, p in self.presence.items()}
        self.presence = dict(presence)
        if changed or time.monotonic() - self._written >= EVERY:
            self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        sites = {
            name: {"online": p.online, "last_seen": p.last_seen, "contested": p.contested}
            for name, p in self.presence.items()
        }
        content = {
            "time": time.time(),
            "process": os.getpid(),
            "phase": self.phase,
            "round": self.round_number,
            "note": self.note,
            "sites": sites,
        }
        try:
            write_atomically(self.path, json.dumps(content).encode(), durable=False)
        except WardroundError as error:  # it is for people who look; the study goes on without
            log.warning("%s", error)


@dataclass(frozen=True)
class SiteStatus:
    """One site's part so far.

    Attributes:
        admitted: its key is on the roster.
        online, last_seen: as the running server sees it; None when no server runs, or it was never seen.
        contested: the running server heard two processes with its key, and listens to neither.
        rounds: rounds it answered with an update.
        last_refusal: why it had none in the last round that it missed, with the round's number.
        epsilon: of the plan's first steps, as many as the server knows of; the site's own ledger may have marked more.
    """

    site: str
    declared_patients: int
    admitted: bool
    online: bool | None
    last_seen: float | None
    contested: bool
    rounds: int
    last_refusal: str | None
    epsilon: float


@dataclass(frozen=True)
class Status:
    """A study at a glance.

    Attributes:
        phase: what the server does, or `not running`.
        seconds_left: judged by the latest rounds; None before the first and after the last.
        guarantee: epsilon of the whole plan: what a site promises its patients, also when the study stops early.
        guarantee_with_metrics: the same for a site that tells the study's metrics; None if the study has none.
    """

    study: str
    digest: str
    phase: str
    note: str
    round: int
    rounds: int
    quorum: int
    seconds_left: float | None
    guarantee: float
    guarantee_with_metrics: float | None
    delta: float
    sites: tuple[SiteStatus, ...]

    def as_dict(self) -> dict[str, Any]:
        """As plain data, for `--json`."""
        return asdict(self)


def summarise(
    study: Study, done: int, lines: list[dict[str, Any]], now: dict[str, Any] | None, admitted: frozenset[str]
) -> Status:
    """Put together what stands in the files.

    Args:
        done: the checkpoint's round.
        lines: `read` of metrics.jsonl.
        now: `read_now`, None if no server runs.
        admitted: the roster's sites.
    """
    from common.privacy.accounting import epsilon_of

    plan, steps = study.plan(), study.training.local_steps
    seconds = [line["seconds"] for line in lines if line["counted"]][-FEW:]
    left = study.training.rounds - done
    sites = []
    for site, terms in study.sites.items():
        seen = (now or {}).get("sites", {}).get(site, {})
        answered = {line["round"] for line in lines if site in line["sites"]}
        failed = sum(line["refused"].get(site) == "LOCAL_FAILURE" for line in lines)  # marked, hence spent
        missed = [(line["refused"][site], line["round"]) for line in lines if site in line["refused"]]
        sites.append(
            SiteStatus(
                site,
                terms.declared_patients,
                site in admitted,
                seen.get("online") if now else None,
                seen.get("last_seen"),
                seen.get("contested", False),
                sum(line["counted"] and site in line["sites"] for line in lines),
                f"{missed[-1][0]} (round {missed[-1][1]})" if missed else None,
                epsilon_of(plan, min((len(answered) + failed) * steps, plan.priced_steps)),
            )
        )
    return Status(
        study.name,
        study.digest(),
        now["phase"] if now else ("finished" if left == 0 else "not running"),
        now["note"] if now else "",
        done,
        study.training.rounds,
        study.quorum,
        sum(seconds) / len(seconds) * left if seconds and left else None,
        epsilon_of(plan),
        None if study.metrics is None else study.epsilon(with_metrics=True),
        plan.delta,
        tuple(sites),
    )


def read_now(path: Path) -> dict[str, Any] | None:
    """now.json, or None if the server that wrote it has ended or has not been heard of for `STALE` seconds."""
    try:
        now = _plain(path.read_bytes(), time=(int, float), phase=str, note=str, sites=dict)
    except FileNotFoundError:
        return None
    if now is None or not all(isinstance(site, dict) for site in now["sites"].values()):
        return None
    ended = now["phase"] in ("finished", "stopped")
    return None if ended or time.time() - now["time"] > STALE else now


def _plain(content: bytes, **types: type | tuple[type, ...]) -> dict[str, Any] | None:
    """A JSON object with at least these keys and types; None if it is none, as after a power cut."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(found, dict) and all(isinstance(found.get(key), kind) for key, kind in types.items())
    return found if whole else None


def round_of(checkpoint: Path) -> int:
    """The round of a checkpoint, without the weights; 0 if there is none that can be read."""
    import safetensors

    try:
        with safetensors.safe_open(checkpoint, framework="numpy") as file:
            return int(file.metadata()["round"])
    except Exception:  # safetensors has an exception of its own
        return 0
