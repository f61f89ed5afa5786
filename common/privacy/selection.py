"""What choosing costs: the best of several private trainings is a release of its own.

Whoever trains K models on the same patients and keeps the best has shown the patients to K trainings, also if all but
one are thrown away. Two honest prices: all K composed (`accounting.epsilon_of_history`), or a random number of runs
(Liu and Talwar 2019; Papernot and Steinke 2022), which is here. Its trick: who sees the winner cannot tell how many
others there were.

Decisions a reader would question:

- The number of runs is drawn from the logarithmic distribution (shape 0) unless another shape is asked for: of the
  shapes here, 0 and above, it is the cheapest at equal mean. With mean 8 at the demo's plan of epsilon 3 it costs 5.2,
  the geometric one (shape 1) 6.0, Poisson's (theorem 6 there, not offered) 6.5. What it saves it takes in luck: with
  mean 8 there is one run only in 29 of 100 cases, with the geometric law in 12.
- Renyi divergences at whole orders only, those of the ledger's filter: fractional ones fail to converge at large q.
- Not covered, hence composed: adaptive searches (Bayesian optimisation, pruning), whose next candidate follows from
  earlier scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from common.errors import PlanError
from common.privacy.accounting import ORDERS, filter_epsilon, rdp_of
from common.privacy.plan import Plan


@dataclass(frozen=True)
class Runs:
    """How many runs there are: K from the truncated negative binomial distribution (Papernot and Steinke, def. 1).

    Attributes:
        stopping: gamma, in (0, 1]; 1 is always one run.
        shape: eta >= 0; 0 the logarithmic distribution, 1 the geometric one.
    """

    stopping: float
    shape: float = 0.0

    def __post_init__(self) -> None:
        if not (0 < self.stopping <= 1 and 0 <= self.shape < math.inf):
            raise PlanError(f"stopping = {self.stopping}, shape = {self.shape}: must be in (0, 1], and >= 0")

    @property
    def mean(self) -> float:
        """E[K]."""
        gamma, eta = self.stopping, self.shape
        if gamma == 1:
            return 1.0
        if eta == 0:
            return (1 / gamma - 1) / -math.log(gamma)
        return eta * (1 - gamma) / (gamma * -math.expm1(eta * math.log(gamma)))

    @classmethod
    def with_mean(cls, mean: float, shape: float = 0.0) -> Runs:
        """The distribution with this mean, or one hair more. Raises PlanError for a mean below 1 or not finite."""
        if not 1 <= mean < 1e9:
            raise PlanError(f"mean number of runs = {mean}: must be at least 1 and below 1e9")
        if mean == 1:
            return cls(1.0, shape)
        low, high = 1e-12, 1.0  # on the axis of the logarithm: means of many runs have a tiny gamma
        while high > low * (1 + 1e-12):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if cls(middle, shape).mean >= mean else (low, middle)
        return cls(low, shape)


def selected_divergence(divergences: Mapping[float, float], order: float, runs: Runs) -> float:
    """Renyi divergence at `order` of the best of a random number of runs (Papernot and Steinke 2022, theorem 2).

    Args:
        divergences: order > 1 -> bound on the Renyi divergence of one run, what its score cost included.
        order: one of these orders.
        runs: the law of their number.

    Returns:
        eps + (1 + eta) ((1 - 1/l) eps_l + log(1/gamma) / l) + log(E[K]) / (order - 1), with the order l that makes it
        smallest; l = 1, at which the first part is 0, among them.
    """
    log_stopping = -math.log(runs.stopping)
    further = min((1 - 1 / other) * each + log_stopping / other for other, each in [*divergences.items(), (1.0, 0.0)])
    return divergences[order] + (1 + runs.shape) * further + math.log(runs.mean) / (order - 1)


def epsilon_of_best(plan: Plan, runs: Runs) -> float:
    """Epsilon at the plan's delta of training a random number of models, each under the plan, and keeping the best.

    Args:
        plan: of every run; the candidates may differ in what does not enter it, such as width or cell.
        runs: the law of their number.

    Returns:
        Epsilon under add-or-remove-one-patient adjacency, per site; infinity without noise.

    Guarantee:
        An upper bound on what the winner and its score reveal of one patient, if the number of runs is drawn once from
        this law and neither revealed nor cut short; each run draws its candidate from a fixed list by a fixed law,
        whatever earlier runs gave; and the score is made from public patients, or is private and its cost is in the
        plan. It is never below the Renyi price of one run. Trainings that are looked at beside the winner are not
        covered: they are composed.
    """
    divergences = {order: rdp_of(plan, order) for order in ORDERS}
    if not all(map(math.isfinite, divergences.values())):
        return math.inf
    return min(
        filter_epsilon([selected_divergence(divergences, order, runs)], order, plan.delta) for order in divergences
    )
