"""The training process: what it says when it cannot begin. How it lives and dies is told in test_run.py."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from client.logs import LOG_BYTES, OLD_LOGS, logging_to
from client.trainer import Trainer, TrainerError, _place
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
