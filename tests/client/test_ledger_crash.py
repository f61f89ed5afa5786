"""A process that dies while it uses the ledger leaves one that opens and shows no less than was answered."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from client.accounts import KEPT_ROUNDS
from client.ledger import Attempt
from client.ledger_file import SqliteLedger, read_accounts
from common.privacy.accounting import epsilon_of
from common.privacy.plan import Plan
from tests.client.ledger_cases import CAP, DELTA, STUDY, UNSYNCED, WEIGHTS, opened

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that share what was imported")

MANY = Plan(0.1, 20.0, 2.0, DELTA, 100, 60)
ROUNDS = 4
POINTS = 120
Tick = Callable[[], None]
Say = Callable[[dict[str, Any]], None]


def update_of(round_number: int, number: int) -> bytes:
    """What an attempt releases: of its own, and of more than a page."""
    return b"%d/%d " % (round_number, number) * 900


def work(ledger: SqliteLedger, say: Say, rounds: int) -> None:
    """What a site does, from where the ledger stands; whatever is answered is said at once."""
    ledger.admit(STUDY, MANY)
    say({"admitted": 1})
    first = len(ledger.accounts.studies[STUDY].released) + 1
    for number in range(first, first + rounds):
        attempt = ledger.attempt(STUDY, number, 1, WEIGHTS)
        assert isinstance(attempt, Attempt)
        say({"attempt": [number, attempt.number], "head": ledger.head()})
        ledger.release(attempt, update_of(number, attempt.number))
        say({"release": [number, attempt.number], "head": ledger.head()})


def in_child(job: Callable[[Say], None], *, kill_after: int | None = None) -> list[Any]:
    """Run `job` in a process of its own; returns all that it said, whatever became of it.

    Args:
        job: gets a function that writes a line to the parent.
        kill_after: kill -9 as soon as so many lines have come.
    """
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:

        def say(what: dict[str, Any]) -> None:
            os.write(writing, json.dumps(what).encode() + b"\n")

        try:
            job(say)
            os._exit(0)
        finally:
            os._exit(3)  # an exception: the test fails below
    os.close(writing)
    with os.fdopen(reading, "rb") as lines:
        said = []
        for line in lines:
            said.append(json.loads(line))
            if len(said) == kill_after:
                os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) in (0, 9), f"the child failed: {status}"
    return said


def check(path: Path, anchor: Path, said: list[Any]) -> None:
    """All that was said is in the ledger, and at most one call more; it goes on from there."""
    attempts = [tuple(what["attempt"]) for what in said if "attempt" in what]
    released = [tuple(what["release"]) for what in said if "release" in what]
    with opened(path, anchor) as ledger:
        account = ledger.accounts.studies.get(STUDY)
        if any("admitted" in what for what in said):
            assert account is not None
        assert all(ledger.contains(what["head"]) for what in said if "head" in what)
        assert ledger.steps_taken(STUDY) - len(attempts) in (0, 1)
        if account is None:
            return
        assert len(account.released) - len(released) in (0, 1)
        for number, attempt_number in released[-(KEPT_ROUNDS - 1) :]:
            assert ledger.attempt(STUDY, number, 1, WEIGHTS) == update_of(number, attempt_number)
        before = ledger.steps_taken(STUDY)
        again = ledger.attempt(STUDY, len(account.released) + 1, 1, WEIGHTS)
        assert isinstance(again, Attempt)
        assert (again.round_number, again.number) not in attempts  # fresh noise
        assert ledger.steps_taken(STUDY) == before + 1
    assert read_accounts(path)[0].cohorts["all"].spent == epsilon_of(MANY) <= CAP


def ticking(tick: Tick) -> Callable[..., sqlite3.Connection]:
    """`sqlite3.connect`, with `tick` called before every instruction of SQLite's own machine."""

    def connect(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = sqlite3.connect(*args, **kwargs)
        connection.set_progress_handler(tick, 1)
        return connection

    return connect


def step_by_step(path: Path, anchor: Path, say: Say, tick: Tick) -> None:
    """Open and use a ledger, with `tick` before each line of `client/` and each instruction of SQLite."""

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        if "/client/" not in frame.f_code.co_filename or "/tests/" in frame.f_code.co_filename:
            return None
        if event == "line":
            tick()
        return trace

    sys.settrace(trace)
    with SqliteLedger(path, CAP, DELTA, anchor=anchor, connect=ticking(tick)) as ledger:
        work(ledger, say, ROUNDS)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=UNSYNCED) as made:
        yield Path(made)


def count_steps(folder: Path) -> int:
    """How many steps an undisturbed use of a new ledger has."""
    steps = 0

    def tick() -> None:
        nonlocal steps
        steps += 1

    def job(say: Say) -> None:
        step_by_step(folder / "ledger.db", folder / "anchor", say, tick)
        say({"steps": steps})

    return int(in_child(job)[-1]["steps"])


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> int:
    epsilon_of(MANY)  # priced once, for all children
    return count_steps(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("point", range(POINTS))
def test_a_process_that_ends_at_any_instruction_loses_nothing_that_it_answered(
    point: int, steps: int, folder: Path
) -> None:
    """Stopped before one of its steps, spread evenly from making the file to the last release, it left a ledger."""
    path, anchor = folder / "ledger.db", folder / "anchor"
    left = steps * (2 * point + 1) // (2 * POINTS)

    def tick() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os._exit(9)

    said = in_child(lambda say: step_by_step(path, anchor, say, tick))
    check(path, anchor, said)


def test_there_are_more_steps_than_points(steps: int) -> None:
    """No two of the points above are the same step."""
    assert steps > 5 * POINTS


def test_kill_9_at_any_moment_loses_nothing_that_was_answered(tmp_path: Path) -> None:
    """One ledger, killed again and again while it writes: each time it opens, and all that was answered is there."""
    path, anchor = tmp_path / "ledger.db", tmp_path / "anchor"
    chosen = random.Random(1)
    with opened(path, anchor) as ledger:
        ledger.admit(STUDY, MANY)
    for _ in range(25):
        with opened(path, anchor) as ledger:
            before = ledger.accounts.studies[STUDY]
        after = chosen.randrange(1, 6)

        def job(say: Say) -> None:
            with opened(path, anchor) as ledger:
                work(ledger, say, 8)

        said = in_child(job, kill_after=after)
        with opened(path, anchor) as ledger:
            now = ledger.accounts.studies[STUDY]
            attempts = [what for what in said if "attempt" in what]
            released = [what["release"] for what in said if "release" in what]
            assert now.steps_taken - before.steps_taken - len(attempts) in (0, 1)
            assert len(now.released) - len(before.released) - len(released) in (0, 1)
            assert all(ledger.contains(what["head"]) for what in said if "head" in what)
            for number, attempt_number in released[-1:]:
                assert ledger.attempt(STUDY, number, 1, WEIGHTS) == update_of(number, attempt_number)
