"""What a plan costs, against closed forms, published numbers, a second accountant and a simulation.

Vectors and tolerances: dp-accounting 0.6 at grid 1e-4 and Opacus 1.6's PRV accountant less its constant .01.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import replace

import dp_accounting as dp
import mpmath  # type: ignore[import-untyped]  # publishes no stubs
import numpy as np
import pytest
from dp_accounting import pld, rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm  # type: ignore[import-untyped]  # publishes no stubs

from common.errors import PlanError
from common.privacy.accounting import (
    ORDERS,
    SIGMA_FLOOR,
    best_order,
    epsilon_of,
    event,
    filter_epsilon,
    noise_multiplier_for,
    rdp_of,
)
from common.privacy.plan import Plan

DELTA = 1e-5


def plan(q: float, sigma: float, steps: int, delta: float = DELTA, spare: int = 0) -> Plan:
    return Plan(q, sigma, 1.0, delta, steps, spare)


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "epsilon"),
    [
        (0.01, 0.6, 1000, 7.434),
        (0.01, 1.0, 100, 0.718),
        (0.01, 1.0, 1000, 1.83),
        (0.01, 1.0, 10_000, 6.188),
        (0.01, 4.0, 100, 0.080),
        (0.01, 4.0, 10_000, 0.947),
        (0.05, 1.0, 500, 7.52),
        (0.05, 1.0, 1000, 10.987),
        (0.05, 1.5, 500, 3.78),
        (0.05, 2.0, 1000, 3.700),
        (0.1, 4.0, 1000, 3.444),
        (0.001, 5.0, 1, 0.0003),
    ],
)
def test_known_prices(q: float, sigma: float, steps: int, epsilon: float) -> None:
    """The price agrees with independently computed ones within .01."""
    assert epsilon_of(plan(q, sigma, steps)) == pytest.approx(epsilon, abs=0.01)


@pytest.mark.parametrize(
    ("q", "sigma", "steps"), [(0.01, 1.0, 100), (0.05, 1.0, 1000), (0.25, 4.6, 164), (0.1, 0.6, 50)]
)
def test_a_second_accountant_agrees(q: float, sigma: float, steps: int) -> None:
    """Opacus's PRV accountant, another method by other authors, is within .02 after its constant .01."""
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(sigma, q, steps)]
    prv = accountant.get_epsilon(delta=DELTA)
    assert abs(prv - 0.010 - epsilon_of(plan(q, sigma, steps))) < 0.02


def gaussian_delta(mu: float, epsilon: float) -> float:
    """delta(epsilon) of a Gaussian mechanism with sensitivity / sigma = mu, in 60 digits (Balle and Wang 2018)."""
    with mpmath.workdps(60):
        shift = mpmath.mpf(epsilon) / mpmath.mpf(mu)
        return float(mpmath.ncdf(mu / 2 - shift) - mpmath.exp(epsilon) * mpmath.ncdf(-mu / 2 - shift))


@pytest.mark.parametrize("steps", [1, 160, 100_000])
@pytest.mark.parametrize("mu", [1e-3, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-8, 1e-14])
def test_full_batches_cost_what_the_gaussian_mechanism_costs(steps: int, mu: float, delta: float) -> None:
    """At q = 1 the price is the exact one, rounded up: delta at that epsilon is the plan's delta, never above it."""
    sigma = math.sqrt(steps) / mu
    epsilon = epsilon_of(plan(1.0, sigma, steps, delta))
    exact = gaussian_delta(math.sqrt(steps) / sigma, epsilon)
    assert exact <= delta
    assert epsilon == 0 or exact >= delta * (1 - 1e-6)


def one_step_delta(q: float, sigma: float, epsilon: float) -> float:
    """delta(epsilon) of one Poisson-subsampled Gaussian step, from the two densities' crossing points."""

    def with_patient(x: float) -> float:
        return float((1 - q) * norm.cdf(x / sigma) + q * norm.cdf((x - 1) / sigma))

    crossing = sigma**2 * math.log((math.exp(epsilon) - 1 + q) / q) + 0.5
    removed = (1 - with_patient(crossing)) - math.exp(epsilon) * norm.sf(crossing / sigma)
    added = 0.0
    if math.exp(-epsilon) > 1 - q:
        crossing = sigma**2 * math.log((math.exp(-epsilon) - 1 + q) / q) + 0.5
        added = norm.cdf(crossing / sigma) - math.exp(epsilon) * with_patient(crossing)
    return float(max(removed, added))


@pytest.mark.parametrize(("q", "sigma"), [(0.01, 1.0), (0.25, 0.5), (0.25, 5.0), (0.9, 1.0), (0.999, 2.0)])
def test_one_step_costs_what_its_densities_say(q: float, sigma: float) -> None:
    """For a single step the price is at least the exact epsilon, and not more than .001 above it."""
    epsilon = epsilon_of(plan(q, sigma, 1))
    assert one_step_delta(q, sigma, epsilon) <= DELTA
    assert epsilon < 0.001 or one_step_delta(q, sigma, epsilon - 0.001) > DELTA


@pytest.mark.parametrize(("q", "sigma", "steps"), [(0.25, 1.0, 20), (0.5, 2.0, 40)])
def test_the_price_is_no_less_than_a_simulation_of_the_loss(q: float, sigma: float, steps: int) -> None:
    """Drawn privacy losses never show more delta at the stated epsilon than stated (false alarm below 1e-9)."""
    delta, draws = 0.01, 200_000
    epsilon = epsilon_of(plan(q, sigma, steps, delta))
    random = np.random.default_rng()
    for removed in (True, False):
        loss = np.zeros(draws)
        for _ in range(steps):
            output = sigma * random.standard_normal(draws) + ((random.random(draws) < q) if removed else 0)
            ratio = np.log1p(q * np.expm1((2 * output - 1) / (2 * sigma**2)))
            loss += ratio if removed else -ratio
        excess = np.maximum(0, -np.expm1(epsilon - loss))
        assert excess.mean() <= delta + 6 * excess.std() / math.sqrt(draws)


@pytest.mark.parametrize("steps", [160, 10_000, 300_000])
@pytest.mark.parametrize("delta", [1e-6, 1e-9, 1e-11, 1e-12, 1e-13, 1e-15])
def test_rounding_in_the_fourier_transform_never_lowers_the_price(steps: int, delta: float) -> None:
    """At q just below 1, where PLD composes by FFT, the price is at least the full batch's, at every delta.

    The accountant alone is too low for 10,000 steps from delta 1e-11 down.
    """
    sigma = math.sqrt(steps) / 1.0
    exact = dp.get_epsilon_gaussian(1.0, delta)
    assert epsilon_of(plan(1 - 1e-9, sigma, steps, delta)) >= exact * (1 - 1e-6)


@given(
    q=st.floats(1e-3, 0.9),
    sigma=st.floats(0.5, 20),
    steps=st.integers(1, 2000),
    delta=st.sampled_from([1e-3, 1e-5, 1e-8]),
)
@settings(deadline=None, max_examples=8)
def test_the_price_is_ordered(q: float, sigma: float, steps: int, delta: float) -> None:
    """The price is at most the Renyi bound, grows with steps, and falls with noise and with delta."""
    base = plan(q, sigma, steps, delta)
    price = epsilon_of(base)
    renyi = rdp.RdpAccountant(list(ORDERS)).compose(event(q, sigma, steps)).get_epsilon(delta)
    assert 0 <= price <= renyi * (1 + 1e-12)  # where the PLD gives up, both are one sum in two orders
    assert price <= epsilon_of(replace(base, steps=2 * steps)) + 1e-9
    assert price >= epsilon_of(replace(base, noise_multiplier=1.1 * sigma)) - 1e-9
    assert price >= epsilon_of(replace(base, delta=2 * delta)) - 1e-9


def test_a_prefix_costs_at_most_the_whole() -> None:
    """Every prefix of a training, spare steps included, costs at most the guarantee; none costs nothing."""
    whole = plan(0.25, 3.0, 40, spare=4)
    prices = [epsilon_of(whole, steps) for steps in (0, 1, 10, 40, 44)]
    assert prices[0] == 0
    assert prices == sorted(prices)
    assert prices[-1] == epsilon_of(whole) == epsilon_of(replace(whole, steps=44, spare_steps=0))
    assert prices[-1] > prices[-2]


def test_no_noise_has_no_epsilon() -> None:
    """Without noise the price is infinite, not large."""
    assert epsilon_of(plan(0.25, 0.0, 1)) == math.inf
    assert rdp_of(plan(0.25, 0.0, 1), 8.0) == math.inf


@pytest.mark.parametrize(
    ("q", "sigma", "steps"),
    [(1.0, 0.01, 1), (1.0, 0.25, 100_000), (0.25, 0.01, 10), (0.9, 1.0, 10**9), (0.3, 0.3, 10**6)],
)
def test_an_absurd_plan_is_priced_within_memory(q: float, sigma: float, steps: int) -> None:
    """A plan that protects nobody has a large finite price, and pricing it needs no large array."""
    assert 100 < epsilon_of(plan(q, sigma, steps)) < math.inf


@pytest.mark.parametrize(
    ("epsilon", "delta", "q", "steps"),
    [
        (3.0, 1e-5, 0.25, 164),
        (0.095, 1e-5, 0.25, 164),  # the two PLD grids meet about here
        (0.0999, 1e-5, 0.1, 50),
        (0.1001, 1e-5, 0.1, 50),
        (0.5, 1e-6, 0.01, 1000),
        (8.0, 1e-5, 0.05, 200),
        (1.0, 1e-12, 0.25, 164),
        (2.0, 1e-5, 1.0, 40),
        (15.0, 1e-5, 0.25, 20),
    ],
)
def test_calibration_finds_the_smallest_noise(epsilon: float, delta: float, q: float, steps: int) -> None:
    """Sigma has 4 decimals, its price keeps to epsilon, and two units of the last decimal less would not."""
    sigma = noise_multiplier_for(epsilon, delta, q, steps)
    assert sigma == round(sigma, 4)
    assert epsilon_of(plan(q, sigma, steps, delta)) <= epsilon
    assert epsilon_of(plan(q, sigma - 2e-4, steps, delta)) > epsilon


@given(epsilon=st.floats(0.05, 8), q=st.floats(0.05, 1), steps=st.integers(1, 200), delta=st.sampled_from([1e-4, 1e-7]))
@settings(deadline=None, max_examples=5)
def test_a_calibrated_plan_is_never_refused_by_its_own_budget(
    epsilon: float, q: float, steps: int, delta: float
) -> None:
    """Whatever is asked for, the price of the calibrated plan is at most what was asked for."""
    sigma = noise_multiplier_for(epsilon, delta, q, steps)
    assert epsilon_of(plan(q, sigma, steps, delta)) <= epsilon


def test_an_infinite_budget_needs_no_noise() -> None:
    """An infinite epsilon is training without noise."""
    assert noise_multiplier_for(math.inf, 1e-5, 0.25, 164) == 0


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan, -math.inf])
def test_a_budget_that_is_none_is_refused(epsilon: float) -> None:
    """Epsilon must be positive; the error says how to train without privacy."""
    with pytest.raises(PlanError, match="must be > 0"):
        noise_multiplier_for(epsilon, 1e-5, 0.25, 164)


@pytest.mark.parametrize(
    ("epsilon", "delta", "q", "steps"),
    [(1e-6, 1e-5, 1.0, 100_000), (1e-6, 1e-5, 0.5, 100_000), (0.1, 1e-9, 0.9, 10**9)],
)
def test_a_budget_out_of_reach_is_refused(epsilon: float, delta: float, q: float, steps: int) -> None:
    """What no noise up to the ceiling achieves is a PlanError with the remedy, not a crash for memory."""
    with pytest.raises(PlanError, match="take fewer steps, a smaller q or a larger epsilon"):
        noise_multiplier_for(epsilon, delta, q, steps)


@pytest.mark.parametrize(("q", "steps"), [(0.25, 164), (1.0, 100_000), (1.0, 1)])
def test_a_budget_that_protects_nobody_still_gets_noise(q: float, steps: int) -> None:
    """A very large epsilon gives a small sigma, not below the floor, and its price keeps to epsilon."""
    sigma = noise_multiplier_for(300.0, 1e-5, q, steps)
    assert sigma >= SIGMA_FLOOR
    assert epsilon_of(plan(q, sigma, steps)) <= 300


def composed(plans: list[Plan], delta: float) -> float:
    """PLD epsilon of several plans together."""
    accountant = pld.PLDAccountant(value_discretization_interval=1e-3)
    for p in plans:
        accountant.compose(event(p.sampling_rate, p.noise_multiplier, p.priced_steps))
    return float(accountant.get_epsilon(delta))


@pytest.mark.parametrize("cap", [1.0, 3.0, 10.0])
@pytest.mark.parametrize(("first", "second"), [((0.25, 8.0, 100), (0.05, 1.5, 50)), ((0.1, 3.0, 20), (1.0, 20.0, 10))])
def test_the_filter_never_undercharges(
    cap: float, first: tuple[float, float, int], second: tuple[float, float, int]
) -> None:
    """At every order that may be stored, the filter's epsilon of two plans is at least their PLD epsilon together."""
    plans = [plan(*first), plan(*second)]
    exact = composed(plans, DELTA)
    for order in {best_order(cap, DELTA), *ORDERS}:
        divergences = [rdp_of(p, order) for p in plans]
        assert filter_epsilon(divergences, order, DELTA) >= exact - 1e-6
        assert filter_epsilon(divergences, order, DELTA) >= filter_epsilon(divergences[:1], order, DELTA)


def test_the_divergence_of_a_gaussian_is_known() -> None:
    """At q = 1 the Renyi divergence of T steps is T order / (2 sigma^2), spare steps included (Mironov 2017)."""
    assert rdp_of(plan(1.0, 4.0, 10, spare=6), 8.0) == pytest.approx(16 * 8 / (2 * 16))


@pytest.mark.parametrize("order", [2, 3, 8])
def test_the_divergence_of_a_subsampled_gaussian_is_its_moment(order: int) -> None:
    """The divergence is log E[(p/q)^order] / (order - 1), here by numerical integration."""
    for q, sigma in ((0.01, 1.0), (0.5, 2.0)):
        with mpmath.workdps(30):
            moment = mpmath.quad(
                lambda x, q=q, sigma=sigma: (
                    mpmath.npdf(x, 0, sigma) * (1 - q + q * mpmath.exp((2 * x - 1) / (2 * sigma**2))) ** order
                ),
                [-40 * sigma, 0, order, 40 * sigma],
            )
            exact = float(mpmath.log(moment) / (order - 1))
        assert rdp_of(plan(q, sigma, 7), float(order)) == pytest.approx(7 * exact, rel=1e-6)


def test_the_filter_refuses_what_is_not_finite() -> None:
    """One plan without noise makes the sum infinite, whatever else was charged; nothing charged costs nothing."""
    assert filter_epsilon([0.1, math.inf], 8.0, DELTA) == math.inf
    assert filter_epsilon([], 8.0, DELTA) == 0
    assert rdp_of(plan(1e-6, 100.0, 1), 2.0) >= 0


@pytest.mark.parametrize("cap", [0.01, 0.5, 1.0, 3.0, 10.0, 100.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
def test_the_stored_order_follows_from_cap_and_delta_alone(cap: float, delta: float) -> None:
    """Nothing but cap and delta enters the choice, and no other order admits more of a Gaussian under the cap."""
    assert list(inspect.signature(best_order).parameters) == ["cap", "delta"]
    chosen = best_order(cap, delta)
    assert chosen in ORDERS

    def steps_admitted(order: float) -> int:
        low, high = 0, 10**9  # steps at sigma 1000 that the filter lets through
        while high - low > 1:
            middle = (low + high) // 2
            fits = filter_epsilon([middle * order / 2e6], order, delta) <= cap
            low, high = (middle, high) if fits else (low, middle)
        return low

    assert steps_admitted(chosen) >= max(steps_admitted(order) for order in ORDERS) * 0.999 - 1
