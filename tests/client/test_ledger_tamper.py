"""The ledger's file is what was written, or it does not open."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.entry_file import EntryFile
from client.ledger_file import read_accounts
from common.errors import LedgerError
from tests.client.ledger_cases import SMALL, STUDY, one_round, opened, raw, same_folder_copy, used

SETTINGS = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # each example writes the whole file anew


@pytest.fixture
def path(tmp_path: Path) -> Path:
    used(tmp_path / "ledger.db")
    with opened(tmp_path / "ledger.db") as ledger:
        ledger.open_cohort("all", [1, 2, 3])
    return tmp_path / "ledger.db"


def refused(path: Path, match: str) -> None:
    """Neither the client nor the budget command opens the file."""
    for opening in (opened, read_accounts):
        with pytest.raises(LedgerError, match=match) as caught:
            opening(path)
        assert "\n" not in str(caught.value)


@SETTINGS
@given(data=st.data())
def test_any_changed_byte_of_an_entry_is_found(path: Path, data: st.DataObject) -> None:
    """One changed byte in the content, salt or hash of any entry, or in any attachment: the ledger does not open."""
    copy = same_folder_copy(path, "copy.db")
    with raw(copy) as connection:
        tables = [("entries", "content"), ("entries", "salt"), ("entries", "hash"), ("attachments", "bytes")]
        table, column = data.draw(st.sampled_from(tables))
        rows = connection.execute(f"SELECT number, {column} FROM {table} WHERE length({column}) > 0").fetchall()
        number, value = data.draw(st.sampled_from(rows))
        at, flip = data.draw(st.integers(0, len(value) - 1)), data.draw(st.integers(1, 255))
        changed = value[:at] + bytes([value[at] ^ flip]) + value[at + 1 :]
        connection.execute(f"UPDATE {table} SET {column} = ? WHERE number = ?", (changed, number))
    what = f"entry {number} is not what was written" if table == "entries" else f"bytes of entry {number} are not"
    refused(copy, rf"damaged \({what if table == 'entries' else 'the ' + what}.*restore the newest backup")


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM entries WHERE number = 3",
        "DELETE FROM entries WHERE number = 1",
        "UPDATE entries SET number = 1000 WHERE number = 5",
        "UPDATE entries SET number = -1 WHERE number = 5",
        "UPDATE entries SET salt = x'' WHERE number = 4",
        "UPDATE entries SET content = CAST(content AS TEXT) WHERE number = 4",
        "UPDATE entries SET salt = 'text' WHERE number = 4",
        "UPDATE attachments SET bytes = CAST(bytes AS TEXT) WHERE number = (SELECT min(number) FROM attachments)",
        "INSERT INTO entries SELECT 1000, content, salt, hash FROM entries WHERE number = 3",
        "UPDATE attachments SET number = 5 WHERE number = (SELECT max(number) FROM attachments)",
        "INSERT INTO attachments VALUES (3, x'00')",
        "DELETE FROM attachments WHERE number = (SELECT min(number) FROM attachments)",
        "DELETE FROM attachments WHERE number = (SELECT max(number) FROM attachments)",
    ],
)
def test_entries_cannot_be_dropped_moved_or_added(path: Path, statement: str) -> None:
    """Rows that are removed, renumbered, repeated or given other bytes are found."""
    with raw(path) as connection:
        assert connection.execute(statement).rowcount == 1
    refused(path, "damaged")


DROPPED = "DELETE FROM entries WHERE number = 4; UPDATE entries SET number = number - 1 WHERE number > 4;"
EXCHANGED = """
UPDATE entries SET number = 1000 WHERE number = 4;
UPDATE entries SET number = 4 WHERE number = 5;
UPDATE entries SET number = 5 WHERE number = 1000;
"""
REPEATED = """
UPDATE entries SET (content, salt, hash) = (SELECT content, salt, hash FROM entries WHERE number = 5) WHERE number = 7;
"""


@pytest.mark.parametrize("statements", [DROPPED, EXCHANGED, REPEATED], ids=["dropped", "exchanged", "repeated"])
def test_each_entry_vouches_for_all_before_it(tmp_path: Path, statements: str) -> None:
    """Whole entries, each with its own salt and hash, in another order or number: the chain does not close."""
    path = used(tmp_path / "ledger.db")
    with raw(path) as connection:
        connection.execute("DELETE FROM attachments")
        connection.executescript(statements)
    refused(path, r"damaged \(entry [457] is not what was written\)")


@pytest.mark.parametrize("statement", ["DROP TABLE attachments", "ALTER TABLE entries RENAME COLUMN salt TO pepper"])
def test_a_changed_schema_is_refused(path: Path, statement: str) -> None:
    """A file whose tables are not ours any more is refused in one line."""
    with raw(path) as connection:
        connection.execute(statement)
    refused(path, "SQLite fails with SQLITE_ERROR")


@SETTINGS
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_any_changed_byte_of_the_file_is_found_or_means_nothing(path: Path, place: float, flip: int) -> None:
    """A byte of the file changed, wherever: it opens with the very same entries, or is refused in one line."""
    with opened(path) as ledger:
        before, head = ledger.accounts, ledger.head()
    copy = same_folder_copy(path, "copy.db")
    content = bytearray(copy.read_bytes())
    content[int(place * len(content))] ^= flip
    copy.write_bytes(content)
    for beside in ("copy.db-wal", "copy.db-shm"):
        path.with_name(beside).unlink(missing_ok=True)
    try:
        with opened(copy) as ledger:
            assert (ledger.accounts, ledger.head()) == (before, head)
    except LedgerError as error:
        assert "\n" not in str(error)  # noqa: PT017 (refusing is one of two right answers)


def test_a_log_cut_off_anywhere_is_a_shorter_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut may lose of the write-ahead log loses whole entries from the end, and nothing else."""
    path = tmp_path / "ledger.db"
    monkeypatch.setattr(EntryFile, "_into_one_file", lambda _self: None)  # the power goes before the log is folded in
    with opened(path) as ledger:
        ledger.admit(STUDY, SMALL)
        for number in (1, 2, 3):
            one_round(ledger, number, os.urandom(3000))
        hashes = list(ledger._file.contents.hashes)
        content, log = path.read_bytes(), (tmp_path / "ledger.db-wal").read_bytes()
    found = set()
    cut, beside = tmp_path / "cut.db", tmp_path / "cut.db-wal"
    for keep in sorted({*range(0, len(log), len(log) // 97), len(log)}):
        (tmp_path / "cut.db-shm").unlink(missing_ok=True)
        for file, what in ((cut, content), (beside, log[:keep])):
            file.write_bytes(what)
            file.chmod(0o600)
        entries = EntryFile(cut)
        found.add(len(entries.contents.hashes))
        assert entries.contents.hashes == hashes[: len(entries.contents.hashes)]
        entries.close()
    assert found == set(range(len(hashes) + 1))
