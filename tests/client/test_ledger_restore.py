"""A ledger that was put back to an older copy is found out, and never trains on what it forgot."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from client.anchor import Anchor
from client.entries import Anchored
from client.ledger import Attempt
from client.ledger_file import accept_restore, read_accounts
from common.errors import BudgetError, LedgerError, RollbackError
from common.privacy.accounting import best_order, epsilon_of, filter_epsilon, rdp_of
from common.privacy.plan import Plan
from tests.client.ledger_cases import (
    CAP,
    DELTA,
    SMALL,
    STUDY,
    WEIGHTS,
    WHOLE,
    one_round,
    opened,
    same_folder_copy,
    used,
)

LATER = "6" * 64
ACCEPT = "--accept-restore"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def anchor(tmp_path: Path) -> Path:
    (tmp_path / "medium").mkdir()
    return tmp_path / "medium" / "anchor"


def put_back(path: Path, copy: Path) -> None:
    """Restore a backup over a closed ledger."""
    shutil.copy(copy, path)


def test_the_anchor_follows_every_entry(path: Path, anchor: Path) -> None:
    """After each call the anchor on the other disk names the head, the count, and every plan that was charged."""
    with opened(path, anchor) as ledger:
        calls = (
            lambda: ledger.admit(STUDY, SMALL),
            lambda: ledger.attempt(STUDY, 1, 1, WEIGHTS),
            lambda: ledger.release(Attempt(STUDY, 1, 1, WEIGHTS), b"update"),
        )
        for call in calls:
            call()
            said = json.loads(anchor.read_text())
            assert (said["head"], said["count"]) == (ledger.head(), ledger.accounts.count)
            assert [plan["study"] for plan in said["plans"]] == [STUDY]
    assert anchor.stat().st_mode & 0o777 == 0o600
    with opened(path, anchor) as ledger:
        assert ledger.head() == said["head"]  # opening again writes nothing


def test_an_older_copy_is_refused(path: Path, anchor: Path) -> None:
    """One entry less than the anchor has seen, or many: the ledger does not open, and says what to do."""
    copies = []
    with opened(path, anchor):
        pass
    for number in range(1, 4):
        copies.append(same_folder_copy(path, f"copy-{number}"))
        with opened(path, anchor) as ledger:
            ledger.admit(STUDY, SMALL)
            ledger.attempt(STUDY, number, 1, WEIGHTS)
    for copy in copies:
        put_back(path, copy)
        with pytest.raises(RollbackError, match=rf"older copy; put the newest one back, or .*{ACCEPT}"):
            opened(path, anchor)


def test_a_crash_between_ledger_and_anchor_is_no_rollback(path: Path, anchor: Path) -> None:
    """An anchor that is one entry behind is brought up to date at opening; two behind is refused."""
    with opened(path, anchor) as ledger:
        ledger.admit(STUDY, SMALL)
        older = []
        for number in (1, 2):
            older.append(anchor.read_bytes())
            ledger.attempt(STUDY, number, 1, WEIGHTS)
        head = ledger.head()
    anchor.write_bytes(older[1])
    with opened(path, anchor) as ledger:
        assert json.loads(anchor.read_text())["head"] == ledger.head() == head
    anchor.write_bytes(older[0])
    with pytest.raises(RollbackError, match=r"2 entries behind.*at most 1 can be"):
        opened(path, anchor)


def test_a_missing_or_foreign_anchor_is_refused(path: Path, anchor: Path) -> None:
    """Once a ledger has an anchor, it opens with that alone: not without, not with another's, not with rubbish."""
    used(path, anchor=anchor)
    mine = anchor.read_bytes()
    anchor.unlink()
    with pytest.raises(RollbackError, match="anchor is missing"):
        opened(path, anchor)
    used(path.with_name("other.db"), anchor=anchor)
    with pytest.raises(RollbackError, match="older copy"):
        opened(path, anchor)
    newer = json.dumps({**json.loads(mine), "version": 2}).encode()
    for rubbish, match in ((b"{", "cannot be read"), (b"[]", "cannot be read"), (b"", "cannot"), (newer, "upgrade")):
        anchor.write_bytes(rubbish)
        with pytest.raises(RollbackError, match=match):
            opened(path, anchor)
    with pytest.raises(LedgerError, match="the site file names none; name it again"):
        opened(path)
    anchor.write_bytes(mine)
    with opened(path, anchor) as ledger:
        assert ledger.steps_taken(STUDY) == 4


def test_an_anchor_may_be_given_later(path: Path, anchor: Path) -> None:
    """A ledger that began without an anchor takes one up, and insists on it from then on."""
    used(path)
    with opened(path, anchor) as ledger:
        assert isinstance(ledger._file.contents.entries[-1], Anchored)
    with pytest.raises(LedgerError, match="names none"):
        opened(path)


def test_nothing_is_trained_while_the_anchors_disk_is_away(path: Path, anchor: Path) -> None:
    """The anchor cannot be written: the call fails, later ones too, and the ledger never runs ahead by two."""
    away = anchor.parent.with_name("away")
    with opened(path, anchor) as ledger:
        ledger.admit(STUDY, SMALL)
        anchor.parent.rename(away)
        for _ in range(3):
            with pytest.raises(LedgerError, match=r"anchor cannot be written.*until its disk is back"):
                ledger.attempt(STUDY, 1, 1, WEIGHTS)
        assert ledger.steps_taken(STUDY) == 1  # the first was marked: it stays spent
        away.rename(anchor.parent)
        assert ledger.attempt(STUDY, 1, 1, WEIGHTS) == Attempt(STUDY, 1, 2, WEIGHTS)
    with opened(path, anchor) as ledger:
        assert ledger.steps_taken(STUDY) == 2


def test_a_link_is_no_anchor(path: Path, anchor: Path) -> None:
    """A link would be replaced by a file on the ledger's own disk: refused."""
    anchor.symlink_to(path.with_name("elsewhere"))
    with pytest.raises(LedgerError, match="symbolic link"):
        opened(path, anchor)


def test_after_a_restore_no_earlier_plan_goes_on(path: Path, anchor: Path) -> None:
    """Once a person accepts the loss, every plan counts as fully spent; what was released is still answered."""
    with opened(path, anchor) as ledger:
        ledger.admit(STUDY, SMALL)
        one_round(ledger, 1, b"one")
    copy = same_folder_copy(path, "copy")
    with opened(path, anchor) as ledger:
        one_round(ledger, 2, b"two")
        open_attempt = ledger.attempt(STUDY, 3, 1, WEIGHTS)
        lost_head = ledger.head()
    put_back(path, copy)
    written = accept_restore(path, CAP, DELTA, anchor=anchor)
    assert (written.lost_head, written.plans, written.cohorts) == (lost_head, (), ())
    with opened(path, anchor) as ledger:
        assert ledger.admit(STUDY, SMALL) == epsilon_of(SMALL)
        assert ledger.attempt(STUDY, 1, 1, WEIGHTS) == b"one"
        for number in (2, 3, 4):
            with pytest.raises(BudgetError, match=r"restored from a backup.*fully spent"):
                ledger.attempt(STUDY, number, 1, WEIGHTS)
        assert isinstance(open_attempt, Attempt)
        with pytest.raises(BudgetError, match="no open attempt"):
            ledger.release(open_attempt, b"late")
        assert ledger.accounts.studies[STUDY].steps_left == ledger.accounts.studies[STUDY].spares_left == 0
        assert not ledger.contains(lost_head)  # the server that saw it is answered ROLLBACK for good
        assert ledger.accounts.restored == 1


def test_after_a_restore_a_new_study_gets_what_is_left(path: Path, anchor: Path) -> None:
    """Plans charged in the lost entries are charged again from the anchor: what is left is what it was."""
    with opened(path, anchor) as ledger:
        ledger.admit(STUDY, SMALL)
    copy = same_folder_copy(path, "copy")
    with opened(path, anchor) as ledger:
        ledger.admit(LATER, SMALL)
        one_round(ledger, 1, b"later", LATER)
    put_back(path, copy)
    assert [plan.study for plan in accept_restore(path, CAP, DELTA, anchor=anchor).plans] == [LATER]
    order = best_order(CAP, DELTA)
    with opened(path, anchor) as ledger:
        assert ledger.accounts.cohorts["all"].plans == [SMALL, SMALL]
        with pytest.raises(BudgetError, match="fully spent"):
            ledger.attempt(LATER, 1, 1, WEIGHTS)
        assert ledger.admit("7" * 64, SMALL) == filter_epsilon([rdp_of(SMALL, order)] * 3, order, DELTA)
        one_round(ledger, 1, b"new", "7" * 64)


def test_a_restored_cohort_may_have_nothing_left(path: Path, anchor: Path) -> None:
    """A lost plan that took the whole cap is charged although the filter would refuse it; then nothing fits."""
    with opened(path, anchor):
        pass
    copy = same_folder_copy(path, "copy")
    with opened(path, anchor) as ledger:
        ledger.admit(STUDY, WHOLE)
    put_back(path, copy)
    accept_restore(path, CAP, DELTA, anchor=anchor, lost={LATER: WHOLE})
    with opened(path, anchor) as ledger:
        assert ledger.accounts.cohorts["all"].spent > CAP
        with pytest.raises(BudgetError, match="left 0"):
            ledger.admit("7" * 64, Plan(0.01, 50.0, 2.0, DELTA, 1))


def test_a_ledger_that_is_gone_is_made_again_from_its_anchor(path: Path, anchor: Path) -> None:
    """No file and no backup: a new ledger is refused by the anchor; accepted, it begins with all that was charged."""
    with opened(path, anchor) as ledger:
        ledger.open_cohort("all", [1])
        ledger.admit(STUDY, SMALL)
        ledger.open_cohort("children", [2])
        ledger.admit(LATER, WHOLE)
    path.unlink()
    for _ in range(2):
        with pytest.raises(RollbackError, match="older copy"):
            opened(path, anchor)
    accept_restore(path, CAP, DELTA, anchor=anchor)
    with opened(path, anchor) as ledger:
        assert {name: c.plans for name, c in ledger.accounts.cohorts.items()} == {"all": [SMALL], "children": [WHOLE]}
        with pytest.raises(BudgetError, match="no list of patients"):
            ledger.open_cohort("all", [1])


def test_without_an_anchor_a_person_names_what_is_lost(path: Path) -> None:
    """Plans that a person names are charged and fully spent; those that the ledger knows are not charged twice."""
    used(path)
    written = accept_restore(path, CAP, DELTA, lost={STUDY: SMALL, LATER: SMALL})
    assert [plan.study for plan in written.plans] == [LATER]
    with opened(path) as ledger:
        assert len(ledger.accounts.cohorts["all"].plans) == 2
        with pytest.raises(BudgetError, match="fully spent"):
            ledger.attempt(LATER, 1, 1, WEIGHTS)


def test_a_lost_study_opens_the_cohort_of_a_new_ledger(path: Path) -> None:
    """Neither file nor anchor: the ledger begins with the named study charged to the site file's budget."""
    accept_restore(path, CAP, DELTA, lost={LATER: SMALL})
    with opened(path) as ledger:
        assert ledger.accounts.cohorts["all"].plans == [SMALL]


def test_a_lost_study_without_noise_is_refused(path: Path) -> None:
    """No epsilon covers a plan without noise: the file stays as it was."""
    used(path)
    before = read_accounts(path)
    with pytest.raises(BudgetError, match="has no noise"):
        accept_restore(path, CAP, DELTA, lost={LATER: replace(SMALL, noise_multiplier=0.0)})
    assert read_accounts(path) == before


def test_a_restore_needs_the_ledger_for_itself(path: Path) -> None:
    """While a client runs, nobody can accept a restore under it."""
    with opened(path), pytest.raises(LedgerError, match="another process writes"):
        accept_restore(path, CAP, DELTA)


def test_an_anchor_can_be_given_up_with_a_restore(path: Path, anchor: Path) -> None:
    """Accepting a restore with another anchor, or none, is how a person parts with a lost one."""
    used(path, anchor=anchor)
    accept_restore(path, CAP, DELTA)
    with opened(path) as ledger:
        assert ledger.accounts.studies[STUDY].forfeited
    other = anchor.with_name("other")
    accept_restore(path, CAP, DELTA, anchor=other)
    with opened(path, other), pytest.raises(LedgerError):
        opened(path)


def test_a_crash_while_the_anchor_is_first_written_leaves_a_ledger_that_opens(path: Path, anchor: Path) -> None:
    """The anchor's file is there before the ledger insists on it: stopped between the two, it opens."""
    used(path)
    accounts, head = read_accounts(path)
    Anchor.of(head, accounts).write(anchor)
    with opened(path, anchor) as ledger:
        assert ledger.accounts.anchored
        assert ledger.steps_taken(STUDY) == 4


def test_a_crash_while_a_restore_is_accepted_is_accepted_again(path: Path, anchor: Path) -> None:
    """Stopped before the anchor is written anew, the ledger still refuses; accepting again is enough."""
    with opened(path, anchor) as ledger:
        ledger.admit(STUDY, SMALL)
    copy = same_folder_copy(path, "copy")
    with opened(path, anchor) as ledger:
        ledger.admit(LATER, SMALL)
    put_back(path, copy)
    before = anchor.read_bytes()
    accept_restore(path, CAP, DELTA, anchor=anchor)
    anchor.write_bytes(before)
    with pytest.raises(RollbackError):
        opened(path, anchor)
    assert accept_restore(path, CAP, DELTA, anchor=anchor).plans == ()
    with opened(path, anchor) as ledger:
        assert ledger.accounts.cohorts["all"].plans == [SMALL, SMALL]
