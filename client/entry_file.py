"""A chain of entries in one SQLite file: read whole and checked at opening, appended to by one process.

Each append is one transaction, made durable before it returns (write-ahead log, `synchronous = FULL`: SQLite syncs
the log at every commit). A process that dies at any instruction leaves the entries before, or one more.

Decisions a reader would question:

- The writer holds an open transaction on a second file, `<name>.lock`, until it closes. SQLite's own exclusive mode
  would do without that file, but shuts readers out, and `wardround client budget` must read while a round is trained;
  `flock` exists on POSIX alone. The operating system drops the lock with the process, however it ends.
- Nothing else in this process may open the two files, not even to look: POSIX drops a process's locks on a file when
  any of its descriptors is closed.
- Attachments (updates, digests of patients) are rows of their own, named by their sha256 in the entry: so an update
  can be dropped later, and the chain still proves what it was.
- After a failed write the file is compared with what was appended so far before the next one: a full disk leaves
  nothing behind, but a failing one may.
- Each commit is copied from the write-ahead log into the file at once (`wal_checkpoint(TRUNCATE)`): processes are ended
  by a signal, so no orderly end would do it, and a backup of `ledger.db` alone would be an empty ledger. An attempt
  and a release of 0.6 MB then take 50 ms instead of 20 ms. A rollback journal, which keeps everything in one file, too,
  takes 45 ms, and would let a reader block a commit.
- Local disks only: network file systems promise neither locks nor syncs.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from client.durable import check_private, create_private
from client.entries import NEW_IN, SALT_BYTES, START, Entry, PatientsJoined, Released, chained, decode, encode
from common.errors import LedgerError, PlanError

Connect = Callable[..., sqlite3.Connection]

VERSION = 2  # the newest that this program reads
TABLES = 1  # since when the tables are as below; a file is newer only if one of its entries is, see `NEW_IN`
APPLICATION = 0x77726C64  # "wrld": tells our file from any other SQLite file
_SCHEMA = """
BEGIN IMMEDIATE;
CREATE TABLE entries (
    number INTEGER PRIMARY KEY, content BLOB NOT NULL, salt BLOB NOT NULL, hash BLOB NOT NULL
);
CREATE TABLE attachments (number INTEGER PRIMARY KEY REFERENCES entries, bytes BLOB NOT NULL);
PRAGMA application_id = {application};
PRAGMA user_version = {version};
COMMIT;
"""
_NO_BYTES = """
SELECT EXISTS (SELECT 1 FROM entries WHERE typeof(content) || typeof(salt) || typeof(hash) != 'blobblobblob')
    OR EXISTS (SELECT 1 FROM attachments WHERE typeof(bytes) != 'blob')
"""
MIGRATIONS: dict[
    int, str
] = {}  # version below TABLES -> the statements that lead to the next one; all in one transaction


@dataclass(frozen=True)
class Contents:
    """What a ledger's file holds, checked: entries in order, their hashes, and which have an attachment."""

    entries: list[Entry]
    hashes: list[bytes]
    attached: set[int]


class EntryFile:
    """The one writer of a ledger's file; made if absent, with mode 0600.

    Args:
        path: the file. Beside it SQLite keeps `-wal` and `-shm`, and this class `.lock`.
        connect: opens SQLite; tests give one that fails or stops on purpose.
        create: make a ledger where there is none; False refuses a file that is absent or holds no entry.
        wait: seconds that another writer may take until it closes.

    Raises:
        LedgerError: the file is in use, damaged, of a newer version, a link, or readable by others.
    """

    def __init__(
        self, path: Path, connect: Connect = sqlite3.connect, *, create: bool = True, wait: float = 0.0
    ) -> None:
        self.path = path
        self._stale = False
        lock = path.with_name(path.name + ".lock")
        for beside in (path, lock, path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")):
            check_private(beside)
        if not create and not path.exists():
            raise _gone(path)
        with contextlib.ExitStack() as opened:
            create_private(lock)
            opened.enter_context(contextlib.closing(_locked(lock, wait)))
            create_private(path)
            with _as_ledger_error(path):
                # Threads may share the connection: `Site` has them take turns. Autocommit: every transaction is ours.
                self._connection = connect(path, isolation_level=None, check_same_thread=False)
                opened.enter_context(contextlib.closing(self._connection))
                if self._connection.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
                    raise LedgerError(f"{path}: this file system cannot keep a ledger; put the state on a local disk")
                for setting in ("synchronous = FULL", "fullfsync = 1", "foreign_keys = ON"):
                    self._connection.execute(f"PRAGMA {setting}")
                if not create and _version(path, self._connection) == 0:
                    raise _gone(path)
                _bring_up_to_date(path, self._connection)
                self.contents = _read(path, self._connection)
                if not create and not self.contents.entries:
                    raise _gone(path)
            self._into_one_file()
            self._resources = opened.pop_all()

    def append(self, entry: Entry, attachment: bytes | None = None, forget: Sequence[int] = ()) -> None:
        """Add an entry, its attachment, and drop the attachments at positions `forget`: all of it, or nothing.

        Raises:
            LedgerError: it could not be made durable.
        """
        contents, content, salt = self.contents, encode(entry), secrets.token_bytes(SALT_BYTES)
        number = len(contents.entries) + 1
        digest = chained(contents.hashes[-1] if contents.hashes else START, salt, content)
        with _as_ledger_error(self.path), self._whole():
            if self._stale:
                self._compare()
            self._connection.execute("INSERT INTO entries VALUES (?, ?, ?, ?)", (number, content, salt, digest))
            if (needed := NEW_IN.get(type(entry), TABLES)) > _version(self.path, self._connection):
                self._connection.execute(f"PRAGMA user_version = {needed}")  # in the same transaction as the entry
            if attachment is not None:
                self._connection.execute("INSERT INTO attachments VALUES (?, ?)", (number, attachment))
            for position in forget:
                self._connection.execute("DELETE FROM attachments WHERE number = ?", (position,))
        self._into_one_file()
        contents.entries.append(entry)
        contents.hashes.append(digest)
        contents.attached.difference_update(forget)
        if attachment is not None:
            contents.attached.add(number)

    def attachment(self, position: int) -> bytes:
        """The attachment of the entry at `position` (from 1). Raises LedgerError if it is gone."""
        with _as_ledger_error(self.path):
            row = self._connection.execute("SELECT bytes FROM attachments WHERE number = ?", (position,)).fetchone()
        if row is None:
            raise _damaged(self.path, f"the bytes of entry {position} are missing")
        return bytes(row[0])

    def close(self) -> None:
        """Give the file back."""
        self._resources.close()

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """One transaction."""
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            yield
            self._connection.execute("COMMIT")
            self._stale = False
        except BaseException:
            self._stale = True
            with contextlib.suppress(sqlite3.Error):
                self._connection.rollback()
            raise

    def _into_one_file(self) -> None:
        """Copy the log into the file. What cannot be copied now stays in the log, durable, until the next time."""
        with contextlib.suppress(sqlite3.Error):
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _compare(self) -> None:
        row = self._connection.execute("SELECT number, hash FROM entries ORDER BY number DESC LIMIT 1").fetchone()
        if row != ((len(self.contents.hashes), self.contents.hashes[-1]) if self.contents.hashes else None):
            raise LedgerError(f"{self.path}: a write that failed is there after all; the next round reads it anew")


def read_entries(path: Path) -> Contents:
    """What a ledger's file holds, without writing to it and beside a client that does.

    Raises:
        LedgerError: no such file, or as for `EntryFile`.
    """
    if not path.is_file():
        raise LedgerError(f"{path}: no such file; the client makes it when it first runs")
    check_private(path)
    uri = f"file:{quote(str(path.absolute()))}?mode=ro"
    with _as_ledger_error(path), contextlib.closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as connection:
        connection.execute("BEGIN")  # one moment of it, whatever the client appends meanwhile
        version = _version(path, connection)
        if version == 0:  # `_read` has no tables; whoever enrolled is told when the client opens it
            return Contents([], [], set())
        if version < TABLES:
            raise LedgerError(f"{path}: of an older version of wardround; start the client once with this one")
        return _read(path, connection)


def _locked(lock: Path, wait: float) -> sqlite3.Connection:
    """A connection whose open transaction says that this process writes to the ledger."""
    connection = sqlite3.connect(lock, timeout=wait, isolation_level=None, check_same_thread=False)
    try:
        with _as_ledger_error(lock):
            connection.execute("BEGIN EXCLUSIVE")
    except LedgerError:
        connection.close()
        raise
    return connection


def _version(path: Path, connection: sqlite3.Connection) -> int:
    """The file's schema version; 0 for one that nothing was written to."""
    application, version, tables = (
        connection.execute(question).fetchone()[0]
        for question in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
    )
    if tables and application != APPLICATION:
        raise LedgerError(f"{path}: is another program's SQLite file; name the ledger")
    if tables and version < 1:
        raise _damaged(path, "its version is none")
    if version > VERSION:
        raise LedgerError(
            f"{path}: written by a newer version of wardround (ledger {version}, this one knows {VERSION}); upgrade"
        )
    return int(version)


def _bring_up_to_date(path: Path, connection: sqlite3.Connection) -> None:
    version = _version(path, connection)
    if version == 0:
        connection.executescript(_SCHEMA.format(application=APPLICATION, version=TABLES))
        return
    steps = "".join(MIGRATIONS[older] for older in range(version, TABLES))
    if steps:
        connection.executescript(f"BEGIN IMMEDIATE; {steps} PRAGMA user_version = {TABLES}; COMMIT;")


def _read(path: Path, connection: sqlite3.Connection) -> Contents:
    """All entries. Raises LedgerError if a byte of the chain or of an attachment is not what was written."""
    if connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
        raise _damaged(path, "SQLite's own check fails")
    if connection.execute(_NO_BYTES).fetchone()[0]:
        raise _damaged(path, "text where bytes were written")
    contents = Contents([], [], set())
    before = START
    for number, content, salt, digest in connection.execute(
        "SELECT number, content, salt, hash FROM entries ORDER BY number"
    ):
        place = len(contents.entries) + 1
        if number != place or len(salt) != SALT_BYTES or chained(before, salt, content) != digest:
            raise _damaged(path, f"entry {place} is not what was written")
        contents.entries.append(_decoded(path, place, content))
        contents.hashes.append(before := digest)
    for number, attachment in connection.execute("SELECT number, bytes FROM attachments"):
        entry = contents.entries[number - 1] if 1 <= number <= len(contents.entries) else None
        expected = entry.attachment if isinstance(entry, Released | PatientsJoined) else ""
        if hashlib.sha256(attachment).hexdigest() != expected:
            raise _damaged(path, f"the bytes of entry {number} are not what was written")
        contents.attached.add(number)
    return contents


def _decoded(path: Path, number: int, content: bytes) -> Entry:
    try:
        return decode(content)
    except (KeyError, TypeError, ValueError, PlanError):
        raise _damaged(path, f"entry {number} cannot be read") from None


def _gone(path: Path) -> LedgerError:
    return LedgerError(f"{path}: this hospital has enrolled, but its ledger is gone or empty; {_RESTORE}")


def _damaged(path: Path, what: str) -> LedgerError:
    return LedgerError(f"{path}: damaged ({what}); {_RESTORE}")


_RESTORE = "restore the newest backup, then run `wardround client budget SITE.yaml --accept-restore`"
_MEANINGS = {
    sqlite3.SQLITE_BUSY: "another process writes to this ledger; stop it first",
    sqlite3.SQLITE_FULL: "no space is left, so nothing was written; free some space",
    sqlite3.SQLITE_NOTADB: f"this is no ledger; name the right file, or {_RESTORE}",
    sqlite3.SQLITE_CORRUPT: f"damaged; {_RESTORE}",
}


@contextlib.contextmanager
def _as_ledger_error(path: Path) -> Iterator[None]:
    """SQLite's errors as one line that says what to do. Its own words are left out: they may quote the file."""
    try:
        yield
    except sqlite3.Error as error:
        code, name = getattr(error, "sqlite_errorcode", 0), getattr(error, "sqlite_errorname", type(error).__name__)
        unknown = f"SQLite fails with {name}; check the disk and the file's rights, or {_RESTORE}"
        raise LedgerError(f"{path}: {_MEANINGS.get(code & 0xFF, unknown)}") from None
    except UnicodeDecodeError:  # sqlite3 cannot put its own message together where a table's name was damaged
        raise _damaged(path, "its tables cannot be read") from None
