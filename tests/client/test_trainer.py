"""The training process: what it says when it cannot begin. How it lives and dies is told in test_run.py."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import pytest

from client import trainer
from client.logs import LOG_BYTES, OLD_LOGS, logging_to
from client.trainer import Ready, Trainer, TrainerError, _place
from common.errors import DataError, LedgerError, WardroundError
from tests.client.hospitals import with_key, write_site, write_study
from tests.client.scripted import SECRET


def test_a_site_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    """What is wrong with study, records or ledger comes from the child as the line that it would print itself."""
    write_study(tmp_path)
    path = write_site(tmp_path, tmp_path / "nowhere", {"address": "localhost:1", "plaintext": True})
    with_key(path)
    trainer = Trainer(path)
    with pytest.raises(TrainerError, match=r"not enrolled yet; run `wardround client enrol` first"):
        trainer.start()
    assert trainer.pid is None


def test_a_failures_place_holds_none_of_its_text() -> None:
    """Class, file and line say enough to find a defect; the text may hold a patient's value."""

    def fail() -> None:
        raise ValueError(SECRET)

    with pytest.raises(ValueError, match=SECRET) as caught:
        fail()
    place = _place(caught.value)
    assert place.startswith("ValueError at ")
    assert "test_trainer.py:" in place
    assert SECRET not in place


def test_the_log_is_private_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much is logged, a few files of a fixed size hold it, for this user alone."""
    monkeypatch.setattr("client.logs.LOG_BYTES", 1000)
    with logging_to(tmp_path / "client.log", "info"):
        for number in range(500):
            logging.getLogger("wardround.client").info("line %d of a long life", number)
        logging.getLogger("wardround.client").debug("not at this level")
        logging.getLogger("httpx").warning("somebody else's")
    files = sorted(tmp_path.iterdir())
    assert len(files) == OLD_LOGS + 1
    assert all(path.stat().st_size <= 1100 and path.stat().st_mode & 0o077 == 0 for path in files)
    assert "line 499" in (tmp_path / "client.log").read_text()
    assert not any("somebody" in path.read_text() or "not at" in path.read_text() for path in files)
    assert LOG_BYTES <= 10_000_000


class _Reopened:
    """A hospital whose opt-outs have changed once, or whose ledger cannot be held."""

    def __init__(self, said: str | LedgerError, *, outdated: bool = False) -> None:
        self.ready, self.said, self.outdated = Ready("s", 1, ()), said, outdated

    def answer(self, _message: object, _node: int) -> str:
        """What this opening of the site says."""
        if isinstance(self.said, LedgerError):
            raise self.said
        return self.said


def _worked(monkeypatch: pytest.MonkeyPatch, *openings: _Reopened | WardroundError) -> list[object]:
    """What the child says to one message while its hospital opens as told."""
    waiting = list(openings)

    def opening(*_arguments: object) -> _Reopened:
        found = waiting.pop(0)
        if isinstance(found, WardroundError):
            raise found
        return found

    for name in ("ignore", "_end_with_parent", "_silence"):
        monkeypatch.setattr(trainer, name, lambda: None)
    monkeypatch.setattr("client.hospital.Hospital.open", opening)
    logger = logging.getLogger("wardround")
    before = list(logger.handlers), logger.level, logger.propagate
    ours, theirs = multiprocessing.Pipe()
    ours.send(("message", 1))
    child = threading.Thread(target=trainer._work, args=(theirs, Path("site.yaml"), None))
    child.start()
    said: list[object] = []
    while len(said) < 2:
        word = ours.recv()
        if not isinstance(word, trainer._Line):
            said.append(word)
    ours.close()
    child.join(30)
    logger.handlers[:], logger.level, logger.propagate = before
    assert not child.is_alive()
    return said


def test_changed_optouts_are_read_before_the_next_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message that comes after the file of opt-outs has changed is answered by the site opened anew."""
    assert _worked(monkeypatch, _Reopened("old", outdated=True), _Reopened("new"))[1] == "new"


def test_optouts_that_cannot_be_read_train_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the site cannot be opened anew the child ends with that line, and answers nothing from the old records."""
    said = _worked(monkeypatch, _Reopened("old", outdated=True), DataError("optouts.csv: no such file"))
    assert said[1] == trainer._Last(trainer._Failed("optouts.csv: no such file"))


def test_a_ledger_that_cannot_be_held_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong with the ledger, and the remedy, reach the log; the child goes on to the next message."""
    busy = _Reopened(LedgerError("ledger.db: another process writes to this ledger; stop it first"))
    said = _worked(monkeypatch, busy)
    assert said[1] == trainer._Failed("ledger.db: another process writes to this ledger; stop it first")


def test_a_child_that_died_between_rounds_is_replaced_before_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A child that nobody needed when it was killed costs no round: the message goes to the new one."""
    trainer = Trainer(tmp_path / "site.yaml")
    lives = [SimpleNamespace(is_alive=alive, exitcode=-9) for alive in (lambda: False, lambda: True)]
    for life in lives:
        life.kill = life.close = lambda: None
        life.join = lambda _seconds=None: None
        life.sentinel = os.open(os.devnull, os.O_RDONLY)
    ends: list[Connection] = []

    def start() -> Ready:
        ours, theirs = multiprocessing.Pipe()
        trainer._process, trainer._pipe = lives.pop(0), ours
        if lives:
            theirs.close()  # dead
        else:
            theirs.send("the reply")
            ends.append(theirs)
        return Ready("s", 1, ())

    monkeypatch.setattr(trainer, "start", start)
    trainer.start()
    assert trainer.answer("message", 1) == "the reply"  # type: ignore[arg-type]  # as the pipe carries anything
    trainer.stop()
