"""Which ledger a hospital charges: one for life, in its state folder or shared, and whose budget in it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from client.hospital import Hospital
from client.ledger_file import SqliteLedger, read_accounts
from client.state import LEDGER
from common.errors import LedgerError, WardroundError
from tests.client.enrolling import Place, command


def test_one_ledger_is_one_budget(place: Place) -> None:
    """Making a key and enrolling both say that a second ledger would be a second budget, and how to name the first."""
    said = place.enrol()
    place.rewrite(state="fresh")
    for words in (said, command("keygen", str(place.path))):
        assert "a second ledger for the same patients would be a second budget" in words
        assert "(`ledger: " in words


def test_enrolling_says_which_ledger_is_charged(place: Place) -> None:
    """The line shows the file, whether it is new, and what is left: a wrong path is seen before the yes."""
    place.rewrite(policy={"max_epsilon": 9.0, "delta": 1e-5})
    assert f"ok  budget        {place.state / LEDGER}: a new ledger, 0 plan(s) charged, 9 left" in place.enrol()
    with SqliteLedger(place.state / LEDGER, 9.0, 1e-5) as ledger:
        ledger.admit("e" * 64, replace(place.study.plan(), noise_multiplier=50.0))
    assert re.search(rf"{place.state / LEDGER}: 1 plan\(s\) charged, 8\.\d+ left", place.enrol())


def test_leaving_does_not_forget_the_ledger(place: Place) -> None:
    """A ledger that went missing after leaving is missed at the next enrolment: leaving is no way to a new budget."""
    place.enrol()
    command("leave", str(place.path), "--yes")
    (place.state / LEDGER).unlink()
    with pytest.raises(LedgerError, match="its ledger is gone; restore the newest backup"):
        place.enrol()
    assert not (place.state / LEDGER).exists()


@pytest.mark.parametrize("later", ["elsewhere.db", None])
def test_a_state_folder_charges_one_ledger_for_life(place: Place, later: str | None) -> None:
    """Naming another ledger afterwards is refused, at enrolment and when the site opens, also after leaving."""
    place.rewrite(ledger="shared.db" if later is None else None)
    place.enrol()
    place.rewrite(ledger=later)
    for act in (place.enrol, lambda: Hospital.open(place.path)):
        with pytest.raises(WardroundError, match="another ledger would be another budget for the same patients"):
            act()
    place.rewrite(ledger="shared.db" if later is None else None)
    command("leave", str(place.path), "--yes")
    place.rewrite(ledger=later)
    with pytest.raises(WardroundError, match="another ledger would be another budget"):
        place.enrol()


def test_a_named_cohort_is_listed_and_shares_nobody(place: Place) -> None:
    """`cohort:` lists its patients at enrolment and at each opening; another cohort with one of them is refused."""
    place.rewrite(cohort="adults")
    place.enrol()
    Hospital.open(place.path)
    accounts, _ = read_accounts(place.state / LEDGER)
    assert list(accounts.cohorts) == ["adults"]
    assert len(accounts.cohorts["adults"].patients) == 2
    place.rewrite(cohort="elderly")
    for act in (place.enrol, lambda: Hospital.open(place.path)):
        with pytest.raises(WardroundError, match="80 of the 80 patients are in cohort `adults`"):
            act()
    place.rewrite(cohort=None)
    with pytest.raises(WardroundError, match="holds the cohorts adults; write in the site file, as `cohort`"):
        place.enrol()
