"""What was answered is on the disk, not only in the system's memory: who is synced, and in which order."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from client.durable import replace_durably
from common.errors import LedgerError
from tests.client.ledger_cases import SMALL, STUDY, WEIGHTS, opened


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is synced and renamed outside SQLite, in order, by name."""
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(descriptor: int) -> None:
        order.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def watched_replace(self: Path, target: Path) -> Path:
        order.append(f"rename to {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    return order


pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="names of open files are read from /proc")


def test_sqlite_syncs_at_every_commit(tmp_path: Path) -> None:
    """The ledger's connection writes ahead and syncs fully: nothing weaker is left from a default."""
    with opened(tmp_path / "ledger.db") as ledger:
        settings = {
            name: ledger._file._connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("journal_mode", "synchronous", "fullfsync", "foreign_keys")
        }
    assert settings == {"journal_mode": "wal", "synchronous": 2, "fullfsync": 1, "foreign_keys": 1}


def test_the_name_of_a_new_ledger_is_durable(tmp_path: Path, done: list[str]) -> None:
    """The folder is synced once the ledger's file, and its lock's, is made; an old one needs no more."""
    with opened(tmp_path / "ledger.db"):
        assert done == [f"sync {tmp_path.name}"] * 2
    done.clear()
    with opened(tmp_path / "ledger.db"):
        assert done == []


def test_the_anchor_is_whole_and_durable_after_every_entry(tmp_path: Path, done: list[str]) -> None:
    """Each entry: the new anchor is synced, put in place of the old one, and the name synced, in this order."""
    (tmp_path / "medium").mkdir()
    with opened(tmp_path / "ledger.db", tmp_path / "medium" / "anchor") as ledger:
        for call in (lambda: ledger.admit(STUDY, SMALL), lambda: ledger.attempt(STUDY, 1, 1, WEIGHTS)):
            done.clear()
            call()
            assert done == ["sync anchor.new", "rename to anchor", "sync medium"]


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails half-way leaves what was there."""
    path = tmp_path / "anchor"
    replace_durably(path, b"old")

    def fails(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space left"):
        replace_durably(path, b"new and longer")
    assert path.read_bytes() == b"old"


def test_another_users_ledger_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of another owner may be exchanged by that owner: refused, with the remedy."""
    with opened(tmp_path / "ledger.db"):
        pass
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(LedgerError, match="not 4711; run as its owner"):
        opened(tmp_path / "ledger.db")
