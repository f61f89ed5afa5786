"""The durable ledger: what it keeps over its own end, who may open it, and what it says when it cannot write."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client import entry_file
from client.accounts import KEPT_ROUNDS
from client.ledger import Attempt
from client.ledger_file import SqliteLedger, read_accounts
from common.errors import BudgetError, LedgerError
from common.privacy.accounting import best_order, epsilon_of, filter_epsilon, rdp_of
from common.privacy.plan import Plan
from tests.client.ledger_cases import CAP, DELTA, SMALL, STUDY, WEIGHTS, WHOLE, one_round, opened, raw, used

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


def test_everything_is_there_after_reopening(path: Path) -> None:
    """Plan, steps, attempts, released bytes, order and head are what they were before the ledger was closed."""
    with opened(path) as ledger:
        stated = ledger.admit(STUDY, SMALL)
        one_round(ledger, 1, b"one")
        ledger.attempt(STUDY, 2, 1, WEIGHTS)
        before, head, order = ledger.accounts, ledger.head(), ledger.order
    with opened(path) as ledger:
        assert (ledger.accounts, ledger.head(), ledger.order) == (before, head, order)
        assert ledger.admit(STUDY, SMALL) == stated == epsilon_of(SMALL)
        assert ledger.attempt(STUDY, 1, 1, WEIGHTS) == b"one"
        assert ledger.attempt(STUDY, 2, 1, WEIGHTS) == Attempt(STUDY, 2, 2, WEIGHTS)
        assert ledger.steps_taken(STUDY) == 3


def test_the_file_alone_is_the_whole_ledger(path: Path, tmp_path: Path) -> None:
    """After each call a copy of `ledger.db` without SQLite's other files holds everything that was answered."""
    alone = tmp_path / "copy.db"
    with opened(path) as ledger:
        ledger.admit(STUDY, SMALL)
        for number in (1, 2):
            one_round(ledger, number, b"update")
            alone.write_bytes(path.read_bytes())
            alone.chmod(0o600)
            assert read_accounts(alone)[1] == ledger.head()


def test_a_killed_attempt_is_paid_from_the_spare_steps_until_they_are_gone(path: Path) -> None:
    """Each opening without a release costs a step; steps and spares gone, nothing more is granted."""
    numbers = []
    with opened(path) as ledger:
        ledger.admit(STUDY, replace(SMALL, steps=1, spare_steps=2))
    for _ in range(3):
        with opened(path) as ledger:
            attempt = ledger.attempt(STUDY, 1, 1, WEIGHTS)
            assert isinstance(attempt, Attempt)
            numbers.append(attempt.number)
    assert numbers == [1, 2, 3]
    with opened(path) as ledger, pytest.raises(BudgetError, match="0 are left of the plan's 3"):
        ledger.attempt(STUDY, 1, 1, WEIGHTS)


def test_the_newest_two_updates_are_kept_and_older_ones_are_not(path: Path) -> None:
    """The file holds the bytes of two releases per study and the digests of all; it does not grow with the bytes."""
    with opened(path) as ledger:
        ledger.admit(STUDY, SMALL)
        ledger.admit("6" * 64, SMALL)
        for number in range(1, 6):
            one_round(ledger, number, b"%d" % number * 50_000)
        one_round(ledger, 1, b"other", "6" * 64)
    with raw(path) as connection:
        kept = [row[0] for row in connection.execute("SELECT bytes FROM attachments ORDER BY number")]
    assert kept == [b"4" * 50_000, b"5" * 50_000, b"other"]
    assert KEPT_ROUNDS == 2
    assert path.stat().st_size < 4 * 50_000
    with opened(path) as ledger:
        assert ledger.attempt(STUDY, 4, 1, WEIGHTS) == b"4" * 50_000
        with pytest.raises(BudgetError, match="no longer kept"):
            ledger.attempt(STUDY, 3, 1, WEIGHTS)


def test_a_second_study_is_priced_by_the_filter_over_a_reopening(path: Path) -> None:
    """A later study on the same cohort costs the Renyi sum with all before it, at the order of the first opening."""
    order = best_order(CAP, DELTA)
    with opened(path) as ledger:
        assert ledger.admit("s0", SMALL) == epsilon_of(SMALL)
    with opened(path) as ledger:
        assert ledger.admit("s1", SMALL) == filter_epsilon([rdp_of(SMALL, order)] * 2, order, DELTA)


def test_a_second_study_that_does_not_fit_is_refused_with_what_is_left(path: Path) -> None:
    """After a plan that took all, a further study is refused, and told what it costs, what is spent and left."""
    with opened(path) as ledger:
        ledger.admit("s0", WHOLE)
    little = Plan(0.01, 50.0, 2.0, DELTA, 1)
    with opened(path) as ledger:
        head = ledger.head()
        with pytest.raises(BudgetError) as caught:
            ledger.admit("s1", little)
        spent = epsilon_of(WHOLE)
        expected = f"this plan {epsilon_of(little):.4g}, spent before {spent:.4g}, left {CAP - spent:.4g}"
        assert expected in str(caught.value)
        assert ledger.head() == head


def test_the_budget_is_for_life(path: Path) -> None:
    """A higher cap or another delta at a later opening is refused; a lower cap binds from then on."""
    with opened(path) as ledger:
        ledger.admit("s0", SMALL)
    for cap, delta in ((CAP + 0.1, DELTA), (CAP, 2e-5), (CAP, 1e-6)):
        with pytest.raises(BudgetError, match=rf"opened for life with epsilon {CAP} at delta {DELTA}"):
            SqliteLedger(path, cap, delta)
    with SqliteLedger(path, 1.1 * epsilon_of(SMALL), DELTA) as ledger:
        ledger.attempt("s0", 1, 1, WEIGHTS)  # what was admitted stays admitted
        with pytest.raises(BudgetError, match="exceeds the cohort's cap"):
            ledger.admit("s1", SMALL)
    with opened(path) as ledger:
        assert ledger.admit("s1", SMALL) < CAP


@pytest.mark.parametrize(("cap", "delta"), [(float("inf"), 1e-5), (float("nan"), 1e-5), (0.0, 1e-5), (3.0, 1.0)])
def test_a_budget_that_is_none_is_refused(path: Path, cap: float, delta: float) -> None:
    """A hospital's cap is a finite number: also the infinite one of simulations is refused."""
    with pytest.raises(BudgetError, match="correct the site file"):
        SqliteLedger(path, cap, delta)


def test_heads_change_with_every_entry_and_stay_known(path: Path) -> None:
    """Every entry has a new head, all of them are known for good, and no other is."""
    with opened(path) as ledger:
        heads = [ledger.head()]
        ledger.admit(STUDY, SMALL)
        heads.append(ledger.head())
        for number in (1, 2, 3):
            one_round(ledger, number, b"")
            heads.append(ledger.head())
    assert len(set(heads)) == 5
    assert all(len(bytes.fromhex(head)) == 32 for head in heads)
    with opened(path) as ledger:
        assert all(ledger.contains(head) for head in ["", *heads])
        assert not ledger.contains("0" * 64)


def test_two_ledgers_of_the_same_calls_have_no_head_in_common(tmp_path: Path) -> None:
    """Heads tell nothing: each entry is salted, so equal histories have unequal heads."""
    hashes = []
    for name in ("one.db", "two.db"):
        with opened(used(tmp_path / name)) as ledger:
            hashes.append(set(ledger._file.contents.hashes))
    assert hashes[0] & hashes[1] == set()


def test_files_are_for_their_owner_alone(path: Path) -> None:
    """Ledger, log and lock are made with mode 0600, whatever the umask."""
    before = os.umask(0)
    try:
        with opened(path) as ledger:
            ledger.admit(STUDY, SMALL)
            modes = {found.name: found.stat().st_mode & 0o777 for found in path.parent.iterdir()}
    finally:
        os.umask(before)
    assert {"ledger.db", "ledger.db-wal", "ledger.db.lock"} <= set(modes)
    assert set(modes.values()) == {0o600}


@pytest.mark.parametrize("name", ["ledger.db", "ledger.db.lock", "ledger.db-wal"])
def test_a_link_is_refused(path: Path, name: str) -> None:
    """A symbolic link in the place of the ledger or of a file beside it is refused, and what it names untouched."""
    other = path.parent / "other"
    path.with_name(name).symlink_to(other)
    with pytest.raises(LedgerError, match="is a symbolic link"):
        opened(path)
    assert not other.exists()


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o606])
def test_a_ledger_that_others_may_read_is_refused(path: Path, mode: int) -> None:
    """A file with rights for group or others is refused with the remedy, for writing and for reading."""
    path.touch()
    path.chmod(mode)
    for opening in (opened, read_accounts):
        with pytest.raises(LedgerError, match=f"mode {mode:o}.*chmod 600"):
            opening(path)


def test_no_folder_no_ledger(tmp_path: Path) -> None:
    """A missing folder, and a folder in the place of the file, are one clear error each."""
    with pytest.raises(LedgerError, match="make the folder"):
        opened(tmp_path / "absent" / "ledger.db")
    (tmp_path / "ledger.db").mkdir()
    with pytest.raises(LedgerError, match="or no file"):
        opened(tmp_path / "ledger.db")
    with pytest.raises(LedgerError, match="no such file"):
        read_accounts(tmp_path / "none.db")


def test_a_second_writer_is_refused_and_a_reader_is_not(path: Path) -> None:
    """While a ledger is open, here or in another process, a second opening is one clear error; reading it works."""
    code = (
        "import sys; from pathlib import Path; from client.ledger_file import SqliteLedger\n"
        "try: SqliteLedger(Path(sys.argv[1]), 3.0, 1e-5)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    with opened(path) as ledger:
        ledger.admit(STUDY, SMALL)
        with pytest.raises(LedgerError, match="another process writes to this ledger; stop it first"):
            opened(path)
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
        )
        assert done.stdout.startswith("LedgerError")
        assert "another process writes to this ledger" in done.stdout
        accounts, head = read_accounts(path)
        assert (accounts, head) == (ledger.accounts, ledger.head())
        ledger.attempt(STUDY, 1, 1, WEIGHTS)  # neither of them took the lock away
    with opened(path) as ledger:
        assert ledger.steps_taken(STUDY) == 1


def test_reading_takes_no_lock_and_writes_nothing(path: Path) -> None:
    """A reader sees one moment of the ledger while the client writes, and leaves the file as it is."""
    with opened(path) as ledger:
        ledger.admit(STUDY, SMALL)
        for number in (1, 2, 3):
            one_round(ledger, number, b"%d" % number)
            assert read_accounts(path)[0] == ledger.accounts
    content = path.read_bytes()
    read_accounts(path)
    assert path.read_bytes() == content


def test_a_newer_version_is_refused(path: Path) -> None:
    """A ledger of a later version says so, and is not touched."""
    used(path)
    with raw(path) as connection:
        connection.execute("PRAGMA user_version = 3")
    for opening in (opened, read_accounts):
        with pytest.raises(LedgerError, match=r"newer version of wardround \(ledger 3, this one knows 2\); upgrade"):
            opening(path)


def test_an_older_version_is_brought_up_to_date(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later version runs its migrations when it opens the file, in one piece, and keeps every entry."""
    used(path)
    monkeypatch.setattr(entry_file, "VERSION", 3)
    monkeypatch.setattr(entry_file, "TABLES", 3)
    steps = {1: "CREATE TABLE one (x); ", 2: "CREATE TABLE two (x); no such statement;"}
    monkeypatch.setattr(entry_file, "MIGRATIONS", steps)
    with pytest.raises(LedgerError, match="older version"):
        read_accounts(path)
    with pytest.raises(LedgerError, match="SQLITE_ERROR"):
        opened(path)
    with raw(path) as connection:
        assert connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'one'").fetchone() == (0,)
    steps[2] = "CREATE TABLE two (x);"
    with opened(path) as ledger:
        assert ledger.steps_taken(STUDY) == 4
    assert read_accounts(path)[0].studies[STUDY].steps_taken == 4


def test_another_programs_file_is_refused(path: Path) -> None:
    """Neither another SQLite file nor anything else is taken for a ledger, or changed."""
    with raw(path) as connection:
        connection.execute("CREATE TABLE t (x)")
    path.chmod(0o600)
    with pytest.raises(LedgerError, match="another program's"):
        opened(path)
    path.write_bytes(b"not a database at all" * 500)
    with pytest.raises(LedgerError, match="no ledger; name the right file"):
        opened(path)


class Failing(sqlite3.Connection):
    """A connection whose next commit is durable, and is then reported as failed."""

    fails = False

    def execute(self, sql: str, parameters: Any = ()) -> sqlite3.Cursor:
        done = super().execute(sql, parameters)
        if Failing.fails and sql == "COMMIT":
            Failing.fails = False
            raise sqlite3.OperationalError("disk I/O error")
        return done


def test_a_full_disk_leaves_nothing_behind(path: Path) -> None:
    """An update that does not fit: one line with the remedy, nothing stored; with space again, it goes on."""
    connections: list[sqlite3.Connection] = []

    def connect(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        connections.append(sqlite3.connect(*args, **kwargs))
        return connections[-1]

    with SqliteLedger(path, CAP, DELTA, connect=connect) as ledger:
        ledger.admit(STUDY, SMALL)
        attempt = ledger.attempt(STUDY, 1, 1, WEIGHTS)
        assert isinstance(attempt, Attempt)
        head = ledger.head()
        connections[0].execute("PRAGMA max_page_count = 20")
        with pytest.raises(LedgerError, match="no space is left, so nothing was written; free some space") as caught:
            ledger.release(attempt, bytes(200_000))
        assert "\n" not in str(caught.value)
        assert ledger.head() == head == read_accounts(path)[1]
        connections[0].execute("PRAGMA max_page_count = 100000")
        ledger.release(attempt, bytes(200_000))
    with opened(path) as ledger:
        assert ledger.attempt(STUDY, 1, 1, WEIGHTS) == bytes(200_000)


def test_a_new_ledger_on_a_full_disk_is_begun_again_later(path: Path) -> None:
    """Where not even the first page fits, the ledger is one clear error, and opens once there is space."""

    def connect(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = sqlite3.connect(*args, **kwargs)
        connection.execute("PRAGMA max_page_count = 2")
        return connection

    with pytest.raises(LedgerError, match="free some space"):
        SqliteLedger(path, CAP, DELTA, connect=connect)
    with opened(path) as ledger:
        assert ledger.admit(STUDY, SMALL) == epsilon_of(SMALL)


def test_a_write_that_failed_but_is_there_stops_the_ledger(path: Path) -> None:
    """A disk that reports failure and has written: nothing more is granted until a new opening has read the truth."""

    def connect(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = sqlite3.connect(*args, factory=Failing, **kwargs)
        return connection

    with SqliteLedger(path, CAP, DELTA, connect=connect) as ledger:
        ledger.admit(STUDY, SMALL)
        Failing.fails = True
        with pytest.raises(LedgerError, match="fails with OperationalError; check the disk"):
            ledger.attempt(STUDY, 1, 1, WEIGHTS)
        for _ in range(2):
            with pytest.raises(LedgerError, match="there after all; the next round reads it anew"):
                ledger.attempt(STUDY, 1, 1, WEIGHTS)
    with opened(path) as ledger:
        assert ledger.steps_taken(STUDY) == 1
        assert ledger.attempt(STUDY, 1, 1, WEIGHTS) == Attempt(STUDY, 1, 2, WEIGHTS)


def test_an_interrupted_call_stops_the_ledger(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after storing and before counting: nothing more is granted until a new opening has counted."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with opened(path) as ledger:
        ledger.admit(STUDY, SMALL)
        with monkeypatch.context() as patched:
            patched.setattr(ledger.accounts, "apply", interrupted)
            with pytest.raises(KeyboardInterrupt):
                ledger.attempt(STUDY, 1, 1, WEIGHTS)
        with pytest.raises(LedgerError, match="interrupted; the next round reads it anew"):
            ledger.attempt(STUDY, 1, 1, WEIGHTS)
    with opened(path) as ledger:
        assert ledger.attempt(STUDY, 1, 1, WEIGHTS) == Attempt(STUDY, 1, 2, WEIGHTS)
