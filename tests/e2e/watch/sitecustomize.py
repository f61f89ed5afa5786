"""Loaded first by every Python process of a test that puts this folder on PYTHONPATH: notes what the process does.

A line per event, `{"event": .., "arguments": [..]}`, in $NOTES/PROCESS.jsonl: name look-ups and connections, files
opened for writing, made, renamed or removed, databases, and programs started. A child gets a file of its own. What a
library does without Python (SQLite's log beside a database) raises no event; the tests look at folders for that.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
ONE_PATH = {f"os.{name}" for name in ("mkdir", "remove", "rmdir", "chmod", "chown", "truncate", "utime")}
TWO_PATHS = {"os.rename", "os.link", "os.symlink"}
TO_AN_ADDRESS = {"socket.connect", "socket.sendto", "socket.sendmsg", "socket.bind"}  # (socket, address)
NAMES = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo"}
PROGRAMS = {"subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "os.fork", "os.spawn", "pty.spawn"}


def noted(event: str, arguments: tuple[Any, ...]) -> list[Any] | None:
    """What is kept of an event's arguments; None if the event is none of these."""
    if event == "open":
        path, _, flags = arguments
        opens_a_name = not isinstance(path, int)  # an int is a file that was opened before
        return [absolute(path)] if opens_a_name and flags & WRITES else None
    if event in ONE_PATH:
        return [absolute(arguments[0])]
    if event in TWO_PATHS:
        return [absolute(path) for path in arguments[:2]]
    if event == "sqlite3.connect":
        return [os.fsdecode(arguments[0])]
    if event in TO_AN_ADDRESS:
        return [arguments[1]]
    return list(arguments) if event in NAMES | PROGRAMS else None


def absolute(path: Any) -> Any:
    """A path as text from the root; a number, for an open file, as it is."""
    return path if isinstance(path, int) else os.path.abspath(os.fsdecode(path))


def watch(folder: str) -> None:
    """Note everything from here on."""
    notes = os.open(os.path.join(folder, f"{os.getpid()}.jsonl"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        found = noted(event, arguments)
        if found is not None:
            os.write(notes, json.dumps({"event": event, "arguments": found}, default=repr).encode() + b"\n")

    sys.addaudithook(hook)


if "NOTES" in os.environ:
    watch(os.environ["NOTES"])
