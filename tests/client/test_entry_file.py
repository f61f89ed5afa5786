"""The ledger's file as such: what is no ledger, what is a ledger no more, and what it answers then."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from client.anchor import Anchor
from client.entries import SALT_BYTES, START, LedgerOpened, PatientsJoined, chained
from client.entry_file import EntryFile, read_entries
from common.errors import LedgerError, RollbackError
from tests.client.ledger_cases import STUDY, raw, used

GONE = "this hospital has enrolled, but its ledger is gone or empty; restore the newest backup"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


def test_who_enrolled_has_a_ledger_with_an_entry(path: Path) -> None:
    """`create=False`: no file, an empty file, and tables without an entry are each a ledger that is gone."""
    with pytest.raises(LedgerError, match=GONE):
        EntryFile(path, create=False)
    assert not path.exists()
    path.touch(mode=0o600)
    with pytest.raises(LedgerError, match=GONE):
        EntryFile(path, create=False)
    with raw(path) as connection:
        assert connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
    EntryFile(path).close()
    with pytest.raises(LedgerError, match=GONE):
        EntryFile(path, create=False)


def test_a_refused_file_is_given_back(path: Path) -> None:
    """After a refusal the lock is free: the next opening is not told that the ledger is in use."""
    EntryFile(path).close()
    for _ in range(2):
        with pytest.raises(LedgerError, match=GONE):
            EntryFile(path, create=False)
    file = EntryFile(path)
    file.append(LedgerOpened("00"))
    file.close()
    assert read_entries(path).entries == [LedgerOpened("00")]


def test_a_file_that_nothing_was_written_to_has_no_entries(path: Path) -> None:
    """A first start that was killed before its first write: reading finds an empty ledger, and makes no tables."""
    path.touch(mode=0o600)
    assert read_entries(path).entries == []
    assert path.stat().st_size == 0


def test_a_place_that_cannot_write_ahead_is_refused(path: Path) -> None:
    """Where SQLite cannot keep its log, such as on some network file systems, no ledger is begun."""

    def elsewhere(_path: Path, **options: Any) -> sqlite3.Connection:
        return sqlite3.connect(":memory:", **options)

    with pytest.raises(LedgerError, match="this file system cannot keep a ledger; put the state on a local disk"):
        EntryFile(path, elsewhere)


def test_bytes_that_are_gone_are_said_to_be(path: Path) -> None:
    """An entry without an attachment, or one whose bytes were dropped, has none to give: one clear error."""
    file = EntryFile(path)
    file.append(LedgerOpened("00"))
    file.append(PatientsJoined("all", 0, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"), b"")
    assert file.attachment(2) == b""
    file.append(LedgerOpened("01"), forget=[2])
    for position in (1, 2, 4):
        with pytest.raises(LedgerError, match=rf"damaged \(the bytes of entry {position} are missing\)"):
            file.attachment(position)
    assert file.contents.attached == set()
    file.close()


def test_a_ledger_without_a_version_is_damaged(path: Path) -> None:
    """Our tables and our mark, but version 0: not a new file, and not one to begin anew."""
    used(path)
    with raw(path) as connection:
        connection.execute("PRAGMA user_version = 0")
    for opening in (EntryFile, read_entries):
        with pytest.raises(LedgerError, match=r"damaged \(its version is none\)"):
            opening(path)


def append_by_hand(path: Path, content: bytes) -> int:
    """Add an entry of any content with a hash that closes the chain, as a defect of ours could; its number."""
    salt = bytes(SALT_BYTES)
    with raw(path) as connection:
        rows = connection.execute("SELECT number, hash FROM entries ORDER BY number").fetchall()
        number, before = rows[-1] if rows else (0, START)
        row = (number + 1, content, salt, chained(before, salt, content))
        connection.execute("INSERT INTO entries VALUES (?, ?, ?, ?)", row)
    return int(number) + 1


IMPOSSIBLE = {
    "sampling_rate": 0.1,
    "noise_multiplier": -4.0,
    "clip": 2.0,
    "delta": 1e-5,
    "steps": 10,
    "spare_steps": 3,
}
UNREADABLE = {
    "no JSON": b"{",
    "no UTF-8": b"\xff",
    "no kind": b"{}",
    "another kind": b'{"kind":"spent"}',
    "a field too many": b'{"kind":"ledger","patient_key":"00","epsilon":1}',
    "a field too few": b'{"kind":"cohort","cohort":"all"}',
    "an impossible plan": json.dumps(
        {"kind": "admitted", "cohort": "all", "study": STUDY, "epsilon": 1.0, "plan": IMPOSSIBLE}
    ).encode(),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_an_entry_that_says_nothing_we_know_is_damage(path: Path, what: str) -> None:
    """Even where its hash is right, an entry that does not read is no entry to skip: the ledger does not open."""
    used(path)
    number = append_by_hand(path, UNREADABLE[what])
    for opening in (EntryFile, read_entries):
        with pytest.raises(LedgerError, match=rf"damaged \(entry {number} cannot be read\); restore") as caught:
            opening(path)
        assert "\n" not in str(caught.value)


def test_an_anchor_with_an_impossible_plan_cannot_be_read(path: Path, tmp_path: Path) -> None:
    """One wrong digit in the anchor's file: refused with the anchor's remedy, not blamed on the study."""
    anchor = tmp_path / "anchor"
    used(path, anchor=anchor)
    plain = json.loads(anchor.read_bytes())
    plain["plans"][0]["plan"] |= IMPOSSIBLE
    anchor.write_text(json.dumps(plain))
    with pytest.raises(RollbackError, match=r"anchor cannot be read \(PlanError\); bring its disk back, or remove"):
        Anchor.read(anchor)
