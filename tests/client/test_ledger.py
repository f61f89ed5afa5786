"""The ledger: what it admits, what it refuses, and that no order of calls overspends it."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import pytest

from client.accounts import Accounts
from client.entries import (
    KINDS,
    Admitted,
    Anchored,
    Attempted,
    CohortOpened,
    Disclosed,
    LedgerOpened,
    PatientsJoined,
    Released,
    Restored,
    decode,
    encode,
)
from client.ledger import Attempt, MemoryLedger
from common.errors import BudgetError
from common.privacy.accounting import (
    best_order,
    epsilon_of,
    filter_epsilon,
    rdp_of,
)
from common.privacy.plan import Plan
from tests.client.ledger_cases import CAP, DELTA, SMALL, WHOLE


def opened(*plans: Plan, cap: float = CAP) -> MemoryLedger:
    """A ledger with plans admitted as studies s0, s1, ..."""
    ledger = MemoryLedger(cap, DELTA)
    for number, plan in enumerate(plans):
        ledger.admit(f"s{number}", plan)
    return ledger


def marked(ledger: MemoryLedger, round_number: int, steps: int = 1, weights: str = "w") -> Attempt:
    """An attempt at a round of s0 that must be granted."""
    attempt = ledger.attempt("s0", round_number, steps, weights)
    assert isinstance(attempt, Attempt)
    return attempt


def test_an_only_plan_is_priced_by_pld_up_to_the_cap() -> None:
    """A first plan is admitted at its PLD epsilon, also where the Renyi filter would refuse it."""
    ledger = opened()
    assert ledger.admit("s0", WHOLE) == epsilon_of(WHOLE) <= CAP
    assert filter_epsilon([rdp_of(WHOLE, ledger.order)], ledger.order, DELTA) > CAP


def test_an_only_plan_above_the_cap_is_refused() -> None:
    """A first plan whose price exceeds the cap by little is refused; asked, spent and cap are named."""
    dearer = replace(WHOLE, noise_multiplier=round(WHOLE.noise_multiplier - 0.01, 4))
    with pytest.raises(BudgetError) as caught:
        opened(dearer)
    for part in (f"{epsilon_of(dearer):.4g}", "spent before 0", "left 3)", "cap 3.0", "take a smaller epsilon"):
        assert part in str(caught.value)


def test_a_second_plan_is_admitted_by_the_filter() -> None:
    """Several plans are charged the Renyi sum at the order stored at opening; that is what is stated."""
    ledger = opened(SMALL)
    order = best_order(CAP, DELTA)
    stated = ledger.admit("s1", SMALL)
    assert stated == filter_epsilon([rdp_of(SMALL, order)] * 2, order, DELTA) <= CAP
    assert stated > epsilon_of(replace(SMALL, steps=20, spare_steps=6))


def test_a_plan_after_a_whole_budget_is_refused() -> None:
    """When the first plan took the cap, nothing more fits, however little: it was admitted as the only one."""
    ledger = opened(WHOLE)
    little = Plan(0.01, 50.0, 2.0, DELTA, 1)
    with pytest.raises(BudgetError) as caught:
        ledger.admit("s1", little)
    assert f"spent before {epsilon_of(WHOLE):.4g}, left {CAP - epsilon_of(WHOLE):.4g}" in str(caught.value)
    assert f"this plan {epsilon_of(little):.4g}" in str(caught.value)
    with pytest.raises(BudgetError, match="not admitted"):
        ledger.attempt("s1", 1, 1, "w")


def test_a_refused_plan_leaves_no_trace() -> None:
    """What was refused is not charged: a smaller plan of the same study may still be admitted."""
    ledger = opened(SMALL)
    with pytest.raises(BudgetError):
        ledger.admit("s1", WHOLE)
    assert ledger.admit("s1", SMALL) < CAP


def test_plans_are_admitted_until_the_cap_is_reached_and_not_beyond() -> None:
    """Equal plans are admitted one after another while the filter allows; their PLD epsilon stays under the cap."""
    ledger = opened()
    admitted = 0
    while filter_epsilon([rdp_of(SMALL, ledger.order)] * (admitted + 1), ledger.order, DELTA) <= CAP:
        ledger.admit(f"s{admitted}", SMALL)
        admitted += 1
    with pytest.raises(BudgetError):
        ledger.admit(f"s{admitted}", SMALL)
    assert admitted > 3
    assert epsilon_of(replace(SMALL, steps=13 * admitted, spare_steps=0)) <= CAP


def test_a_study_is_charged_once() -> None:
    """Admitting the same study with the same plan again costs nothing and states the same epsilon."""
    ledger = opened(SMALL)
    first = ledger.admit("s0", SMALL)
    ledger.admit("s1", SMALL)
    assert ledger.admit("s0", SMALL) == first
    assert ledger.admit("s1", SMALL) == opened(SMALL).admit("s1", SMALL)


@pytest.mark.parametrize(
    "other",
    [
        replace(SMALL, steps=11),
        replace(SMALL, spare_steps=4),
        replace(SMALL, noise_multiplier=5.0),
        replace(SMALL, sampling_rate=0.05),
        replace(SMALL, clip=3.0),
    ],
)
def test_another_plan_for_an_admitted_study_is_refused(other: Plan) -> None:
    """A plan is fixed before its first step: any change is refused, a cheaper one too, and the first stays."""
    ledger = opened(SMALL)
    with pytest.raises(BudgetError, match="another plan"):
        ledger.admit("s0", other)
    assert ledger.admit("s0", SMALL) == epsilon_of(SMALL)


def test_a_larger_delta_than_the_cohorts_is_refused() -> None:
    """The budget is (cap, delta): a plan with a larger delta does not fit, one with a smaller does."""
    ledger = opened()
    with pytest.raises(BudgetError, match=r"delta 2e-05 exceeds the cohort's 1e-05; lower"):
        ledger.admit("s0", replace(SMALL, delta=2e-5))
    assert ledger.admit("s0", replace(SMALL, delta=1e-6)) > epsilon_of(SMALL)


@pytest.mark.parametrize(
    ("cap", "delta"),
    [(math.nan, 1e-5), (0.0, 1e-5), (-1.0, 1e-5), (3.0, 0.0), (3.0, 1.0), (3.0, math.nan), (3.0, -1e-5)],
)
def test_a_budget_that_is_none_is_refused(cap: float, delta: float) -> None:
    """A cohort opens only with a positive cap and a delta in (0, 1): NaN would compare with nothing, and admit all."""
    with pytest.raises(BudgetError, match="correct the site file"):
        MemoryLedger(cap, delta)


def test_a_plan_without_noise_needs_an_infinite_cap() -> None:
    """No finite cap admits a plan without noise, first or later; an infinite one, for simulations, does."""
    bare = Plan(0.25, 0.0, 2.0, DELTA, 10)
    with pytest.raises(BudgetError):
        opened(bare, cap=1e300)
    with pytest.raises(BudgetError):
        opened(SMALL, bare, cap=1e300)
    assert opened(cap=math.inf).admit("s0", bare) == math.inf
    assert opened(SMALL, cap=math.inf).admit("s1", bare) == math.inf


def test_the_order_does_not_move() -> None:
    """The filter's order is fixed at opening by cap and delta: no plan, attempt or release changes it."""
    ledger = opened()
    order = ledger.order
    assert order == best_order(CAP, DELTA)
    ledger.admit("s0", SMALL)
    ledger.release(marked(ledger, 1), b"update")
    ledger.admit("s1", SMALL)
    assert ledger.order == order


def test_an_attempt_needs_an_admitted_study() -> None:
    """No private step before the plan is charged."""
    with pytest.raises(BudgetError, match="not admitted"):
        opened().attempt("s0", 1, 1, "w")


def test_attempts_stop_at_the_priced_steps() -> None:
    """Steps are granted up to steps + spare steps and not one more; the refusal names what is left."""
    ledger = opened(SMALL)
    for number in range(1, 12):
        marked(ledger, number)
    with pytest.raises(BudgetError, match="an attempt of 3 steps: 2 are left of the plan's 13"):
        ledger.attempt("s0", 12, 3, "w")
    marked(ledger, 12, steps=2)
    with pytest.raises(BudgetError, match="0 are left"):
        ledger.attempt("s0", 13, 1, "w")
    assert ledger.steps_taken("s0") == 13
    assert ledger.steps_taken("s1") == 0


@pytest.mark.parametrize("steps", [0, -1, -100])
def test_an_attempt_has_at_least_one_step(steps: int) -> None:
    """Nothing gives steps back: an attempt of no or negative steps is refused."""
    ledger = opened(SMALL)
    with pytest.raises(BudgetError):
        ledger.attempt("s0", 1, steps, "w")
    assert ledger.steps_taken("s0") == 0


def test_a_retry_is_a_new_attempt_from_the_spare_steps() -> None:
    """A round whose update was not stored may be tried again, counted up, paid again, also on other weights."""
    ledger = opened(SMALL)
    assert marked(ledger, 1) == Attempt("s0", 1, 1, "w")
    assert marked(ledger, 1) == Attempt("s0", 1, 2, "w")
    assert marked(ledger, 1, weights="other") == Attempt("s0", 1, 3, "other")
    assert marked(ledger, 2).number == 1
    assert ledger.steps_taken("s0") == 4


def test_a_released_round_is_answered_with_its_bytes() -> None:
    """The same round with the same weights gets the stored bytes, free, as often as it is asked."""
    ledger = opened(SMALL)
    ledger.release(marked(ledger, 1), b"update")
    for _ in range(50):
        assert ledger.attempt("s0", 1, 1, "w") == b"update"
    assert ledger.steps_taken("s0") == 1
    ledger.release(marked(ledger, 2), b"")
    assert ledger.attempt("s0", 2, 1, "w") == b""  # empty bytes are bytes


def test_a_released_round_is_refused_on_other_weights() -> None:
    """Training a released round on other weights would be a second answer: refused, nothing spent."""
    ledger = opened(SMALL)
    ledger.release(marked(ledger, 1), b"update")
    with pytest.raises(BudgetError, match="round 1 was released for other weights"):
        ledger.attempt("s0", 1, 1, "other")
    assert ledger.attempt("s0", 1, 1, "w") == b"update"


def test_an_older_released_round_is_never_trained_again() -> None:
    """Only the newest two updates are kept; an older round is refused, not trained."""
    ledger = opened(SMALL)
    for number in (1, 2, 3):
        ledger.release(marked(ledger, number), b"%d" % number)
    with pytest.raises(BudgetError, match="round 1 was released and its update is no longer kept"):
        ledger.attempt("s0", 1, 1, "w")
    assert ledger.attempt("s0", 2, 1, "w") == b"2"
    assert ledger.attempt("s0", 3, 1, "w") == b"3"


def test_only_the_open_attempt_is_released() -> None:
    """An update of an attempt that is unknown, replaced, already released or of another study is refused."""
    ledger = opened(SMALL, SMALL)
    first = marked(ledger, 1)
    second = marked(ledger, 1)
    for wrong in (
        first,
        replace(second, number=3),
        replace(second, round_number=2),
        replace(second, study="s1"),
        replace(second, study="s2"),
        replace(second, weights_digest="other"),
    ):
        with pytest.raises(BudgetError, match="no open attempt"):
            ledger.release(wrong, b"wrong")
    ledger.release(second, b"right")
    with pytest.raises(BudgetError, match="no open attempt"):
        ledger.release(second, b"again")
    assert ledger.attempt("s0", 1, 1, "w") == b"right"


def test_a_refused_call_changes_nothing() -> None:
    """After any refusal the open attempt can still be released and the count of steps is as before."""
    ledger = opened(SMALL)
    attempt = marked(ledger, 1, steps=10)
    for refused in (
        lambda: ledger.attempt("s0", 2, 4, "w"),
        lambda: ledger.attempt("s9", 1, 1, "w"),
        lambda: ledger.admit("s1", WHOLE),
        lambda: ledger.admit("s0", WHOLE),
        lambda: ledger.release(replace(attempt, number=2), b""),
    ):
        with pytest.raises(BudgetError):
            refused()
    assert ledger.steps_taken("s0") == 10
    ledger.release(attempt, b"update")


def test_studies_do_not_share_rounds_or_steps() -> None:
    """Two studies of one cohort have rounds, attempts and steps of their own."""
    ledger = opened(SMALL, SMALL)
    one = ledger.attempt("s0", 1, 5, "w")
    two = ledger.attempt("s1", 1, 2, "w")
    assert isinstance(one, Attempt)
    assert isinstance(two, Attempt)
    ledger.release(two, b"two")
    ledger.release(one, b"one")
    assert (ledger.attempt("s0", 1, 5, "w"), ledger.attempt("s1", 1, 2, "w")) == (b"one", b"two")
    assert (ledger.steps_taken("s0"), ledger.steps_taken("s1")) == (5, 2)


def test_it_survives_pickling() -> None:
    """A simulation may carry a ledger to another process: accounts, open attempt and order go with it."""
    ledger = opened(SMALL)
    attempt = marked(ledger, 1)
    copy = pickle.loads(pickle.dumps(ledger))
    assert copy == ledger
    assert copy.order == ledger.order
    copy.release(attempt, b"update")
    assert copy.attempt("s0", 1, 1, "w") == b"update"


def test_spare_steps_are_used_by_failed_attempts_alone() -> None:
    """What is shown as spare steps left counts neither released attempts nor the one that is under way."""
    ledger = opened(SMALL)
    account = ledger.accounts.studies["s0"]
    ledger.release(marked(ledger, 1), b"")
    assert account.spares_left == 3
    marked(ledger, 2)
    assert account.spares_left == 3
    marked(ledger, 2)
    assert account.spares_left == 2
    marked(ledger, 3, steps=9)
    assert (account.steps_left, account.spares_left) == (1, 1)


def test_the_accounts_are_what_the_entries_add_up_to() -> None:
    """Nothing but the entries counts: replayed one after the other, they give the same accounts."""
    ledger = opened(SMALL, SMALL)
    for number in (1, 2, 3):
        marked(ledger, number)
        ledger.release(marked(ledger, number), b"%d" % number)
    marked(ledger, 4)
    again = Accounts()
    for entry in ledger.entries:
        again.apply(entry)
    assert again == ledger.accounts


def test_every_entry_reads_back_as_it_was_written() -> None:
    """An entry and its bytes say the same, to the last digit of every float."""
    opening = CohortOpened("all", 0.1 + 0.2, 1e-5, 8.0)
    charge = Admitted("all", "s" * 64, SMALL, 1 / 3)
    entries = (
        LedgerOpened("ab" * 32),
        opening,
        PatientsJoined("all", 3, "cd" * 32),
        charge,
        Attempted("s" * 64, 1, 2, 1, "w"),
        Released("s" * 64, 1, 2, "ef" * 32),
        Anchored(),
        Restored("", 0, (opening,), (charge,), True),
        Disclosed("patients", "01" * 32),
    )
    assert {type(entry) for entry in entries} == set(KINDS.values())
    assert [decode(encode(entry)) for entry in entries] == list(entries)
    with pytest.raises(ValueError, match="JSON"):
        encode(replace(opening, cap=math.inf))


def test_a_ledger_in_memory_has_no_head() -> None:
    """A simulated server has nothing to compare with: no head is sent, and none is known."""
    ledger = opened(SMALL)
    assert ledger.head() == ""
    assert ledger.contains("")
    assert not ledger.contains("0" * 64)
