"""One ledger, clients of several studies: each holds it for a round and finds what the others wrote."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from client.accounts import Attempt
from client.ledger_file import SqliteLedger, read_accounts
from common.errors import BudgetError, LedgerError, RollbackError
from common.privacy.accounting import filter_epsilon, rdp_of
from tests.client.ledger_cases import CAP, DELTA, SMALL, WEIGHTS, opened


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


def given_back(path: Path, wait: float = 0.0) -> SqliteLedger:
    """A ledger that was opened, and is held by nobody."""
    with SqliteLedger(path, CAP, DELTA, wait=wait) as ledger:
        return ledger


def released(ledger: SqliteLedger, study: str, round_number: int) -> None:
    """One round, with an update that tells study and round."""
    ledger.admit(study, SMALL)
    attempt = ledger.attempt(study, round_number, 1, WEIGHTS)
    assert isinstance(attempt, Attempt)
    ledger.release(attempt, f"{study} {round_number}".encode())


def test_two_studies_take_turns_on_one_budget(path: Path) -> None:
    """Rounds of two clients interleave: both plans are charged together, each round is stored, heads of both stay."""
    one, two = given_back(path), given_back(path)
    heads = []
    for round_number in (1, 2, 3):
        for ledger, study in ((one, "a"), (two, "b")):
            with ledger.taken_up():
                assert all(ledger.contains(head) for head in heads)
                released(ledger, study, round_number)
                heads.append(ledger.head())
    accounts, head = read_accounts(path)
    assert head == heads[-1]
    assert {study: len(account.released) for study, account in accounts.studies.items()} == {"a": 3, "b": 3}
    cohort = accounts.cohorts["all"]
    assert cohort.spent == filter_epsilon([rdp_of(SMALL, cohort.order)] * 2, cohort.order, DELTA)


def test_a_stored_round_is_answered_after_another_study_wrote(path: Path) -> None:
    """Asked again, a client finds its own bytes, whatever came after them."""
    one, two = given_back(path), given_back(path)
    with one.taken_up():
        released(one, "a", 1)
    with two.taken_up():
        released(two, "b", 1)
    with one.taken_up():
        assert one.attempt("a", 1, 1, WEIGHTS) == b"a 1"


def test_what_another_study_spent_is_not_left(path: Path) -> None:
    """A plan that fitted when the client started is refused when the other study's was charged meanwhile."""
    one, two = given_back(path), given_back(path)
    with one.taken_up():
        for number in range(100):
            try:
                one.admit(f"study {number}", SMALL)
            except BudgetError:
                break
    with two.taken_up(), pytest.raises(BudgetError, match="exceeds the cohort's cap"):
        two.admit("another", SMALL)


def test_a_round_waits_for_the_other_study(path: Path) -> None:
    """While one client trains, the other waits as long as it was told to, and then goes on."""
    one, two = given_back(path), given_back(path, wait=60.0)
    done = threading.Event()

    def second() -> None:
        with two.taken_up():
            released(two, "b", 1)
        done.set()

    with one.taken_up():
        thread = threading.Thread(target=second)
        thread.start()
        released(one, "a", 1)
        assert not done.is_set()
    thread.join(60)
    assert done.is_set()
    assert set(read_accounts(path)[0].studies) == {"a", "b"}


def test_a_ledger_that_stays_held_is_refused(path: Path) -> None:
    """Who may not wait any longer trains nothing, and is told why; the next round tries again."""
    one, two = given_back(path), given_back(path)
    with one.taken_up(), pytest.raises(LedgerError, match="another process writes to this ledger"), two.taken_up():
        pass
    with two.taken_up():
        released(two, "b", 1)


def test_a_ledger_put_back_between_two_rounds_is_refused(path: Path) -> None:
    """An older copy in its place is noticed without an anchor, at every round, until the newest is back."""
    ledger = given_back(path)
    old, new = path.with_name("old"), path.with_name("new")
    shutil.copy(path, old)
    with ledger.taken_up():
        released(ledger, "a", 1)
    shutil.copy(path, new)
    shutil.copy(old, path)
    for _ in range(2):
        with pytest.raises(RollbackError, match="older than it was a round ago"), ledger.taken_up():
            pass
    shutil.copy(new, path)
    with ledger.taken_up():
        assert ledger.attempt("a", 1, 1, WEIGHTS) == b"a 1"


def test_another_cohort_opened_meanwhile_shares_nobody(path: Path) -> None:
    """A cohort that a second client lists between two rounds must not have the first one's patients."""
    with SqliteLedger(path, CAP, DELTA, "adults") as ledger:
        ledger.open_cohort("adults", range(80))
    with pytest.raises(BudgetError, match="1 of the 20 patients are in cohort `adults`"), opened(path) as second:
        second.open_cohort("children", range(79, 99))
    with opened(path) as second:
        second.open_cohort("children", range(80, 99))
    with ledger.taken_up():
        released(ledger, "a", 1)
    accounts, _ = read_accounts(path)
    assert {name: len(c.plans) for name, c in accounts.cohorts.items()} == {"adults": 1, "children": 0}
