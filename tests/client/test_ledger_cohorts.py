"""A patient has one budget: cohorts of one ledger share nobody, and that is proved without storing an id."""

from __future__ import annotations

import math
from pathlib import Path
from typing import SupportsIndex

import numpy as np
import pytest

from client.entries import PatientsJoined
from client.ledger_file import SqliteLedger
from common.errors import BudgetError
from common.privacy.accounting import epsilon_of
from tests.client.ledger_cases import CAP, DELTA, SMALL, STUDY, WEIGHTS, opened


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


def test_one_cohort_needs_no_list(path: Path) -> None:
    """Who has one cohort gives neither a name nor patients."""
    with opened(path) as ledger:
        assert ledger.admit(STUDY, SMALL) == epsilon_of(SMALL)
        assert list(ledger.accounts.cohorts) == ["all"]


def test_a_second_cohort_has_a_budget_of_its_own(path: Path) -> None:
    """Disjoint patients: each cohort is charged alone, so an only plan of each is priced by PLD."""
    with opened(path) as ledger:
        ledger.open_cohort("all", range(100))
        ledger.admit("s0", SMALL)
        ledger.open_cohort("children", range(100, 150))
        assert ledger.admit("s1", SMALL) == epsilon_of(SMALL)
        assert {name: c.plans for name, c in ledger.accounts.cohorts.items()} == {"all": [SMALL], "children": [SMALL]}


def test_a_patient_in_two_cohorts_is_refused_by_count(path: Path) -> None:
    """Shared patients: a second cohort is refused, told how many and never who, and nothing is written."""
    with opened(path) as ledger:
        ledger.open_cohort("all", [f"PATIENT-{n}" for n in range(100)])
        head = ledger.head()
        with pytest.raises(BudgetError) as caught:
            ledger.open_cohort("children", [f"PATIENT-{n}" for n in range(97, 120)])
        assert "3 of the 23 patients are in cohort `all`; a patient has one budget" in str(caught.value)
        assert "PATIENT" not in str(caught.value)
        assert (ledger.head(), ledger.cohort, list(ledger.accounts.cohorts)) == (head, "all", ["all"])


def test_new_patients_join_the_cohort_they_are_shown_with(path: Path) -> None:
    """A hospital grows: new patients share their cohort's budget, and count for disjointness from then on."""
    for patients in (range(10), range(5, 20), range(0)):
        with opened(path) as ledger:
            ledger.open_cohort("all", patients)
            ledger.admit(STUDY, SMALL)
    with opened(path) as ledger:
        assert ledger.accounts.cohorts["all"].plans == [SMALL]
        lists = [entry for entry in ledger._file.contents.entries if isinstance(entry, PatientsJoined)]
        assert [entry.count for entry in lists] == [10, 10, 0]  # each is listed once
        for patient in (0, 7, 19):  # who has left is still one of them
            with pytest.raises(BudgetError, match="1 of the 1 patients"):
                ledger.open_cohort("new", [patient])
        ledger.open_cohort("new", [20])
        with pytest.raises(BudgetError, match="1 of the 2 patients are in cohort `new`"):
            ledger.open_cohort("all", [19, 20])


def test_a_second_cohort_needs_the_list_of_the_first(path: Path) -> None:
    """Without a list of the first cohort's patients nobody can tell who is in both: refused, until it is shown."""
    with opened(path) as ledger:
        with pytest.raises(BudgetError, match=r"cohort `all` has no list of patients.*open it with its patients first"):
            ledger.open_cohort("children", [1])
        ledger.open_cohort("all", [])
        ledger.open_cohort("children", [1])


def test_with_two_cohorts_nothing_is_charged_before_the_patients_are_shown(path: Path) -> None:
    """Each opening of a ledger with several cohorts must show the patients: they may have grown into another's."""
    with opened(path) as ledger:
        ledger.open_cohort("all", [1, 2])
        ledger.admit(STUDY, SMALL)
        ledger.open_cohort("children", [3])
    with opened(path) as ledger:
        for refused in (lambda: ledger.admit(STUDY, SMALL), lambda: ledger.attempt(STUDY, 1, 1, WEIGHTS)):
            with pytest.raises(BudgetError, match="open this one with its patients"):
                refused()
        ledger.open_cohort("all", [1, 2, 4])
        ledger.attempt(STUDY, 1, 1, WEIGHTS)


def test_a_cohort_that_was_never_opened_is_not_charged(path: Path) -> None:
    """Another name at opening is no new budget: it must be opened with its patients."""
    with opened(path):
        pass
    with (
        SqliteLedger(path, CAP, DELTA, cohort="children") as ledger,
        pytest.raises(BudgetError, match="cohort `children` is not open"),
    ):
        ledger.admit(STUDY, SMALL)


def test_a_study_is_charged_to_one_cohort(path: Path) -> None:
    """The same study for a second cohort of the same ledger is refused."""
    with opened(path) as ledger:
        ledger.open_cohort("all", [1])
        ledger.admit(STUDY, SMALL)
        ledger.open_cohort("children", [2])
        with pytest.raises(BudgetError, match="admitted for cohort `all`, not `children`"):
            ledger.admit(STUDY, SMALL)


def test_an_infinite_cap_opens_no_second_cohort(path: Path) -> None:
    """The cap of a later cohort is a finite number too."""
    with opened(path) as ledger:
        ledger.open_cohort("all", [1])
        ledger.cap = math.inf
        with pytest.raises(BudgetError, match="must be finite"):
            ledger.open_cohort("children", [2])


def test_ids_are_the_same_patient_however_they_are_typed(path: Path) -> None:
    """A number, numpy's number and its text are one patient."""
    with opened(path) as ledger:
        ledger.open_cohort("all", np.array([4711, 4712], np.int64))
        ids: tuple[str | SupportsIndex, ...] = (4711, "4711", np.int64(4711))
        for same in ids:
            with pytest.raises(BudgetError, match="1 of the 1 patients"):
                ledger.open_cohort("children", [same])
        with pytest.raises(TypeError):
            ledger.open_cohort("children", np.array([4711.0]))


def test_no_id_is_stored(path: Path) -> None:
    """The file holds digests under a key of its own: no id, and not the same digest as in another ledger."""
    attachments = []
    for name in ("one.db", "two.db"):
        with opened(path.with_name(name)) as ledger:
            ledger.open_cohort("all", ["PATIENT-4711"])
            attachments.append(ledger._attachment(ledger.accounts.cohorts["all"].patients[0]))
        assert b"PATIENT" not in path.with_name(name).read_bytes()
    assert len(attachments[0]) == len(attachments[1]) == 32
    assert attachments[0] != attachments[1]


def test_each_opening_has_a_new_head_whether_or_not_somebody_joined(path: Path) -> None:
    """What a server sees of a restart is a new head: it cannot tell whether the cohort grew."""
    counts = []
    for patients in ([1, 2], [1, 2], [1, 2, 3]):
        with opened(path) as ledger:
            before = ledger.accounts.count
            ledger.open_cohort("all", patients)
            counts.append(ledger.accounts.count - before)
    assert counts == [1, 1, 1]
