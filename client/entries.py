"""What a ledger writes down: one entry per thing that happened, in the order in which it happened.

An entry says what was decided, not how: the rules stand in `client/accounts.py`, and replaying the entries gives the
accounts again. Entries are chained: the hash of each covers the hash before it, 32 random bytes and its own content.
The newest hash is the ledger's head. A server is told heads and nothing else; the random bytes are why a head tells
it nothing, not even to one who can guess every other word of the entry.

Decisions a reader would question:

- JSON rather than SQL columns: the bytes that are hashed are the bytes that are stored, so no later version has to
  rebuild them to the last digit of a float.
- A kind that an older program does not know (`NEW_IN`) raises the version of the file that holds it, with the entry
  itself (`EntryFile.append`). An older program then says "upgrade" instead of taking the entry for damage and sending
  somebody to a backup. A file without such an entry keeps its version: clients of two studies share one ledger, each
  of the release that its coordinator runs, and merely starting the newer one must not lock the older one out.
- No time stamps: nothing is decided by them, and a clock that was put back would look like evidence.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from common.privacy.plan import Plan

SALT_BYTES = 32
START = bytes(32)  # the hash before the first entry


@dataclass(frozen=True)
class LedgerOpened:
    """The first entry. `patient_key`: key (hex) of the digests of patients, which never leaves the ledger's file."""

    patient_key: str


@dataclass(frozen=True)
class CohortOpened:
    """A cohort and its budget for life: epsilon `cap` at `delta`, filtered at the Renyi `order`."""

    cohort: str
    cap: float
    delta: float
    order: float


@dataclass(frozen=True)
class PatientsJoined:
    """`count` patients were first seen in a cohort. `attachment`: sha256 of their keyed digests, kept beside it."""

    cohort: str
    count: int
    attachment: str


@dataclass(frozen=True)
class Admitted:
    """A study's plan, charged whole to a cohort; `epsilon` is what was stated for it."""

    cohort: str
    study: str
    plan: Plan
    epsilon: float


@dataclass(frozen=True)
class Attempted:
    """The `number`-th attempt at a round, of `steps` private steps, from weights with this digest."""

    study: str
    round_number: int
    number: int
    steps: int
    weights_digest: str


@dataclass(frozen=True)
class Released:
    """The update of an attempt may leave. `attachment`: sha256 of its bytes, kept beside it for a while."""

    study: str
    round_number: int
    number: int
    attachment: str


@dataclass(frozen=True)
class Anchored:
    """From here on an anchor file must be there, and must be of this ledger."""


@dataclass(frozen=True)
class Restored:
    """A person accepted that entries are lost: nothing more is trained under any plan known so far.

    Attributes:
        lost_head: the head that the anchor had seen, "" if there was no anchor.
        lost_count: the number of entries that it had seen.
        cohorts, plans: what was opened and admitted in the lost entries, from the anchor or named by the person.
        anchored: whether an anchor file must be there from here on.
    """

    lost_head: str
    lost_count: int
    cohorts: tuple[CohortOpened, ...]
    plans: tuple[Admitted, ...]
    anchored: bool


@dataclass(frozen=True)
class Disclosed:
    """A person decided that an exact number of the records may be shown to others; no epsilon covers it.

    Attributes:
        name: which number, of the closed list in `client/inspection/disclosures.py`.
        file: sha256 (hex) of the file that holds it.
    """

    name: str
    file: str


Entry = LedgerOpened | CohortOpened | PatientsJoined | Admitted | Attempted | Released | Anchored | Restored | Disclosed
KINDS: dict[str, type[Entry]] = {
    "ledger": LedgerOpened,
    "cohort": CohortOpened,
    "patients": PatientsJoined,
    "admitted": Admitted,
    "attempted": Attempted,
    "released": Released,
    "anchored": Anchored,
    "restored": Restored,
    "disclosed": Disclosed,
}
NEW_IN: dict[type[Entry], int] = {Disclosed: 2}  # version of the file from which on a kind exists; all others: 1
_WORDS = {kind: word for word, kind in KINDS.items()}


def encode(entry: Entry) -> bytes:
    """An entry as canonical JSON. Raises ValueError for a number that is not finite."""
    plain = {"kind": _WORDS[type(entry)], **asdict(entry)}
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def decode(content: bytes) -> Entry:
    """Inverse of `encode`. Raises KeyError, TypeError or ValueError for anything that `encode` did not write."""
    plain = json.loads(content)
    kind = KINDS[plain.pop("kind")]
    if kind is Admitted:
        return admitted_from(plain)
    if kind is Restored:
        plain["cohorts"] = tuple(CohortOpened(**cohort) for cohort in plain["cohorts"])
        plain["plans"] = tuple(admitted_from(plan) for plan in plain["plans"])
    return kind(**plain)


def admitted_from(plain: dict[str, Any]) -> Admitted:
    """An `Admitted` from its plain form, the plan a mapping."""
    return Admitted(**{**plain, "plan": Plan(**plain["plan"])})


def chained(before: bytes, salt: bytes, content: bytes) -> bytes:
    """Hash of an entry: sha256 over the hash before it (32 bytes), its salt (32 bytes) and its content."""
    assert len(before) == len(START)
    assert len(salt) == SALT_BYTES
    return hashlib.sha256(before + salt + content).digest()
