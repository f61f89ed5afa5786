"""What the processes of a deployment did, as `watch/sitecustomize.py` noted it, against what each may do.

Two things are allowed to every process. /dev/null may be opened for writing: the training process sends its standard
output and error there. A port of ::1 that the system chooses may be bound: urllib3, which Flower imports, asks in this
way whether the machine has IPv6, and nobody listens there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.e2e.deployment import ROOT, Deployment, May

WATCH = ROOT / "tests" / "e2e" / "watch"
LOOPBACK = ("127.0.0.1", "::1")
PROGRAMS = ("subprocess.", "os.exec", "os.posix_spawn", "os.system", "os.fork", "os.spawn", "pty.")


@dataclass(frozen=True)
class Note:
    """One event of one process or of a child of it; `process` is the name that it was started under."""

    process: str
    event: str
    arguments: tuple[Any, ...]


def notes(deployment: Deployment) -> Iterator[tuple[Note, May]]:
    """All that was noted, with what the process may do."""
    for running in deployment.started:
        for file in sorted((deployment.root / "notes" / running.name).iterdir()):
            for line in file.read_text().splitlines():
                noted = json.loads(line)
                yield Note(running.name, noted["event"], tuple(noted["arguments"])), running.may


def strays(deployment: Deployment) -> list[Note]:
    """What a process did and may not."""
    return [note for note, may in notes(deployment) if not allowed(note, may)]


def allowed(note: Note, may: May) -> bool:
    """Whether a process may do that. What is not known is not."""
    if note.event.startswith(PROGRAMS):
        return False
    if not note.event.startswith("socket."):
        return all(_is_in(str(path), may.write) for path in note.arguments)
    own = may.listen if may.listen is not None else may.call
    if note.event == "socket.getaddrinfo":
        return own is not None and note.arguments[0] in ("localhost", *LOOPBACK) and note.arguments[1] == own
    if not isinstance(note.arguments[0], list):
        return False  # no address of the internet
    host, port, *_ = note.arguments[0]
    if note.event == "socket.bind":
        return (host, port) == ("::1", 0) or (host in LOOPBACK and port == may.listen is not None)
    return note.event == "socket.connect" and host in LOOPBACK and port == may.call


def _is_in(path: str, folders: Iterable[Path]) -> bool:
    plain = Path(path.removeprefix("file:").removesuffix("?mode=ro"))  # how SQLite is told to only read
    return path == "/dev/null" or any(plain.is_relative_to(folder) for folder in folders)


def seen(deployment: Deployment, event: str) -> set[str]:
    """The processes that were seen to do it, without their numbers: the watch was awake."""
    return {note.process.partition("-")[2] for note, _ in notes(deployment) if note.event == event}
