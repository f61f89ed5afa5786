"""What a plan costs: events are recorded (`event`), and priced separately (`epsilon_of`, `rdp_of`).

Accountant: Google's dp-accounting. The printed guarantee is a privacy-loss-distribution (PLD) epsilon with
pessimistic discretisation (Koskela et al. 2020; Doroshenko et al. 2022), or a smaller bound where one is known.
Renyi orders serve the ledger's filter (Feldman and Zrnic 2021), because PLD composition assumes that all plans were
fixed beforehand. Opacus's PRV accountant is the cross-check in the tests, not used here: it adds a constant .01 and
fails at large epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache

import dp_accounting as dp
import numpy as np
from dp_accounting import pld, rdp

from common.errors import PlanError
from common.privacy.plan import Plan

COARSE, FINE = 1e-3, 1e-4  # PLD grids
FINE_BELOW = 0.1  # epsilons under which the coarse grid costs more than it saves
FINE_STEP = 10 * COARSE  # same for one step's loss, about q / sigma: on the coarse grid .0007 costs 14 % more noise
FINE_SIGMA = 1.0  # below it the fine grid takes seconds, and rounding is a small part of the loss
PLD_EPSILON, PLD_STEPS = 1000.0, 1_000_000  # beyond these the PLD grid outgrows memory
FFT_DELTA = 1e-15  # per step: what the PLD's Fourier transform may lose of delta; most seen on Gaussians: 7e-17
SIGMA_FLOOR, SIGMA_CEILING = 0.25, 1e5
SIGMA_UNITS = 10**4  # sigma is a whole number of these parts, so that every party prints the same number
ORDERS = tuple(
    float(order) for order in (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 256)
)  # whole: fractional ones fail to converge at large q


def event(sampling_rate: float, noise_multiplier: float, steps: int) -> dp.DpEvent:
    """`steps` times the Poisson-subsampled Gaussian mechanism, as dp-accounting writes it down."""
    gaussian = dp.GaussianDpEvent(noise_multiplier)
    step = gaussian if sampling_rate == 1 else dp.PoissonSampledDpEvent(sampling_rate, gaussian)
    return dp.SelfComposedDpEvent(step, steps)


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
    return _epsilon(plan.sampling_rate, plan.noise_multiplier, taken, plan.delta)


@lru_cache(maxsize=4096)
def _epsilon(sampling_rate: float, noise_multiplier: float, steps: int, delta: float) -> float:
    """The smallest upper bound on epsilon that is worth computing; calibration and price are this one function.

    At q = 1 the closed form. Else PLD, at delta less what its Fourier transform may lose: at delta 1e-12 and 10,000
    steps the accountant is too low by .03 without that. Where PLD cannot be computed, the Renyi bound stands in.
    """
    if sampling_rate == 1:
        with np.errstate(divide="ignore"):  # far above epsilon, delta is 0 in floating point, and its logarithm -inf
            return float(dp.get_epsilon_gaussian(noise_multiplier / math.sqrt(steps), delta))  # Balle and Wang 2018
    priced = event(sampling_rate, noise_multiplier, steps)
    renyi = _renyi_epsilon(priced, delta)
    exact_delta = delta - FFT_DELTA * steps
    if renyi > PLD_EPSILON or steps > PLD_STEPS or exact_delta < delta / 2:
        return renyi
    epsilon = min(renyi, _pld_epsilon(priced, exact_delta, COARSE))
    coarse_wastes = epsilon < FINE_BELOW or sampling_rate / noise_multiplier < FINE_STEP
    if coarse_wastes and epsilon > 0 and noise_multiplier >= FINE_SIGMA:
        epsilon = min(epsilon, _pld_epsilon(priced, exact_delta, FINE))
    return epsilon


def _pld_epsilon(priced: dp.DpEvent, delta: float, grid: float) -> float:
    accountant = pld.PLDAccountant(value_discretization_interval=grid)
    return float(accountant.compose(priced).get_epsilon(delta))


def _renyi_epsilon(priced: dp.DpEvent, delta: float) -> float:
    return float(rdp.RdpAccountant(list(ORDERS)).compose(priced).get_epsilon(delta))


@lru_cache(maxsize=4096)
def noise_multiplier_for(epsilon: float, delta: float, sampling_rate: float, priced_steps: int) -> float:
    """The smallest sigma, to 4 decimals and not below .25, whose price over `priced_steps` is at most `epsilon`.

    Raises:
        PlanError: epsilon is not positive, or no sigma up to the ceiling reaches it.
    """
    if not epsilon > 0:
        raise PlanError(f"epsilon = {epsilon} must be > 0; to train without privacy in a simulation write `null`")
    if math.isinf(epsilon):
        return 0.0

    def fits(units: int) -> bool:
        return _epsilon(sampling_rate, units / SIGMA_UNITS, priced_steps, delta) <= epsilon

    low, high = _bracket(fits)
    if high > SIGMA_CEILING * SIGMA_UNITS:
        raise PlanError(
            f"epsilon = {epsilon} at delta = {delta} cannot be reached with q = {sampling_rate} and "
            f"{priced_steps} steps; take fewer steps, a smaller q or a larger epsilon"
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high / SIGMA_UNITS


def _bracket(fits: Callable[[int], bool]) -> tuple[int, int]:
    """(units of sigma that cost too much or lie below the floor, units that fit, unless above the ceiling).

    Found outwards from sigma 1: small sigmas are slow to price.
    """
    floor = int(SIGMA_FLOOR * SIGMA_UNITS)
    high = SIGMA_UNITS
    while high <= SIGMA_CEILING * SIGMA_UNITS and not fits(high):
        high *= 2
    low = high // 2 if high > SIGMA_UNITS else high * 4 // 5
    while low >= floor and fits(low):
        low, high = low * 4 // 5, low
    return max(low, floor - 1), high


def rdp_of(plan: Plan, order: float) -> float:
    """Renyi divergence bound of the whole plan at one order (Mironov, Talwar and Zhang 2019)."""
    if plan.noise_multiplier == 0:
        return math.inf
    accountant = rdp.RdpAccountant([order])
    accountant.compose(event(plan.sampling_rate, plan.noise_multiplier, plan.priced_steps))
    divergence = float(accountant._rdp[0])  # the accountant publishes epsilon only; the filter adds divergences
    return max(divergence, 0.0)  # rounding can bring a tiny one below 0, and then it would pay back what others cost


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
