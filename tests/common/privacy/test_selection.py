"""The price of choosing the best: against an exact computation, dp-accounting's own, and what was published."""

from __future__ import annotations

import math

import numpy as np
import pytest
from dp_accounting import dp_event, rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.errors import PlanError
from common.privacy.accounting import ORDERS, epsilon_of, event, filter_epsilon, rdp_of
from common.privacy.plan import Plan
from common.privacy.selection import Runs, epsilon_of_best, selected_divergence

PLAN = Plan(0.25, 5.97, 3.0, 1e-5, 160, 4)
Chances = NDArray[np.float64]


def generating(runs: Runs, x: Chances) -> Chances:
    """E[x^K]: the definition of the law, from which the chance that the best of K is at most y follows."""
    rest = 1 - (1 - runs.stopping) * x
    if runs.shape == 0:
        return np.log(rest) / math.log(runs.stopping)
    return (rest**-runs.shape - 1) / (runs.stopping**-runs.shape - 1)


def best_of(chances: Chances, runs: Runs) -> Chances:
    """Exact chances of each score being the best of K runs; scores are in rising order."""
    return np.diff(generating(runs, np.concatenate([[0.0], np.cumsum(chances)])))


def renyi(p: Chances, q: Chances, order: float) -> float:
    """The Renyi divergence, the larger of both directions."""
    one = np.log(np.sum(p**order * q ** (1 - order))) / (order - 1)
    other = np.log(np.sum(q**order * p ** (1 - order))) / (order - 1)
    return float(max(one, other))


scores = st.lists(st.floats(0.05, 1.0), min_size=2, max_size=5)


@settings(deadline=None, max_examples=200)
@given(
    scores,
    st.lists(st.floats(-0.7, 0.7), min_size=5, max_size=5),
    st.floats(0.01, 0.9),
    st.sampled_from([0.0, 0.5, 1.0, 2.0]),
)
def test_the_best_of_k_runs_diverges_at_most_as_the_theorem_says(
    weights: list[float], change: list[float], stopping: float, shape: float
) -> None:
    """For any two laws of the score, with and without a patient, the exact divergence of the winner is below it."""
    without = np.array(weights) / sum(weights)
    tilted = without * np.exp(change[: len(weights)])
    with_patient = tilted / tilted.sum()
    runs = Runs(stopping, shape)
    divergences = {order: renyi(without, with_patient, order) for order in ORDERS if order <= 64}
    for order in (2.0, 4.0, 16.0, 64.0):
        exact = renyi(best_of(without, runs), best_of(with_patient, runs), order)
        assert exact <= selected_divergence(divergences, order, runs) + 1e-9


@pytest.mark.parametrize("shape", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("mean", [1.0, 2.0, 8.0, 100.0])
def test_the_law_has_the_mean_that_was_asked_for(mean: float, shape: float) -> None:
    """The mean of the chances of 1, 2, 3 ... runs, from the law's definition, is the mean asked for."""
    runs = Runs.with_mean(mean, shape)
    assert mean <= runs.mean <= mean * (1 + 1e-9)
    if mean == 1:
        assert runs.stopping == 1
        return
    step = 1e-6  # the mean is the slope of the generating function at 1
    high, low = generating(runs, np.array([1.0, 1 - step * runs.stopping]))
    assert (high - low) / (step * runs.stopping) == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize("shape", [0.0, 1.0])
@pytest.mark.parametrize("mean", [2.0, 8.0, 16.0])
@pytest.mark.parametrize("sigma", [2.0, 5.97, 15.0])
def test_it_is_what_dp_accounting_says(sigma: float, mean: float, shape: float) -> None:
    """Google's accountant, which has the theorem in code of its own, gives the same epsilon at the same orders.

    It takes l = 1 for the further runs only if it is given that order, here as one a hair above.
    """
    plan = Plan(0.25, sigma, 3.0, 1e-5, 160, 4)
    accountant = rdp.RdpAccountant([1 + 1e-7, *ORDERS])
    run = event(plan.sampling_rate, plan.noise_multiplier, plan.priced_steps)
    accountant.compose(dp_event.RepeatAndSelectDpEvent(run, mean, shape))
    theirs = accountant.get_epsilon(plan.delta)
    assert epsilon_of_best(plan, Runs.with_mean(mean, shape)) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("shape", [0.0, 1.0])
def test_pure_privacy_costs_2_and_shape_times_as_much(shape: float) -> None:
    """Published (Papernot and Steinke 2022, section 3): the best of runs of pure epsilon has (2 + eta) epsilon."""
    order = 1e9
    divergences = {order: 0.5}
    assert selected_divergence(divergences, order, Runs.with_mean(8, shape)) == pytest.approx((2 + shape) * 0.5)


def test_one_run_costs_one_run() -> None:
    """A choice among one costs the Renyi price of the plan, and more runs cost more; never less than the one."""
    one = min(filter_epsilon([rdp_of(PLAN, order)], order, PLAN.delta) for order in ORDERS)
    assert epsilon_of_best(PLAN, Runs.with_mean(1)) == one >= epsilon_of(PLAN)
    prices = [epsilon_of_best(PLAN, Runs.with_mean(mean)) for mean in (1, 2, 8, 64)]
    assert prices == sorted(prices)


def test_nothing_private_costs_everything() -> None:
    """Without noise the price of choosing is infinite, too."""
    assert math.isinf(epsilon_of_best(Plan(0.25, 0.0, 3.0, 1e-5, 160), Runs.with_mean(8)))


@pytest.mark.parametrize("mean", [0.5, math.inf, math.nan])
def test_an_impossible_mean_is_refused(mean: float) -> None:
    """A number of runs has a mean of at least one."""
    with pytest.raises(PlanError, match="mean number of runs"):
        Runs.with_mean(mean)


@pytest.mark.parametrize(("stopping", "shape"), [(0.0, 0.0), (1.1, 0.0), (0.5, -1.0)])
def test_an_impossible_law_is_refused(stopping: float, shape: float) -> None:
    """Gamma and eta have bounds."""
    with pytest.raises(PlanError, match="stopping"):
        Runs(stopping, shape)


@pytest.mark.parametrize(("shape", "price", "single"), [(0.0, 5.2, 0.29), (1.0, 6.0, 0.12)])
def test_the_numbers_of_the_module_are_true(shape: float, price: float, single: float) -> None:
    """Price at the demo's plan with eight runs on average, and the chance of a single run, as written down."""
    runs = Runs.with_mean(8, shape)
    assert round(epsilon_of_best(Plan(0.25, 4.5921, 3.0, 1e-5, 160, 4), runs), 1) == price
    few = 1e-6  # the chance of one run is the slope of the generating function at 0
    assert generating(runs, np.array([few]))[0] / few == pytest.approx(single, abs=0.006)
