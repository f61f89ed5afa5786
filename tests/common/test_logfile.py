"""The log file: private, bounded, and never a reason to stop."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.logfile import LogFile

FULL = Path("/dev/full")


@contextmanager
def logger(handler: LogFile) -> Iterator[logging.Logger]:
    one = logging.Logger("of the test")
    one.addHandler(handler)
    try:
        yield one
    finally:
        handler.close()


def test_lines_are_kept_in_a_bounded_number_of_private_files(tmp_path: Path) -> None:
    """Two older files beside the newest, each of the size allowed, all 0600."""
    with logger(LogFile(tmp_path / "log", 200, 2)) as log:
        for number in range(100):
            log.warning("line %d", number)
    found = sorted(tmp_path.iterdir())
    assert [path.name for path in found] == ["log", "log.1", "log.2"]
    assert all(path.stat().st_size <= 200 and path.stat().st_mode & 0o777 == 0o600 for path in found)
    assert "line 99" in found[0].read_text()


@pytest.mark.skipif(not FULL.exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_said_once_and_raises_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither a line nor the close is an exception or a traceback; standard error has one line with the reason."""
    with logger(LogFile(FULL, 10**6, 2)) as log:
        for number in range(1000):
            log.warning("line %d, long enough to fill what Python keeps back", number)
    assert capsys.readouterr().err == "/dev/full: cannot be written (No space left on device); going on without\n"


def test_a_mistake_of_ours_is_not_hidden(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A format that does not fit its arguments is still told by `logging`."""
    with logger(LogFile(tmp_path / "log", 200, 2)) as log:
        log.warning("%d", "no number")
    assert "TypeError" in capsys.readouterr().err
