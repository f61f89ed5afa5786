"""What a plan costs: events are recorded (`event`), and priced separately (`epsilon_of`, `rdp_of`).

Accountant: Google's dp-accounting. The printed guarantee is a privacy-loss-distribution (PLD) epsilon with
pessimistic discretisation (Koskela et al. 2020; Doroshenko et al. 2022). Renyi orders serve the ledger's filter
(Feldman and Zrnic 2021), because PLD composition assumes that all plans were fixed beforehand. Opacus's PRV
accountant is the cross-check in the tests, not used here: it adds a constant .01 and fails at large epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache

import dp_accounting as dp
from dp_accounting import pld, rdp

from common.errors import PlanError
from common.privacy.plan import Plan

COARSE, FINE = 1e-3, 1e-4  # PLD grids; below epsilon .1 the coarse grid costs more than it saves
FINE_BELOW = 0.1
SIGMA_FLOOR, SIGMA_CEILING = 0.25, 1e5  # below the floor the PLD grid outgrows memory, and nothing is private
SIGMA_DIGITS = 4  # sigma is rounded up to this many decimals, so that every party prints the same number


def event(sampling_rate: float, noise_multiplier: float, steps: int) -> dp.DpEvent:
    """`steps` times the Poisson-subsampled Gaussian mechanism, as dp-accounting writes it down."""
    gaussian = dp.GaussianDpEvent(noise_multiplier)
    step = gaussian if sampling_rate == 1 else dp.PoissonSampledDpEvent(sampling_rate, gaussian)
    return dp.SelfComposedDpEvent(step, steps)


@lru_cache(maxsize=4096)
def epsilon_of(plan: Plan, steps: int | None = None) -> float:
    """PLD epsilon at the plan's delta of its first `steps` steps (default: all priced ones, the guarantee).

    Returns:
        Epsilon under add-or-remove-one-patient adjacency; infinity without noise; 0 for no steps.
    """
    taken = plan.priced_steps if steps is None else steps
    if taken == 0:
        return 0.0
    if plan.noise_multiplier == 0:
        return math.inf
    priced = event(plan.sampling_rate, plan.noise_multiplier, taken)
    value = _pld_epsilon(priced, plan.delta, COARSE)
    return _pld_epsilon(priced, plan.delta, FINE) if value < FINE_BELOW else value


def _pld_epsilon(priced: dp.DpEvent, delta: float, grid: float) -> float:
    accountant = pld.PLDAccountant(value_discretization_interval=grid)
    return float(accountant.compose(priced).get_epsilon(delta))


@lru_cache(maxsize=4096)
def noise_multiplier_for(epsilon: float, delta: float, sampling_rate: float, priced_steps: int) -> float:
    """The smallest sigma (rounded up) whose PLD epsilon over `priced_steps` steps is at most `epsilon`.

    Raises:
        PlanError: epsilon is not positive, or no sigma in the bracket reaches it.
    """
    if not epsilon > 0:
        raise PlanError(f"epsilon = {epsilon} must be > 0; to train without privacy in a simulation write `null`")
    if math.isinf(epsilon):
        return 0.0

    def price(sigma: float) -> float:
        return _pld_epsilon(event(sampling_rate, sigma, priced_steps), delta, grid)

    grid = FINE if epsilon < FINE_BELOW else COARSE
    low, high = _bracket(price, epsilon)
    if high > SIGMA_CEILING:
        raise PlanError(
            f"epsilon = {epsilon} at delta = {delta} cannot be reached with q = {sampling_rate} and "
            f"{priced_steps} steps; take fewer steps, a smaller q or a larger epsilon"
        )
    while high - low > 10.0**-SIGMA_DIGITS / 2:
        middle = (low + high) / 2
        low, high = (low, middle) if price(middle) <= epsilon else (middle, high)
    rounded_up: float = math.ceil(high * 10**SIGMA_DIGITS) / 10**SIGMA_DIGITS
    return rounded_up


def _bracket(price: Callable[[float], float], epsilon: float) -> tuple[float, float]:
    """(sigma that costs too much, sigma that does not), found outwards from 1: small sigmas are slow to price."""
    high = 1.0
    while price(high) > epsilon and high <= SIGMA_CEILING:
        high *= 2
    low = high / 2 if high > 1 else high * 0.8
    while low > SIGMA_FLOOR and price(low) <= epsilon:
        low, high = low * 0.8, low
    return max(low, SIGMA_FLOOR), high


ORDERS = tuple(
    float(order) for order in (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 256)
)  # whole: fractional ones fail to converge at large q


def rdp_of(plan: Plan, order: float) -> float:
    """Renyi divergence bound of the whole plan at one order (Mironov, Talwar and Zhang 2019)."""
    if plan.noise_multiplier == 0:
        return math.inf
    accountant = rdp.RdpAccountant([order])
    accountant.compose(event(plan.sampling_rate, plan.noise_multiplier, plan.priced_steps))
    return float(accountant._rdp[0])  # the accountant publishes epsilon only; the filter adds divergences


def filter_epsilon(divergences: Iterable[float], order: float, delta: float) -> float:
    """Epsilon of the sum of divergences at `order` (Canonne, Kamath and Steinke 2020, proposition 12)."""
    total = sum(divergences)
    return float(rdp.compute_epsilon([order], [total], delta)[0]) if math.isfinite(total) else math.inf


def best_order(cap: float, delta: float) -> float:
    """The order at which the filter admits the most divergence under `cap`: fixed when a cohort is opened.

    It depends on the cap alone, never on a plan: a filter whose order follows the data would not compose.
    """
    room = [_room(order, cap, delta) for order in ORDERS]
    return ORDERS[max(range(len(ORDERS)), key=lambda i: room[i] / ORDERS[i])]


def _room(order: float, cap: float, delta: float) -> float:
    """Largest divergence at `order` that still converts to at most `cap`, by bisection."""
    low, high = 0.0, max(cap, 1.0)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if filter_epsilon([middle], order, delta) <= cap else (low, middle)
    return low
