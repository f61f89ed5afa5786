"""Loaded first by every process of a deployment under test: kill -9 at a named moment that the test has armed.

`$FAULTS/armed/PROCESS@MOMENT` is a file that names the victims, separated by commas: self, parent, child, server. The
first process called PROCESS that comes to MOMENT moves the file to `$FAULTS/fired`, where it gets the time, and kills.
So every file kills once. The product knows nothing of it: functions are wrapped here when their module is imported.

When a training process has killed its client it stays where it is, until it notices by itself and ends.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.util
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

FAULTS = Path(os.environ["FAULTS"])
PROCESS = Path(os.environ["NOTES"]).name.partition("-")[2]


def moment(name: str) -> None:
    """Kill whom the test has armed this moment for."""
    armed, fired = (FAULTS / state / f"{PROCESS}@{name}" for state in ("armed", "fired"))
    try:
        armed.rename(fired)
    except OSError:
        return
    victims = fired.read_text().split(",")
    with fired.open("a") as file:
        file.write(f"\n{time.time()}")
    pids = {
        "self": os.getpid,
        "parent": os.getppid,
        "child": lambda: multiprocessing.active_children()[0].pid,
        "server": lambda: int((FAULTS / "server.pid").read_text()),
    }
    for pid in [pids[victim]() for victim in victims]:
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    if {"self", "parent"} & set(victims):  # nothing more is done here; kernels differ in how soon a process is gone
        threading.Event().wait()


def wrapped(owner: Any, name: str, what: str, *, after: bool = False) -> None:
    """Put a moment before or after every call of `owner.name`."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        if not after:
            moment(what)
        answer = function(*arguments, **named)
        if after:
            moment(what)
        return answer

    setattr(owner, name, call)


def ledger(module: ModuleType) -> None:
    """In the middle of the transaction of an entry, all of it written and nothing committed; and after it."""
    writing = {"Admitted": "admitting", "Attempted": "marking", "Released": "storing"}
    append, whole = module.EntryFile.append, module.EntryFile._whole
    kind = ""

    def appended(self: Any, entry: Any, *arguments: Any) -> None:
        nonlocal kind
        kind = type(entry).__name__
        append(self, entry, *arguments)
        if kind == "Released":
            moment("stored")

    @contextlib.contextmanager
    def in_a_transaction(self: Any) -> Iterator[None]:
        with whole(self):
            yield
            if kind in writing:
                moment(writing[kind])

    module.EntryFile.append, module.EntryFile._whole = appended, in_a_transaction


def checkpoint(_module: ModuleType) -> None:
    """The new checkpoint is written beside the old one, but does not stand in its place."""
    replace = Path.replace

    def replaced(self: Path, target: Any) -> Any:
        if self.name.startswith(".checkpoint"):
            moment("checkpointing")
        return replace(self, target)

    Path.replace = replaced  # type: ignore[method-assign,assignment]  # in this process alone


HOOKS: dict[str, Callable[[ModuleType], None]] = {
    "client.entry_file": ledger,
    "client.site": lambda module: wrapped(module, "train_round", "training", after=True),
    "client.fleet": lambda module: (
        wrapped(module.Fleet, "_push_object", "sending", after=True),
        wrapped(module.Fleet, "push", "sent", after=True),
    )[0],
    "server.strategy": lambda module: (
        wrapped(module, "weighted_mean", "aggregating", after=True),
        wrapped(module.FederatedAveraging, "configure_train", "between rounds"),
    )[0],
    "server.checkpoint": checkpoint,
    "server.coordinator": lambda module: wrapped(module, "save", "before the checkpoint"),
}


class Hooking(importlib.abc.MetaPathFinder):
    """Runs a hook after its module."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The module's own spec, with a loader that runs the hook at the end."""
        hook = HOOKS.pop(name, None)
        spec = importlib.util.find_spec(name) if hook is not None else None
        if hook is None or spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def executed(module: ModuleType) -> None:
            load(module)
            hook(module)

        spec.loader.exec_module = executed  # type: ignore[method-assign]  # this one loader
        return spec


sys.meta_path.insert(0, Hooking())
