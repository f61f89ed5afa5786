"""From an attacker's scores to a lower bound on what the attacked mechanism gives away.

Nasr et al. 2023 (arXiv 2302.07956, section 4): a mechanism that is mu-Gaussian DP (Dong, Roth and Su 2022) leaves
every test of "in" against "out" with false alarms a and misses b such that Phi^-1(1 - a) + Phi^-1(1 - b) <= mu. Upper
confidence bounds on a and b (Clopper and Pearson 1934) thus give a lower confidence bound on mu, and mu and delta an
epsilon (Balle and Wang 2018). For the Gaussian mechanism nothing is lost: at q = 1 it is mu-Gaussian DP exactly, with
mu = sqrt(steps) / sigma.

Trials must be independent. Here they are many canaries of one run (as in Steinke et al. 2023, arXiv 2305.08846), each
with coordinates of its own, where the noise of the claimed mechanism is independent. So the confidence is exact under
the claim, and that is what is tested: a bound above the claim refutes it. A bound for arbitrary mechanisms from one
run (the theorem of Steinke et al.) needs no independence, but certifies at most ln(m) or so with m canaries.
"""

from __future__ import annotations

from collections.abc import Sequence

import dp_accounting as dp
import numpy as np
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]  # publishes no stubs

Scores = NDArray[np.float64]  # [attacks, canaries]; higher: rather in


def mu_at_least(inside: Scores, outside: Scores, thresholds: Sequence[float], error: float) -> float:
    """A lower bound on mu that is wrong with probability at most `error`.

    Args:
        inside: [attacks, n] scores of the canaries that were in.
        outside: [attacks, m] of those that were not.
        thresholds: fixed before the run; an attack says "in" above a threshold.
        error: shared evenly by all attacks, thresholds, and their two rates (Bonferroni).
    """
    each = error / (2 * len(inside) * len(thresholds))
    best = 0.0
    for attack_in, attack_out in zip(inside, outside, strict=True):
        for threshold in thresholds:
            missed = rate_at_most(int(np.sum(attack_in <= threshold)), len(attack_in), each)
            alarmed = rate_at_most(int(np.sum(attack_out > threshold)), len(attack_out), each)
            best = max(best, float(stats.norm.isf(missed) + stats.norm.isf(alarmed)))
    return best


def rate_at_most(count: int, trials: int, error: float) -> float:
    """Clopper and Pearson's upper bound on a probability, exceeded by it with probability at most `error`."""
    return 1.0 if count == trials else float(stats.beta.isf(error, count + 1, trials - count))


def epsilon_of_mu(mu: float, delta: float) -> float:
    """The epsilon, at delta, of a mechanism that is mu-Gaussian DP and no better."""
    return float(dp.get_epsilon_gaussian(1 / mu, delta)) if mu > 0 else 0.0
