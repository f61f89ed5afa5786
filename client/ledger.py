"""A site's record of what it has spent: admit a plan, mark an attempt, release an update.

Three calls, in this order, around every round. `admit` prices a plan whole, before its first step. `attempt` marks a
round as being trained, before its first private step. `release` stores the update before it is sent. What was marked
stays spent; what was released is answered with the stored bytes. This module is the interface and the form that lives
in memory, for simulations; the rules are here, so that a durable form adds storage and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from common.errors import BudgetError
from common.privacy.accounting import best_order, epsilon_of, filter_epsilon, rdp_of
from common.privacy.plan import Plan


@dataclass(frozen=True)
class Attempt:
    """A marked attempt: the `number`-th (from 1) at `round_number` of `study`, on weights with this digest."""

    study: str
    round_number: int
    number: int
    weights_digest: str


class Ledger(Protocol):
    """What a site needs from its ledger.

    Guarantee:
        The plans admitted over the cohort's life cost each patient at most (`cap`, `delta`). No attempt is granted
        beyond an admitted plan's priced steps. A released round is never trained again.
    """

    def admit(self, study: str, plan: Plan) -> float:
        """Charge a plan whole, once per study. Returns the epsilon to state; raises BudgetError if it does not fit."""

    def attempt(self, study: str, round_number: int, steps: int, weights_digest: str) -> Attempt | bytes:
        """Mark an attempt of `steps` steps; or return the bytes already released for this round and these weights.

        Raises BudgetError: study not admitted, round released for other weights, or no steps left.
        """

    def release(self, attempt: Attempt, update: bytes) -> None:
        """Store the update of an attempt; only then may it be sent. Raises BudgetError for an unknown attempt."""


@dataclass
class _Account:
    plan: Plan
    epsilon: float
    steps_taken: int = 0
    attempts: dict[int, int] = field(default_factory=dict)
    open: Attempt | None = None
    released: dict[int, str] = field(default_factory=dict)  # round -> digest of the weights it was released for
    last_update: tuple[int, bytes] = (
        0,
        b"",
    )  # only the newest is kept: no server asks for an older round again


@dataclass
class MemoryLedger:
    """A ledger that dies with its process: for simulations and tests only.

    Attributes:
        cap: largest epsilon that the cohort may ever spend, at `delta`; `inf` admits plans without noise.
        delta: delta of the cap; a plan with a larger delta is refused.
    """

    cap: float
    delta: float
    _accounts: dict[str, _Account] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.cap > 0 or not 0 < self.delta < 1:  # written so that NaN is refused: it would admit everything
            raise BudgetError(f"cap = {self.cap} must be > 0 and delta = {self.delta} in (0, 1); correct the site file")
        self.order = best_order(self.cap, self.delta) if self.cap < float("inf") else 2.0

    def admit(self, study: str, plan: Plan) -> float:
        """See `Ledger.admit`. (a) An only plan is priced by PLD; (b) several by the RDP filter at the stored order."""
        account = self._accounts.get(study)
        if account is not None:
            if account.plan != plan:
                raise BudgetError("this study was admitted with another plan; a plan is fixed before its first step")
            return account.epsilon
        if plan.delta > self.delta:
            raise BudgetError(f"plan's delta {plan.delta} exceeds the cohort's {self.delta}; lower the study's delta")
        before = [account.plan for account in self._accounts.values()]
        epsilon = self._price([*before, plan])
        if not epsilon <= self.cap:
            raise BudgetError(
                f"epsilon {epsilon:.4g} (this plan {self._price([plan]):.4g}, spent before {self._price(before):.4g}) "
                f"exceeds the cohort's cap {self.cap}; take a smaller epsilon or fewer rounds"
            )
        self._accounts[study] = _Account(plan, epsilon)
        return epsilon

    def _price(self, plans: list[Plan]) -> float:
        if len(plans) <= 1:
            return epsilon_of(plans[0]) if plans else 0.0
        return filter_epsilon((rdp_of(p, self.order) for p in plans), self.order, self.delta)

    def attempt(self, study: str, round_number: int, steps: int, weights_digest: str) -> Attempt | bytes:
        """See `Ledger.attempt`. A second attempt at a round draws on the spare steps."""
        account = self._accounts.get(study)
        if account is None:
            raise BudgetError("this study was not admitted; call admit first")
        if round_number in account.released:
            if account.released[round_number] != weights_digest:
                raise BudgetError(f"round {round_number} was released for other weights; it is not trained again")
            if account.last_update[0] != round_number:
                raise BudgetError(f"round {round_number} was released and its update is no longer kept")
            return account.last_update[1]
        left = account.plan.priced_steps - account.steps_taken
        if steps < 1 or steps > left:
            raise BudgetError(f"an attempt of {steps} steps: {left} are left of the plan's {account.plan.priced_steps}")
        number = account.attempts.get(round_number, 0) + 1
        account.steps_taken += steps
        account.attempts[round_number] = number
        account.open = Attempt(study, round_number, number, weights_digest)
        return account.open

    def release(self, attempt: Attempt, update: bytes) -> None:
        """See `Ledger.release`."""
        account = self._accounts.get(attempt.study)
        if account is None or account.open != attempt:
            raise BudgetError(f"round {attempt.round_number}: no open attempt {attempt.number} to release")
        account.released[attempt.round_number] = attempt.weights_digest
        account.last_update = (attempt.round_number, update)
        account.open = None

    def steps_taken(self, study: str) -> int:
        """Local steps marked so far for `study`, retries included."""
        return self._accounts[study].steps_taken if study in self._accounts else 0
