"""The durable ledger: the rules of `client/accounts.py` over a chained SQLite file, with an anchor on another disk.

Guarantee, beside that of `Ledger`:
    Whatever was answered by `admit`, `attempt` or `release` is on disk before it is answered. A process that dies at
    any instruction leaves a ledger that opens and that shows no less than was answered. A changed byte, an older copy
    (with an anchor, or by a server's head) and a second writer at a time are refused. Cohorts of one ledger share no
    patient.

Decisions a reader would question:

- Patients are known by HMAC-SHA256 of their id under a key that lives in the ledger's first entry. That keeps ids out
  of backups and screens; it does not hide them from one who has the file and a list of ids. The file is private.
- All who ever were in a cohort stay listed. New patients may join: they share a budget of which they have seen less.
- Each opening of a cohort is an entry, also when nobody joined: else a server that asks the same round twice, before
  and after a restart, would see from an unchanged head that nobody did.
- Clients of several studies share one ledger, round by round: each holds it from before an attempt is marked until the
  update is stored (`taken_up`), and reads what the others wrote. One process for all studies could hold it for life,
  but each study's client must be the very release that its coordinator runs.
- A ledger of one cohort needs no list. As soon as there are two, each opening must show its patients, or nothing is
  admitted or marked.
- `accept_restore` charges the plans that the anchor knows and the older copy lacks, and those that a person names.
  Without an anchor what is lost is known to people alone: the command asks them. Heads that servers saw of the lost
  part stay unknown: those servers are answered ROLLBACK for good, as their studies' plans count as fully spent.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import math
import operator
import secrets
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self, SupportsIndex

from client import anchor as anchors
from client.accounts import Accounts, Attempt
from client.anchor import Anchor
from client.entries import Admitted, Anchored, Disclosed, Entry, LedgerOpened, PatientsJoined, Restored
from client.entry_file import Connect, EntryFile, read_entries
from client.ledger import DEFAULT_COHORT, StoredLedger
from common.errors import BudgetError, LedgerError, RollbackError
from common.privacy.plan import Plan

DIGEST_BYTES = 32


class SqliteLedger(StoredLedger):
    """The ledger of a hospital, in a file. One process writes; `with` or `close` gives it back.

    Args:
        path: the file; made, with mode 0600, if absent. Its folder must be on a local disk.
        cap: largest epsilon that the cohort may ever spend; at a later opening the same or less.
        delta: delta of the cap, for life.
        cohort: whose budget `admit` charges. A second one in the same ledger is opened with `open_cohort`.
        anchor: file on another disk or medium, see `client/anchor.py`.
        create: see `EntryFile`.
        connect: opens SQLite; tests give one that fails or stops on purpose.
        wait: seconds that another client's round may take, here and in `taken_up`.

    Raises:
        LedgerError: the file is in use, damaged, of a newer version, a link, or readable by others.
        RollbackError: the file is older than its anchor, or the anchor is not its own.
        BudgetError: `cap` and `delta` are no budget, or not the cohort's.
    """

    def __init__(
        self,
        path: Path,
        cap: float,
        delta: float,
        cohort: str = DEFAULT_COHORT,
        anchor: Path | None = None,
        *,
        create: bool = True,
        connect: Connect = sqlite3.connect,
        wait: float = 0.0,
    ) -> None:
        self.cap, self.delta, self.cohort, self.anchor = cap, delta, cohort, anchor
        self._connect, self._wait = connect, wait
        self._patients_shown = False
        self._anchored_head = ""
        self._file = EntryFile(path, connect, create=create, wait=wait)
        try:
            self._read()
            if cohort in self.accounts.cohorts or not self.accounts.cohorts:
                self._open_cohort(cohort)
        except BaseException:
            self._file.close()
            raise

    @contextlib.contextmanager
    def taken_up(self) -> Iterator[None]:
        """Hold the file, after `close`, for one round, with what others wrote to it meanwhile.

        Raises:
            LedgerError: as for the constructor.
            RollbackError: as for the constructor; or it was put back to an older copy while nobody held it.
        """
        known = self._file
        self._file = EntryFile(known.path, self._connect, create=False, wait=self._wait)
        try:
            self._read()
            if known.contents.hashes[-1] not in self._file.contents.hashes:
                raise RollbackError(
                    f"{known.path}: older than it was a round ago; put the newest copy back, or {anchors.ACCEPT}"
                )
        except BaseException:
            self._file.close()
            self._file = known
            raise
        try:
            yield
        finally:
            self._file.close()

    def _read(self) -> None:
        self.accounts = replayed(self._file.path, self._file.contents.entries, self._file.contents.attached)
        self._open_anchor()

    def _open_anchor(self) -> None:
        """Check the anchor, then begin a new ledger. An anchor exists before the ledger says that it must."""
        heads = [digest.hex() for digest in self._file.contents.hashes]
        if self.anchor is not None:
            anchors.check(self.anchor, self._file.path, self.accounts, heads)
        elif self.accounts.anchored:
            raise LedgerError(
                f"{self._file.path}: this ledger has an anchor, but the site file names none; name it again, "
                f"or {anchors.ACCEPT}"
            )
        if not heads:
            self._record(LedgerOpened(secrets.token_hex(32)))
        self._settle_anchor()
        if self.anchor is not None and not self.accounts.anchored:
            self._record(Anchored())

    def _open_cohort(self, name: str) -> None:
        opening = self.accounts.cohort_opening(name, self.cap, self.delta)
        if opening is not None:
            if not math.isfinite(self.cap):
                raise BudgetError(f"cap = {self.cap} must be finite; correct the site file")
            self._record(opening)
        self.cohort = name

    def open_cohort(self, name: str, patient_ids: Iterable[str | SupportsIndex]) -> None:
        """Charge `name` from here on, and note all its patients of today.

        A patient has one budget: it is in one cohort of the ledger, for life.

        Args:
            name: an open cohort, or a new one, which gets this ledger's cap and delta.
            patient_ids: of all patients whose records may be trained on under this cohort; 5 and "5" are the same.

        Raises:
            BudgetError: a patient is in another cohort; another cohort has no list; not this cohort's budget.
            LedgerError: it could not be written.
        """
        others = {other: c.patients for other, c in self.accounts.cohorts.items() if other != name}
        unlisted = [other for other, lists in others.items() if not lists]
        if unlisted:
            raise BudgetError(
                f"cohort `{unlisted[0]}` has no list of patients, so nobody can tell who is in both; "
                "open it with its patients first"
            )
        key = bytes.fromhex(self.accounts.patient_key)
        shown = {hmac.digest(key, _text(patient).encode(), "sha256") for patient in patient_ids}
        for other, lists in others.items():
            if shared := len(shown & self._digests(lists)):
                raise BudgetError(
                    f"{shared} of the {len(shown)} patients are in cohort `{other}`; a patient has one budget: "
                    "leave them out of one of the two"
                )
        self._open_cohort(name)
        lists = self.accounts.cohorts[name].patients
        joined = b"".join(sorted(shown - self._digests(lists)))
        count, digest = len(joined) // DIGEST_BYTES, hashlib.sha256(joined).hexdigest()
        self._record(PatientsJoined(name, count, digest), joined)
        self._patients_shown = True

    def _digests(self, lists: list[int]) -> set[bytes]:
        """Keyed digests of the patients in the attachments at these positions."""
        joined = b"".join(self._attachment(position) for position in lists)
        return {joined[at : at + DIGEST_BYTES] for at in range(0, len(joined), DIGEST_BYTES)}

    def admit(self, study: str, plan: Plan) -> float:
        """See `Ledger.admit`."""
        self._require_patients()
        return super().admit(study, plan)

    def attempt(self, study: str, round_number: int, steps: int, weights_digest: str) -> Attempt | bytes:
        """See `Ledger.attempt`."""
        self._require_patients()
        return super().attempt(study, round_number, steps, weights_digest)

    def disclose(self, name: str, file: str) -> None:
        """Note that the exact number `name` stands in a file with this sha256 (hex). Nothing is charged.

        Raises:
            LedgerError: it could not be written.
        """
        entry = Disclosed(name, file)
        if entry not in self.accounts.disclosed:
            self._record(entry)

    def _require_patients(self) -> None:
        if len(self.accounts.cohorts) > 1 and not self._patients_shown:
            raise BudgetError("this ledger has several cohorts: open this one with its patients before it is charged")

    def head(self) -> str:
        """See `Ledger.head`."""
        return self._file.contents.hashes[-1].hex()

    def contains(self, head: str) -> bool:
        """See `Ledger.contains`."""
        return head == "" or bytes.fromhex(head) in self._file.contents.hashes

    def close(self) -> None:
        """Give the file back."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _record(self, entry: Entry, attachment: bytes | None = None) -> None:
        self._settle_anchor()  # its disk may have been away: it must not fall two entries behind
        super()._record(entry, attachment)
        self._settle_anchor()

    def _store(self, entry: Entry, attachment: bytes | None, forget: list[int]) -> None:
        if self.accounts.count != len(self._file.contents.entries):  # stopped between storing and applying
            raise LedgerError(f"{self._file.path}: the last call was interrupted; the next round reads it anew")
        self._file.append(entry, attachment, forget)

    def _attachment(self, position: int) -> bytes:
        return self._file.attachment(position)

    def _settle_anchor(self) -> None:
        if self.anchor is not None and self.accounts.count and self._anchored_head != self.head():
            Anchor.of(self.head(), self.accounts).write(self.anchor)
            self._anchored_head = self.head()


def _text(patient: str | SupportsIndex) -> str:
    """An id as text. Raises TypeError for a float, whose text would be another patient's."""
    return patient if isinstance(patient, str) else str(operator.index(patient))


def replayed(path: Path, entries: list[Entry], attached: set[int]) -> Accounts:
    """What a file's entries add up to. Raises LedgerError if bytes that must be kept are missing."""
    accounts = Accounts()
    for entry in entries:
        accounts.apply(entry)
    if missing := accounts.attachments() - attached:
        raise LedgerError(f"{path}: damaged (the bytes of entry {min(missing)} are missing); restore the newest backup")
    return accounts


def read_accounts(path: Path) -> tuple[Accounts, str]:
    """What a ledger's file says now, and its head, beside a client that writes to it. Raises LedgerError."""
    contents = read_entries(path)
    return replayed(path, contents.entries, contents.attached), contents.hashes[-1].hex() if contents.hashes else ""


def accept_restore(
    path: Path,
    cap: float,
    delta: float,
    cohort: str = DEFAULT_COHORT,
    anchor: Path | None = None,
    lost: Mapping[str, Plan] | None = None,
) -> Restored:
    """A person's word that entries of this ledger are lost for good. Afterwards it opens again, for new studies.

    Every plan in the file, in the anchor and in `lost` counts as charged and fully spent. A file that is missing is
    made, with the anchor's cohorts.

    Args:
        path: the ledger as it was put back.
        cap: as for `SqliteLedger`.
        delta: as for `SqliteLedger`.
        cohort: whom the plans of `lost` are charged to.
        anchor: the anchor that the site file names, whatever it says; written anew.
        lost: study digest -> plan of each study that the hospital took part in since the copy was made and that
            neither the file nor the anchor knows.

    Returns:
        The entry that was written.

    Raises:
        LedgerError: as for `SqliteLedger`; an anchor that cannot be read must be removed by hand.
        BudgetError: a lost plan has no noise, hence no price.
    """
    seen = Anchor.read(anchor) if anchor is not None else None
    file = EntryFile(path)
    try:
        if not file.contents.entries:
            file.append(LedgerOpened(secrets.token_hex(32)))
        accounts = replayed(path, file.contents.entries, file.contents.attached)
        known = seen if seen is not None else Anchor("", 0, (), ())
        cohorts = [opened for opened in known.cohorts if opened.cohort not in accounts.cohorts]
        plans = [plan for plan in known.plans if plan.study not in accounts.studies]
        for opened in cohorts:
            accounts.apply(opened)
        for plan in plans:
            accounts.apply(plan)
        named = {study: plan for study, plan in (lost or {}).items() if study not in accounts.studies}
        if named and (opening := accounts.cohort_opening(cohort, cap, delta)) is not None:
            cohorts.append(opening)
            accounts.apply(opening)
        for study, named_plan in named.items():
            plans.append(_charged(accounts, cohort, study, named_plan))
        entry = Restored(known.head, known.count, tuple(cohorts), tuple(plans), anchor is not None)
        file.append(entry)
        if anchor is not None:
            accounts = replayed(path, file.contents.entries, file.contents.attached)
            Anchor.of(file.contents.hashes[-1].hex(), accounts).write(anchor)
        return entry
    finally:
        file.close()


def _charged(accounts: Accounts, cohort: str, study: str, plan: Plan) -> Admitted:
    """A lost plan as it is charged: it was spent, so nobody asks whether it fits."""
    charges = accounts.cohorts[cohort]
    epsilon = charges.price({**charges.charges, study: plan})
    if not math.isfinite(epsilon):
        raise BudgetError(f"the lost study {study[:12]} has no noise, so no epsilon covers it; name its true terms")
    charged = Admitted(cohort, study, plan, epsilon)
    accounts.apply(charged)
    return charged
