"""Plans and durable ledgers that several tests share."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from client.entries import Released
from client.ledger import Attempt
from client.ledger_file import SqliteLedger
from common.privacy.accounting import noise_multiplier_for
from common.privacy.plan import Plan

CAP, DELTA = 3.0, 1e-5
WHOLE = Plan(0.25, noise_multiplier_for(CAP, DELTA, 0.25, 44), 2.0, DELTA, 40, 4)  # costs the cap, to the last digit
SMALL = Plan(0.1, 4.0, 2.0, DELTA, 10, 3)
STUDY = "5" * 64
WEIGHTS = "a" * 64
UNSYNCED = "/dev/shm" if os.path.isdir("/dev/shm") else None  # for tests that a disk's syncing adds nothing to


def opened(path: Path, anchor: Path | None = None) -> SqliteLedger:
    """The ledger at `path`, with the budget of all tests."""
    return SqliteLedger(path, CAP, DELTA, anchor=anchor)


def one_round(ledger: SqliteLedger, round_number: int, update: bytes, study: str = STUDY) -> None:
    """Mark an attempt that must be granted, and release it."""
    attempt = ledger.attempt(study, round_number, 1, WEIGHTS)
    assert isinstance(attempt, Attempt)
    ledger.release(attempt, update)


def used(path: Path, rounds: int = 3, anchor: Path | None = None) -> Path:
    """A closed ledger with one study and some released rounds; an attempt beyond them is open."""
    with opened(path, anchor) as ledger:
        ledger.admit(STUDY, SMALL)
        for number in range(1, rounds + 1):
            one_round(ledger, number, b"update %d" % number)
        ledger.attempt(STUDY, rounds + 1, 1, WEIGHTS)
    return path


def releases(ledger: SqliteLedger) -> list[Released]:
    """The entries of released rounds, oldest first."""
    return [entry for entry in ledger._file.contents.entries if isinstance(entry, Released)]


@contextmanager
def raw(path: Path) -> Iterator[sqlite3.Connection]:
    """The file as any SQLite program sees it; what was changed is committed."""
    connection = sqlite3.connect(path)
    try:
        yield connection
        connection.commit()
    finally:
        connection.close()


def same_folder_copy(path: Path, name: str) -> Path:
    """A closed ledger's file, copied as a backup would."""
    copy = path.with_name(name)
    copy.write_bytes(path.read_bytes())
    os.chmod(copy, 0o600)
    return copy
