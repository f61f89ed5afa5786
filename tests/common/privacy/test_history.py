"""What a history of different steps costs: against a slow exact composition, closed forms, and what must not matter."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import dp_accounting as dp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import norm  # type: ignore[import-untyped]  # publishes no stubs

from common.errors import PlanError
from common.privacy import accounting
from common.privacy.accounting import ORDERS, Steps, epsilon_of, epsilon_of_history, filter_epsilon, rdp_of
from common.privacy.plan import Plan

DELTA = 1e-5
Numbers = NDArray[np.floating[Any]]
Losses = tuple[int, Numbers]  # index of the first loss on the grid, probability of each


def loss_of_a_step(q: float, sigma: float, removed: bool, grid: float, up: bool) -> Losses:
    """Law of one step's privacy loss, each loss rounded up (or down) to the grid; what lies beyond 9 sigma is added in.

    `removed`: the patient is in the data that the output comes from.
    """

    def loss(x: float) -> float:
        return math.log1p(q * math.expm1((2 * x - 1) / (2 * sigma**2)))

    def output_with(losses: Numbers) -> Numbers:
        share = (np.exp(losses) - 1 + q) / q
        return np.where(share > 0, sigma**2 * np.log(np.maximum(share, 1e-300)) + 0.5, -math.inf)

    lowest, highest = sorted((loss(-9 * sigma), loss(1 + 9 * sigma)))
    if not removed:
        lowest, highest = -highest, -lowest
    first, last = math.floor(lowest / grid), math.ceil(highest / grid)
    edges = np.arange(first, last + 1) * grid
    if removed:
        x = output_with(edges)
        below = (1 - q) * norm.cdf(x / sigma) + q * norm.cdf((x - 1) / sigma)
    else:
        below = norm.sf(output_with(-edges) / sigma)
    below[0], below[-1] = 0.0, 1.0
    return first + up, np.diff(below)


def exact_bound(history: list[Steps], delta: float, grid: float, up: bool) -> float:
    """Epsilon of the losses rounded up (an upper bound) or down (a lower one), composed by direct convolution."""

    def excess(epsilon: float, losses: Numbers, probability: Numbers) -> float:
        above = losses > epsilon
        return float(-np.expm1(epsilon - losses[above]) @ probability[above])

    worst = 0.0
    for removed in (True, False):
        first, total = 0, np.ones(1)
        for steps in history:
            index, law = loss_of_a_step(steps.sampling_rate, steps.noise_multiplier, removed, grid, up)
            for _ in range(steps.number):
                first, total = first + index, np.convolve(total, law)
        losses = (first + np.arange(len(total))) * grid
        low, high = 0.0, float(losses[-1])
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if excess(middle, losses, total) <= delta else (middle, high)
        worst = max(worst, high)
    return worst


@pytest.mark.parametrize(
    "history",
    [
        [Steps(0.25, 1.0, 2), Steps(0.1, 0.8, 2), Steps(0.5, 2.0, 2)],
        [Steps(0.01, 1.0, 3), Steps(0.9, 4.0, 3)],
        [Steps(1.0, 3.0, 2), Steps(0.3, 1.5, 4)],  # full batches beside sampled ones
        [Steps(0.5, 1.0, 1), Steps(0.5, 1.2, 1), Steps(0.5, 1.4, 1), Steps(0.5, 1.6, 1)],
    ],
)
@pytest.mark.parametrize("delta", [1e-2, 1e-5])
def test_a_small_history_costs_what_exact_composition_says(history: list[Steps], delta: float) -> None:
    """The price lies between the bounds that direct convolution of the rounded losses gives, no transform involved."""
    lower, upper = (exact_bound(history, delta, 4e-3, up) for up in (False, True))
    assert lower <= epsilon_of_history(history, delta) <= upper
    assert upper - lower <= 0.004 * sum(steps.number for steps in history) + 1e-3


KOSKELA = [
    Steps(float(q), float(s), 10) for q, s in zip(np.linspace(0.05, 0.06, 10), np.linspace(1.6, 1.8, 10), strict=True)
]


@pytest.mark.parametrize(
    ("history", "delta", "epsilon"),
    [
        (KOSKELA, 0.0007824006722393885, 1.0),
        (KOSKELA, 0.0030814519279194538, 0.8),
        (KOSKELA[:-1], 0.0005014987387132376, 1.0),
    ],
)
def test_a_published_history_costs_what_was_published(history: list[Steps], delta: float, epsilon: float) -> None:
    """Ten steps at each of ten (q, sigma): DPBayes/PLD-Accountant, tests/test_compute_delta_var.py, remove/add."""
    assert epsilon <= epsilon_of_history(history, delta) <= epsilon + 2e-4


@pytest.mark.parametrize(("kinds", "total"), [(2, 160), (10, 1000), (40, 400)])
@pytest.mark.parametrize("delta", [1e-5, 1e-8, 1e-11])
def test_the_transforms_never_lower_the_price_of_many_kinds(kinds: int, total: int, delta: float) -> None:
    """At q just below 1, where PLD composes by FFT, the price is at least the exact one of the Gaussians together."""
    spread = np.exp(np.linspace(-0.7, 0.7, kinds))
    number = total // kinds
    sigmas = spread * math.sqrt(float(np.sum(number / spread**2)))  # so that all together are one Gaussian at sigma 1
    exact = dp.get_epsilon_gaussian(1.0, delta)
    found = epsilon_of_history([Steps(1 - 1e-9, float(sigma), number) for sigma in sigmas], delta)
    assert exact <= found <= exact * 1.05
    full = epsilon_of_history([Steps(1.0, float(sigma), number) for sigma in sigmas], delta)
    assert exact * (1 - 1e-9) <= full <= exact * (1 + 1e-6)


one_kind = st.builds(
    Steps,
    st.sampled_from([0.01, 0.05, 0.25, 1.0]),
    st.floats(1.0, 8.0).map(lambda s: round(s, 2)),
    st.integers(1, 200),
)
histories = st.lists(one_kind, min_size=1, max_size=3)


@given(history=histories, data=st.data())
@settings(deadline=None, max_examples=6)
def test_neither_order_nor_parts_matter(history: list[Steps], data: st.DataObject) -> None:
    """Entries in any order, split into parts, joined by empty ones or merged: the price is the same to the last bit."""
    parts = [Steps(q, sigma, part) for q, sigma, number in history for part in (number // 3, number - number // 3)]
    shuffled = data.draw(st.permutations([*parts, Steps(0.5, 1.0, 0)]))
    assert epsilon_of_history(shuffled, DELTA) == epsilon_of_history(history, DELTA)


@given(history=histories, more=one_kind)
@settings(deadline=None, max_examples=6)
def test_more_steps_cost_more_and_less_noise_too(history: list[Steps], more: Steps) -> None:
    """More steps never lower the price, noise never raises it; no part costs more than all, the filter not less."""
    price = epsilon_of_history(history, DELTA)
    longer = [*history, more]
    assert epsilon_of_history(longer, DELTA) >= price * (1 - 1e-3) - 1e-3  # each within its grid of the truth
    assert price >= max(epsilon_of_history([steps], DELTA) for steps in history) * (1 - 1e-3) - 1e-3
    louder = [Steps(s.sampling_rate, 1.2 * s.noise_multiplier, s.number) for s in history]
    assert epsilon_of_history(louder, DELTA) <= price + 1e-3
    for order in (4.0, 16.0):
        divergences = [rdp_of(Plan(s.sampling_rate, s.noise_multiplier, 1.0, DELTA, s.number), order) for s in history]
        assert price <= filter_epsilon(divergences, order, DELTA)


@pytest.mark.parametrize(("q", "sigma", "number"), [(0.05, 1.0, 300), (0.25, 4.0, 160), (1.0, 5.0, 40)])
def test_kinds_composed_one_by_one_cost_what_they_cost_as_one(q: float, sigma: float, number: int) -> None:
    """Steps whose sigmas differ in the twelfth digit, composed kind by kind, cost what equal ones cost within .1 %."""
    one = epsilon_of_history([Steps(q, sigma, 3 * number)], DELTA)
    three = epsilon_of_history([Steps(q, sigma * (1 + k * 1e-12), number) for k in range(3)], DELTA)
    assert three == pytest.approx(one, rel=1e-3)


def test_a_plan_is_a_history_of_one_kind() -> None:
    """A plan's price is that of its steps, to the last bit."""
    plan = Plan(0.25, 4.0, 1.0, DELTA, 160, 4)
    assert epsilon_of(plan) == epsilon_of_history([Steps(0.25, 4.0, 100), Steps(0.25, 4.0, 64)], DELTA)
    assert epsilon_of(plan, 7) == epsilon_of_history([Steps(0.25, 4.0, 7)], DELTA)


def test_nothing_costs_nothing_and_no_noise_everything() -> None:
    """An empty history costs 0, one step without noise makes the whole infinite."""
    assert epsilon_of_history([], DELTA) == 0
    assert epsilon_of_history([Steps(0.5, 0.0, 0)], DELTA) == 0
    assert epsilon_of_history([Steps(0.5, 2.0, 10), Steps(0.5, 0.0, 1)], DELTA) == math.inf


@pytest.mark.parametrize(
    "steps",
    [
        Steps(0.0, 1.0, 1),
        Steps(1.1, 1.0, 1),
        Steps(math.nan, 1.0, 1),
        Steps(0.5, -1.0, 1),
        Steps(0.5, math.nan, 1),
        Steps(0.5, math.inf, 1),
        Steps(0.5, 1.0, -1),
    ],
)
def test_an_impossible_step_is_refused(steps: Steps) -> None:
    """A rate, noise or number out of bounds is a PlanError that names it: a negative number would pay back."""
    with pytest.raises(PlanError, match="steps at q = "):
        epsilon_of_history([Steps(0.5, 2.0, 10), steps], DELTA)


def filtered(history: list[Steps], delta: float) -> float:
    """The least that the filter could charge for the history."""
    plans = [Plan(s.sampling_rate, s.noise_multiplier, 1.0, delta, s.number) for s in history]
    return min(filter_epsilon([rdp_of(plan, order) for plan in plans], order, delta) for order in ORDERS)


def fails(error: Exception) -> Callable[..., float]:
    def fail(*_: object) -> float:
        raise error

    return fail


@pytest.mark.parametrize(
    "answer",
    [
        fails(ValueError("deltas are not in non-increasing order")),
        fails(OverflowError("math range error")),
        fails(MemoryError()),
        lambda *_: math.nan,
        lambda *_: -1.0,
        lambda *_: math.inf,
    ],
)
def test_where_pld_fails_the_renyi_bound_stands_in(
    answer: Callable[..., float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An accountant that raises, or answers with no number, never lowers a price and never stops one."""
    history = [Steps(0.1, 1.5, 50), Steps(0.2, 3.0, 20)]
    monkeypatch.setattr(accounting, "_epsilon", accounting._epsilon.__wrapped__)  # without its memory
    monkeypatch.setattr("dp_accounting.pld.PLDAccountant.get_epsilon", answer)
    assert epsilon_of_history(history, DELTA) == filtered(history, DELTA)


@pytest.mark.parametrize(
    "history",
    [
        [Steps(0.3, 0.3, 10**6), Steps(0.3, 0.4, 10**6)],
        [Steps(1e-6, 0.02, 1), Steps(1e-6, 0.021, 10)],
        [Steps(0.25, 1e-200, 1), Steps(0.5, 1.0, 1)],
    ],
)
def test_a_history_too_large_for_pld_is_priced_by_renyi(history: list[Steps]) -> None:
    """Absurd noise and a million steps are priced without a large array."""
    assert epsilon_of_history(history, DELTA) == filtered(history, DELTA) > 10


def test_too_many_kinds_for_pld_are_priced_by_renyi(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a number of kinds that PLD would compose for minutes, the Renyi bound is the price."""
    history = [Steps(0.25, 2.0 + k / 10, 10) for k in range(6)]
    monkeypatch.setattr(accounting, "_epsilon", accounting._epsilon.__wrapped__)
    by_pld = epsilon_of_history(history, DELTA)
    monkeypatch.setattr(accounting, "PLD_KINDS", 5)
    assert by_pld < epsilon_of_history(history, DELTA) == filtered(history, DELTA)


def test_the_filter_does_not_depend_on_the_order_of_plans() -> None:
    """The sum of divergences is the same to the last bit in whatever order plans were admitted."""
    divergences = [rdp_of(Plan(0.1, 1 + k / 7, 1.0, DELTA, 3 * k + 1), 8.0) for k in range(100)]
    stated = filter_epsilon(divergences, 8.0, DELTA)
    for _ in range(20):
        random.shuffle(divergences)
        assert filter_epsilon(divergences, 8.0, DELTA) == stated
