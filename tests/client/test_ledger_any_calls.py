"""Any sequence of calls, on the ledger in memory and on the one on disk at once, against one oracle."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from dp_accounting import pld
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from client.ledger import Attempt, MemoryLedger
from client.ledger_file import SqliteLedger
from common.errors import BudgetError
from common.privacy.accounting import event
from common.privacy.plan import Plan
from tests.client.ledger_cases import CAP, DELTA, SMALL, UNSYNCED, WHOLE

T = TypeVar("T")
POOL = (
    SMALL,
    WHOLE,
    Plan(0.05, 2.0, 1.0, DELTA, 5, 1),
    Plan(1.0, 12.0, 1.0, 1e-6, 6, 2),
    Plan(0.25, 3.0, 1.0, DELTA, 3),
    Plan(0.25, 1.0, 1.0, DELTA, 3),
    Plan(0.25, 3.0, 1.0, 1e-3, 3),
    Plan(0.25, 0.0, 1.0, DELTA, 3),
)


@lru_cache(maxsize=1024)
def together(plans: tuple[Plan, ...]) -> float:
    """PLD epsilon of plans together at the cohort's delta: what the filter must stay above. Not the ledger's code."""
    if any(plan.noise_multiplier == 0 for plan in plans):
        return math.inf
    accountant = pld.PLDAccountant(value_discretization_interval=1e-3)
    for plan in plans:
        accountant.compose(event(plan.sampling_rate, plan.noise_multiplier, plan.priced_steps))
    return float(accountant.get_epsilon(DELTA))


studies, plans = st.sampled_from(["s0", "s1", "s2"]), st.sampled_from(POOL)
rounds, weights = st.integers(1, 4), st.sampled_from(["w", "v"])


class AnyCalls(RuleBasedStateMachine):
    """Any sequence of calls, by an honest site or by one that forgets, repeats, mixes up and dies.

    Every call goes to both forms of the ledger, which must answer alike; the rest of this class is the oracle.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(dir=UNSYNCED)

    @initialize(cap=st.sampled_from([0.5, 1.0, CAP, 8.0]), anchored=st.booleans())
    def open(self, cap: float, anchored: bool) -> None:
        self.cap = cap
        self.anchor = Path(self.folder.name) / "anchor" if anchored else None
        self.memory = MemoryLedger(cap, DELTA)
        self.disk = self._opened()
        self.order = self.memory.order
        self.heads = [self.disk.head()]
        self.admitted: dict[str, Plan] = {}
        self.taken: dict[str, int] = {}
        self.open_attempt: dict[str, Attempt] = {}
        self.seen: set[Attempt] = set()
        self.released: dict[tuple[str, int], tuple[str, bytes]] = {}

    def _opened(self) -> SqliteLedger:
        return SqliteLedger(Path(self.folder.name) / "ledger.db", self.cap, DELTA, anchor=self.anchor)

    def teardown(self) -> None:
        if hasattr(self, "disk"):
            self.disk.close()
        self.folder.cleanup()

    def both(self, call: Callable[[MemoryLedger | SqliteLedger], T]) -> T:
        """What both answer; or the error that both raise."""
        answers: list[T] = []
        errors: list[BudgetError] = []
        for ledger in (self.memory, self.disk):
            try:
                answers.append(call(ledger))
            except BudgetError as error:
                errors.append(error)
        self.heads.append(self.disk.head())
        if errors:
            assert [str(error) for error in errors] == [str(errors[0])] * 2
            raise errors[0]
        assert answers[0] == answers[1]
        return answers[0]

    @rule(study=studies, plan=plans)
    def admit(self, study: str, plan: Plan) -> None:
        try:
            stated = self.both(lambda ledger: ledger.admit(study, plan))
        except BudgetError:
            assert self.admitted.get(study) != plan  # what was admitted stays admitted
            return
        assert self.admitted.setdefault(study, plan) == plan
        assert plan.delta <= DELTA
        assert 0 < stated <= self.cap

    @rule(study=studies, round_number=rounds, steps=st.integers(-1, 4), digest=weights)
    def attempt(self, study: str, round_number: int, steps: int, digest: str) -> None:
        try:
            answer = self.both(lambda ledger: ledger.attempt(study, round_number, steps, digest))
        except BudgetError:
            return
        plan = self.admitted[study]
        if isinstance(answer, bytes):
            assert self.released[study, round_number] == (digest, answer)
            return
        assert (study, round_number) not in self.released
        assert answer not in self.seen  # each attempt, hence each noise, is new
        assert answer == Attempt(study, round_number, answer.number, digest)
        assert steps >= 1
        self.taken[study] = self.taken.get(study, 0) + steps
        assert self.taken[study] <= plan.priced_steps
        self.seen.add(answer)
        self.open_attempt[study] = answer

    @rule(study=studies, round_number=rounds, number=st.integers(0, 3), digest=weights, update=st.binary(max_size=3))
    def release_anything(self, study: str, round_number: int, number: int, digest: str, update: bytes) -> None:
        self._release(Attempt(study, round_number, number, digest), update)

    @rule(study=studies, update=st.binary(max_size=3))
    def release_honestly(self, study: str, update: bytes) -> None:
        if study in self.open_attempt:
            assert self._release(self.open_attempt[study], update)

    def _release(self, attempt: Attempt, update: bytes) -> bool:
        try:
            self.both(lambda ledger: ledger.release(attempt, update))
        except BudgetError:
            assert self.open_attempt.get(attempt.study) != attempt
            return False
        assert self.open_attempt.pop(attempt.study) == attempt
        assert (attempt.study, attempt.round_number) not in self.released
        self.released[attempt.study, attempt.round_number] = (attempt.weights_digest, update)
        return True

    @rule(data=st.data())
    def replay(self, data: st.DataObject) -> None:
        if self.released:
            (study, round_number), (digest, update) = data.draw(st.sampled_from(sorted(self.released.items())))
            newest = [of_round for of_study, of_round in self.released if of_study == study][-2:]
            try:
                assert self.both(lambda ledger: ledger.attempt(study, round_number, 1, digest)) == update
                assert round_number in newest
            except BudgetError:
                assert round_number not in newest

    @rule()
    def reopen(self) -> None:
        self.disk.close()
        self.disk = self._opened()
        assert self.disk.head() == self.heads[-1]

    @invariant()
    def the_disk_holds_what_the_memory_holds(self) -> None:
        if hasattr(self, "disk"):
            assert self.disk.accounts.studies.keys() == self.memory.accounts.studies.keys()
            assert all(self.disk.contains(head) for head in self.heads)

    @invariant()
    def steps_never_exceed_the_price(self) -> None:
        for study in getattr(self, "admitted", {}):
            assert self.memory.steps_taken(study) == self.disk.steps_taken(study) == self.taken.get(study, 0)
            assert self.taken.get(study, 0) <= self.admitted[study].priced_steps

    @invariant()
    def the_cohort_never_pays_more_than_the_cap(self) -> None:
        if getattr(self, "admitted", {}):
            assert self.memory.order == self.disk.order == self.order
            assert together(tuple(sorted(self.admitted.values(), key=repr))) <= self.cap


AnyCalls.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=30)
TestAnyCalls = AnyCalls.TestCase
TestAnyCalls.__doc__ = (
    "No sequence of calls takes more steps than priced, spends more than the cap, or answers a round twice."
)
