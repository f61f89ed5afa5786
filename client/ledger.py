"""A site's record of what it has spent: admit a plan, mark an attempt, release an update.

Three calls, in this order, around every round. `admit` prices a plan whole, before its first step. `attempt` marks a
round as being trained, before its first private step. `release` stores the update before it is sent. What was marked
stays spent; what was released is answered with the stored bytes.

This module is the interface, what its forms share, and the form that lives in memory, for simulations. The rules
stand in `client/accounts.py`; the durable form, `client/ledger_file.py`, adds storage and nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Protocol

from client.accounts import Accounts, Attempt, Release
from client.entries import Admitted, Entry, Released
from common.privacy.plan import Plan

__all__ = ["DEFAULT_COHORT", "Attempt", "Ledger", "MemoryLedger", "StoredLedger"]

DEFAULT_COHORT = "all"


class Ledger(Protocol):
    """What a site needs from its ledger. One call at a time: `Site` sees to it.

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

    def head(self) -> str:
        """Hash of the newest entry, 64 hex digits, for the server to send back; "" if the ledger has none."""

    def contains(self, head: str) -> bool:
        """Whether this ledger ever had this head; if not, it is older than what a server has seen. "" counts."""


class StoredLedger(ABC):
    """Ask the rules, store the entry, apply it: the three calls over any storage.

    Attributes:
        accounts: what the stored entries add up to.
        cap: largest epsilon that the cohort may ever spend.
        delta: delta of the cap; a plan with a larger delta is refused.
        cohort: whose budget `admit` charges.
    """

    accounts: Accounts
    cap: float
    delta: float
    cohort: str

    @abstractmethod
    def _store(self, entry: Entry, attachment: bytes | None, forget: list[int]) -> None:
        """Make an entry durable as number `accounts.count + 1`, whole or not at all.

        Args:
            entry: what happened.
            attachment: bytes that belong to it.
            forget: positions of entries whose attachments are dropped with the same stroke.
        """

    @abstractmethod
    def _attachment(self, position: int) -> bytes:
        """The attachment of the entry at `position` (from 1)."""

    def _record(self, entry: Entry, attachment: bytes | None = None) -> None:
        forget = self.accounts.forgotten_by(entry) if isinstance(entry, Released) else []
        self._store(entry, attachment, forget)
        self.accounts.apply(entry)

    def admit(self, study: str, plan: Plan) -> float:
        """See `Ledger.admit`."""
        admission = self.accounts.admission(self.cohort, study, plan, self.cap)
        if isinstance(admission, Admitted):
            self._record(admission)
        return admission.epsilon

    def attempt(self, study: str, round_number: int, steps: int, weights_digest: str) -> Attempt | bytes:
        """See `Ledger.attempt`. A second attempt at a round draws on the spare steps."""
        attempting = self.accounts.attempting(study, round_number, steps, weights_digest)
        if isinstance(attempting, Release):
            return self._attachment(attempting.position)
        self._record(attempting)
        attempt = self.accounts.studies[study].open
        assert attempt is not None
        return attempt

    def release(self, attempt: Attempt, update: bytes) -> None:
        """See `Ledger.release`."""
        self._record(self.accounts.releasing(attempt, update), update)

    def steps_taken(self, study: str) -> int:
        """Local steps marked so far for `study`, retries included."""
        account = self.accounts.studies.get(study)
        return account.steps_taken if account is not None else 0

    @property
    def order(self) -> float:
        """The cohort's Renyi order, fixed when it was opened."""
        return self.accounts.cohorts[self.cohort].order


@dataclass
class MemoryLedger(StoredLedger):
    """A ledger that dies with its process: for simulations and tests only. It has no head.

    Attributes:
        cap: see `StoredLedger`; `inf` admits plans without noise.
        delta: see `StoredLedger`.
        entries: what happened, in order.
    """

    cap: float
    delta: float
    entries: list[Entry] = field(default_factory=list)
    accounts: Accounts = field(default_factory=Accounts)
    cohort: str = DEFAULT_COHORT
    _attachments: dict[int, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        opening = self.accounts.cohort_opening(self.cohort, self.cap, self.delta)
        if opening is not None:
            self._record(opening)

    def _store(self, entry: Entry, attachment: bytes | None, forget: list[int]) -> None:
        self.entries.append(entry)
        if attachment is not None:
            self._attachments[len(self.entries)] = attachment
        for position in forget:
            del self._attachments[position]

    def _attachment(self, position: int) -> bytes:
        return self._attachments[position]

    def head(self) -> str:
        """Always "": a simulated server has nothing to compare with."""
        return ""

    def contains(self, head: str) -> bool:
        """See `Ledger.contains`."""
        return head == ""
