"""The rules of the ledger: what is admitted, what is granted, what is answered again. No file, no clock, no chance.

`Accounts` is what a ledger's entries add up to. Its questions (`admission`, `attempting`, ...) change nothing: they
answer with the entry to write, with what was decided before, or with a BudgetError. `apply` changes and decides
nothing. A ledger asks, stores the entry, and only then applies it; opening a ledger applies the stored entries one
after the other. So the form in memory and the one on disk cannot differ in a rule.

Decisions a reader would question:

- The bytes of the newest two releases of a study are kept (`KEPT_ROUNDS`), of older ones only the digest. A server
  that has gone on to a round has stored all rounds before it, so one would do; the second is for a server that lost
  its newest checkpoint and goes on from the one before. All of them would be 32 MB for 160 rounds of 50,000 weights.
- A cohort's cap may be given lower at a later opening, and then binds; a higher one is refused: it was for life.
- A study's metrics are a plan of their own, charged under `metrics_of(study)`: one step at q = 1, no spare. So marking,
  storing, replaying, restoring and the anchor hold for them as they are, and an older program that shares the ledger
  reads them as one more study, at the price of the filter. An entry kind of their own would need each rule twice.
- Spending is by plan, not by step: a plan that is never finished costs the same. So a ledger that lost entries is
  made safe by knowing the lost plans; lost attempts only mean that nothing more may be trained under their plans.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from client.entries import (
    Admitted,
    Anchored,
    Attempted,
    CohortOpened,
    Disclosed,
    Entry,
    LedgerOpened,
    PatientsJoined,
    Released,
    Restored,
)
from common.errors import BudgetError
from common.privacy.accounting import Steps, best_order, epsilon_of_history, filter_epsilon, rdp_of
from common.privacy.plan import Plan

if TYPE_CHECKING:
    from common.study import Study

KEPT_ROUNDS = 2
METRICS = "/metrics"


def metrics_of(study: str) -> str:
    """What a study's metrics are charged under."""
    return study + METRICS


def study_of(charged: str) -> str:
    """The study that a plan was charged for, training and metrics alike."""
    return charged.removesuffix(METRICS)


@dataclass(frozen=True)
class Attempt:
    """A marked attempt: the `number`-th (from 1) at `round_number` of `study`, on weights with this digest."""

    study: str
    round_number: int
    number: int
    weights_digest: str


@dataclass(frozen=True)
class Release:
    """A released round: the weights it was trained from, and the position of its entry, where the bytes are kept."""

    weights_digest: str
    position: int


@dataclass
class Cohort:
    """A cohort's budget and every plan ever charged to it, in order, by what it was charged for."""

    cap: float
    delta: float
    order: float
    charges: dict[str, Plan] = field(default_factory=dict)
    patients: list[int] = field(default_factory=list)  # positions of the entries whose attachments list its patients

    def price(self, charges: Mapping[str, Plan]) -> float:
        """Epsilon of charges together: (a) of one study by PLD; (b) of several by the Renyi filter at the stored order.

        One study's plans, for training and for metrics, both follow from its terms, which were pinned before its
        first step. So PLD composes them, also where the weights that are scored, or whether metrics are asked for,
        depend on what training released: to stop early is post-processing. The filter (Feldman and Zrnic 2021) holds
        where a later study was chosen after seeing what an earlier one released; composing PLDs does not.
        """
        plans = list(charges.values())
        if not plans:
            return 0.0
        if len({study_of(charged) for charged in charges}) == 1:
            steps = [Steps(plan.sampling_rate, plan.noise_multiplier, plan.priced_steps) for plan in plans]
            return epsilon_of_history(steps, min(plan.delta for plan in plans))
        return filter_epsilon((rdp_of(plan, self.order) for plan in plans), self.order, self.delta)

    @property
    def plans(self) -> list[Plan]:
        """Every plan charged, in order."""
        return list(self.charges.values())

    @property
    def spent(self) -> float:
        """Epsilon of all plans charged so far, at the cohort's delta or a smaller one."""
        return self.price(self.charges)


@dataclass
class Account:
    """One study: its plan, and what has been done under it."""

    cohort: str
    plan: Plan
    epsilon: float
    steps_taken: int = 0
    attempts: dict[int, int] = field(default_factory=dict)  # round -> number of its newest attempt
    open: Attempt | None = None
    open_steps: int = 0
    released: dict[int, Release] = field(default_factory=dict)
    released_steps: int = 0
    forfeited: bool = False  # entries were lost: see `Restored`

    @property
    def steps_left(self) -> int:
        """Priced steps that may still be taken."""
        return 0 if self.forfeited else self.plan.priced_steps - self.steps_taken

    @property
    def spares_left(self) -> int:
        """Spare steps that no failed attempt has used. An attempt that is under way has not failed."""
        failed = self.steps_taken - self.released_steps - self.open_steps
        return min(self.steps_left, max(0, self.plan.spare_steps - failed))

    @property
    def kept(self) -> list[Release]:
        """The releases whose bytes are kept, oldest first."""
        return list(self.released.values())[-KEPT_ROUNDS:]


@dataclass
class Accounts:
    """All cohorts and studies of a ledger.

    Guarantee:
        The plans admitted to a cohort cost each of its patients at most (cap, delta) together: (a) an only plan at
        its PLD epsilon, or (b) by the Renyi filter. No attempt is granted beyond a plan's priced steps. A released
        round is never trained again.
    """

    cohorts: dict[str, Cohort] = field(default_factory=dict)
    studies: dict[str, Account] = field(default_factory=dict)
    count: int = 0  # entries applied
    patient_key: str = ""
    anchored: bool = False
    restored: int = 0
    disclosed: list[Disclosed] = field(default_factory=list)  # exact numbers that were shown to others

    def cohort_opening(self, name: str, cap: float, delta: float) -> CohortOpened | None:
        """The entry that opens a cohort, or None if it is open. Raises BudgetError if this is not its budget."""
        if not cap > 0 or not 0 < delta < 1:  # written so that NaN is refused: it would admit everything
            raise BudgetError(f"cap = {cap} must be > 0 and delta = {delta} in (0, 1); correct the site file")
        known = self.cohorts.get(name)
        if known is None:
            return CohortOpened(name, cap, delta, best_order(cap, delta) if math.isfinite(cap) else 2.0)
        if cap > known.cap or delta != known.delta:
            raise BudgetError(
                f"cohort `{name}` was opened for life with epsilon {known.cap} at delta {known.delta}, the site file "
                f"says {cap} at {delta}; write the same delta, and the same epsilon or a smaller one"
            )
        return None

    def admission(self, cohort_name: str, study: str, plan: Plan, cap: float) -> Admitted | Account:
        """The entry that charges a plan whole, or the account if it was charged before.

        Args:
            cap: the cohort's, or a smaller one that the site file now gives.

        Raises:
            BudgetError: another plan or cohort for an admitted study, a larger delta than the cohort's, or too dear.
        """
        account = self.studies.get(study)
        if account is not None:
            if account.plan != plan:
                raise BudgetError("this study was admitted with another plan; a plan is fixed before its first step")
            if account.cohort != cohort_name:
                raise BudgetError(f"this study was admitted for cohort `{account.cohort}`, not `{cohort_name}`")
            return account
        cohort = self.cohorts.get(cohort_name)
        if cohort is None:
            raise BudgetError(f"cohort `{cohort_name}` is not open; open it with its patients first")
        if plan.delta > cohort.delta:
            raise BudgetError(f"plan's delta {plan.delta} exceeds the cohort's {cohort.delta}; lower the study's delta")
        epsilon = cohort.price({**cohort.charges, study: plan})
        if not epsilon <= cap:
            raise BudgetError(
                f"epsilon {epsilon:.4g} (this plan {cohort.price({study: plan}):.4g}, "
                f"spent before {cohort.spent:.4g}, "
                f"left {max(0.0, cap - cohort.spent):.4g}) exceeds the cohort's cap {cap}; "
                "take a smaller epsilon or fewer rounds"
            )
        return Admitted(cohort_name, study, plan, epsilon)

    def admit_all(self, cohort: str, study: Study, cap: float, *, with_metrics: bool) -> None:
        """Charge all that a study will: to find out, on accounts that nobody stores, whether it fits.

        Raises:
            BudgetError: as `admission`.
        """
        digest, metrics = study.digest(), study.metrics_plan() if with_metrics else None
        for charged, plan in ((digest, study.plan()), (metrics_of(digest), metrics)):
            if plan is not None and isinstance(admitted := self.admission(cohort, charged, plan, cap), Admitted):
                self.apply(admitted)

    def attempting(self, study: str, round_number: int, steps: int, weights_digest: str) -> Attempted | Release:
        """The entry that marks an attempt, or the release that answers this round and these weights.

        Raises:
            BudgetError: study not admitted, round released for other weights or too long ago, or no steps left.
        """
        account = self.studies.get(study)
        if account is None:
            raise BudgetError("this study was not admitted; call admit first")
        release = account.released.get(round_number)
        if release is not None:
            if release.weights_digest != weights_digest:
                raise BudgetError(f"round {round_number} was released for other weights; it is not trained again")
            if release not in account.kept:
                raise BudgetError(f"round {round_number} was released and its update is no longer kept")
            return release
        if account.forfeited:
            raise BudgetError("the ledger was restored from a backup: every plan of before counts as fully spent")
        if steps < 1 or steps > account.steps_left:
            raise BudgetError(
                f"an attempt of {steps} steps: {account.steps_left} are left of the plan's {account.plan.priced_steps}"
            )
        return Attempted(study, round_number, account.attempts.get(round_number, 0) + 1, steps, weights_digest)

    def releasing(self, attempt: Attempt, update: bytes) -> Released:
        """The entry that releases the open attempt's update. Raises BudgetError for any other attempt."""
        account = self.studies.get(attempt.study)
        if account is None or account.open != attempt:
            raise BudgetError(f"round {attempt.round_number}: no open attempt {attempt.number} to release")
        return Released(attempt.study, attempt.round_number, attempt.number, hashlib.sha256(update).hexdigest())

    def forgotten_by(self, entry: Released) -> list[int]:
        """Positions of the releases whose bytes are no longer kept once `entry` is written."""
        kept = self.studies[entry.study].kept
        return [release.position for release in kept[: len(kept) + 1 - KEPT_ROUNDS]]

    def attachments(self) -> set[int]:
        """Positions of all entries whose attachment must be there."""
        kept = {release.position for account in self.studies.values() for release in account.kept}
        return kept.union(*(cohort.patients for cohort in self.cohorts.values()))

    def apply(self, entry: Entry) -> None:
        """Take a stored entry into the accounts."""
        self.count += 1
        match entry:
            case LedgerOpened():
                self.patient_key = entry.patient_key
            case CohortOpened():
                self.cohorts[entry.cohort] = Cohort(entry.cap, entry.delta, entry.order)
            case PatientsJoined():
                self.cohorts[entry.cohort].patients.append(self.count)
            case Admitted():
                self._charge(entry)
            case Attempted():
                account = self.studies[entry.study]
                account.steps_taken += entry.steps
                account.attempts[entry.round_number] = entry.number
                account.open = Attempt(entry.study, entry.round_number, entry.number, entry.weights_digest)
                account.open_steps = entry.steps
            case Released():
                account = self.studies[entry.study]
                assert account.open is not None
                account.released[entry.round_number] = Release(account.open.weights_digest, self.count)
                account.released_steps += account.open_steps
                account.open, account.open_steps = None, 0
            case Disclosed():
                self.disclosed.append(entry)
            case Anchored():
                self.anchored = True
            case Restored():
                for opened in entry.cohorts:
                    self.cohorts[opened.cohort] = Cohort(opened.cap, opened.delta, opened.order)
                for lost in entry.plans:
                    self._charge(lost)
                for account in self.studies.values():
                    account.forfeited, account.open, account.open_steps = True, None, 0
                self.anchored = entry.anchored
                self.restored += 1

    def _charge(self, entry: Admitted) -> None:
        self.studies[entry.study] = Account(entry.cohort, entry.plan, entry.epsilon)
        self.cohorts[entry.cohort].charges[entry.study] = entry.plan
