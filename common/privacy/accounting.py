"""What steps cost: they are written down (`Steps`), and priced separately (`epsilon_of`, `filter_epsilon`).

Accountant: Google's dp-accounting. The printed guarantee is a privacy-loss-distribution (PLD) epsilon with
pessimistic discretisation (Koskela et al. 2020; Doroshenko et al. 2022), or a smaller bound where one is known.
Renyi orders serve the ledger's filter (Feldman and Zrnic 2021), because PLD composition assumes that all plans were
fixed beforehand. Opacus's PRV accountant is the cross-check in the tests, not used here: it adds a constant .01 and
fails at large epsilon.

Every rounding is towards a larger epsilon: the PLD's grid and cut tails by its authors' construction, its Fourier
transform by `FFT_DELTA`, the closed form by `CLOSED_FORM_DELTA`, the Renyi divergence by `RENYI_ROUNDING`. Where PLD
fails or would outgrow time or memory, the Renyi bound, which always exists, stands in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import NamedTuple

import dp_accounting as dp
import numpy as np
from dp_accounting import pld, rdp
from scipy.optimize import brentq

from common.errors import PlanError
from common.privacy.plan import Plan

COARSE, FINE = 1e-3, 1e-4  # PLD grids
FINE_BELOW = 0.1  # epsilons under which the coarse grid costs more than it saves
FINE_STEP = 10 * COARSE  # same for one step's loss, about q / sigma: on the coarse grid .0007 costs 14 % more noise
FINE_SIGMA = 1.0  # below it the fine grid takes seconds, and rounding is a small part of the loss
FINE_KINDS = 10  # no more different steps than these on the fine grid: a hundred take 15 to 30 s, and gain .2 to 1 %
PLD_EPSILON, PLD_STEPS, PLD_KINDS = 1000.0, 1_000_000, 1000  # beyond these the PLD outgrows memory or minutes
FFT_DELTA = 1e-15  # per step: what the PLD's Fourier transform may lose of delta; most seen on Gaussians: 7e-17
CLOSED_FORM_DELTA = 1e-9  # relative: what the closed form's bisection may lose of delta; most seen: 2e-11
RENYI_ROUNDING = 1e-15  # per step, relative and absolute: dp-accounting is too low by up to 4e-16 (1 + divergence)
SIGMA_FLOOR, SIGMA_CEILING = 0.25, 1e5
SIGMA_UNITS = 10**4  # sigma is a whole number of these parts, so that every party prints the same number
ORDERS = tuple(
    float(order) for order in (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 256)
)  # whole: fractional ones fail to converge at large q


class Steps(NamedTuple):
    """As many equal steps: the Gaussian mechanism with `noise_multiplier` on patients sampled at `sampling_rate`."""

    sampling_rate: float
    noise_multiplier: float
    number: int


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
    return epsilon_of_history([Steps(plan.sampling_rate, plan.noise_multiplier, taken)], plan.delta)


def epsilon_of_history(history: Iterable[Steps], delta: float) -> float:
    """PLD epsilon at `delta` of steps with different sampling rates and noise, in any order.

    Args:
        history: what was, or will be, done; equal steps may be split over several entries; order does not matter.
        delta: the delta of (epsilon, delta), in (0, 1).

    Returns:
        Epsilon under add-or-remove-one-patient adjacency; infinity if a step has no noise; 0 for no steps.

    Guarantee:
        An upper bound, if all rates, noises and counts were fixed before the first step. Steps that were chosen after
        seeing what earlier ones released need the filter (`filter_epsilon`): PLD composition does not cover them.
    """
    numbers: dict[tuple[float, float], int] = {}
    for rate, sigma, number in history:
        if not (0 < rate <= 1 and 0 <= sigma < math.inf and number >= 0):
            raise PlanError(f"{number} steps at q = {rate}, sigma = {sigma}: q must be in (0, 1], the others >= 0")
        if number:
            numbers[rate, sigma] = numbers.get((rate, sigma), 0) + number
    if not numbers:
        return 0.0
    if any(sigma == 0 for _, sigma in numbers):
        return math.inf
    return _epsilon(tuple(Steps(*kind, number) for kind, number in sorted(numbers.items())), delta)


@lru_cache(maxsize=4096)
def _epsilon(history: tuple[Steps, ...], delta: float) -> float:
    """The smallest upper bound on epsilon that is worth computing; calibration and price are this one function.

    At q = 1 the closed form. Else PLD, at delta less what its Fourier transforms may lose: at delta 1e-12 and 10,000
    steps the accountant is too low by .03 without that. Where PLD cannot be computed, the Renyi bound stands in.
    """
    if all(steps.sampling_rate == 1 for steps in history):
        sigma = 1 / math.hypot(*(math.sqrt(steps.number) / steps.noise_multiplier for steps in history))
        with np.errstate(divide="ignore"):  # far above epsilon, delta is 0 in floating point, and its logarithm -inf
            return float(dp.get_epsilon_gaussian(sigma, delta * (1 - CLOSED_FORM_DELTA)))  # Balle and Wang 2018
    renyi = _renyi_epsilon(history, delta)
    total = sum(steps.number for steps in history)
    exact_delta = delta - FFT_DELTA * (total + len(history))  # one more transform for each kind of step
    if renyi > PLD_EPSILON or total > PLD_STEPS or len(history) > PLD_KINDS or exact_delta < delta / 2:
        return renyi
    epsilon = min(renyi, _pld_epsilon(history, exact_delta, COARSE))
    finest_step = min(steps.sampling_rate / steps.noise_multiplier for steps in history)
    coarse_wastes = epsilon < FINE_BELOW or finest_step < FINE_STEP
    affordable = len(history) <= FINE_KINDS and all(steps.noise_multiplier >= FINE_SIGMA for steps in history)
    if coarse_wastes and epsilon > 0 and affordable:
        epsilon = min(epsilon, _pld_epsilon(history, exact_delta, FINE))
    return epsilon


def _pld_epsilon(history: tuple[Steps, ...], delta: float, grid: float) -> float:
    """Epsilon by PLD on a grid; infinity, so that another bound is taken, where the accountant fails."""
    try:
        accountant = pld.PLDAccountant(value_discretization_interval=grid)
        for steps in history:
            accountant.compose(event(*steps))
        epsilon = float(accountant.get_epsilon(delta))
    except (ArithmeticError, ValueError, MemoryError):
        return math.inf
    return epsilon if epsilon >= 0 else math.inf  # NaN is not >= 0


def _renyi_epsilon(history: tuple[Steps, ...], delta: float) -> float:
    return min(filter_epsilon((_divergence(s, order) for s in history), order, delta) for order in ORDERS)


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

    def excess(units: float) -> float:
        """Logarithm of price / epsilon: close to linear in sigma, so that few prices are computed; finite anywhere."""
        price = _epsilon((Steps(sampling_rate, units / SIGMA_UNITS, priced_steps),), delta)
        return math.log(min(max(price / epsilon, 1e-9), 1e9))

    def fits(units: int) -> bool:
        return excess(units) <= 0

    low, high = _bracket(fits)
    if high > SIGMA_CEILING * SIGMA_UNITS:
        raise PlanError(
            f"epsilon = {epsilon} at delta = {delta} cannot be reached with q = {sampling_rate} and "
            f"{priced_steps} steps; take fewer steps, a smaller q or a larger epsilon"
        )
    if fits(low):  # the floor
        return low / SIGMA_UNITS
    units = math.ceil(float(brentq(excess, low, high, xtol=0.5)))
    while not fits(units):  # the root is exact to half a unit
        units += 1
    while fits(units - 1):
        units -= 1
    return units / SIGMA_UNITS


def _bracket(fits: Callable[[int], bool]) -> tuple[int, int]:
    """(units of sigma that cost too much, or the floor, units that fit, unless above the ceiling).

    Found outwards from sigma 1: small sigmas are slow to price.
    """
    floor = int(SIGMA_FLOOR * SIGMA_UNITS)
    high = SIGMA_UNITS
    while high <= SIGMA_CEILING * SIGMA_UNITS and not fits(high):
        high *= 2
    low = high // 2 if high > SIGMA_UNITS else high * 4 // 5
    while low >= floor and fits(low):
        low, high = low * 4 // 5, low
    return max(low, floor), high


def rdp_of(plan: Plan, order: float) -> float:
    """Renyi divergence bound of the whole plan at one order (Mironov, Talwar and Zhang 2019)."""
    return _divergence(Steps(plan.sampling_rate, plan.noise_multiplier, plan.priced_steps), order)


def _divergence(steps: Steps, order: float) -> float:
    if steps.noise_multiplier == 0:
        return math.inf
    one = _divergence_of_a_step(steps.sampling_rate, steps.noise_multiplier, order)
    return steps.number * (one * (1 + RENYI_ROUNDING) + RENYI_ROUNDING)


@lru_cache(maxsize=65536)
def _divergence_of_a_step(sampling_rate: float, noise_multiplier: float, order: float) -> float:
    accountant = rdp.RdpAccountant([order])
    try:
        accountant.compose(event(sampling_rate, noise_multiplier, 1))
    except ArithmeticError:  # 1 / sigma^2 overflows
        return math.inf
    divergence = float(accountant._rdp[0])  # the accountant publishes epsilon only; the filter adds divergences
    if math.isnan(divergence):
        return math.inf
    return max(divergence, 0.0)  # rounding can bring a tiny one below 0, and then it would pay back what others cost


def filter_epsilon(divergences: Iterable[float], order: float, delta: float) -> float:
    """Epsilon of the sum of divergences at `order` (Canonne, Kamath and Steinke 2020, proposition 12).

    Guarantee:
        If `order` was fixed beforehand and each divergence bounds a mechanism that may have been chosen after seeing
        the earlier ones' outputs, all of them together are (epsilon, delta)-private (Feldman and Zrnic 2021).
    """
    total = math.fsum(divergences)  # the same sum in whatever order plans were admitted
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
