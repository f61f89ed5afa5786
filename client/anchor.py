"""The anchor: a small file on another disk or medium that knows how far the ledger had come, and what it had charged.

A ledger that is put back to an older copy (a backup, a snapshot of the virtual machine) forgets what was spent since,
and its own chain cannot tell. The anchor is rewritten after every entry, so an older ledger lacks the head that the
anchor has seen. It also lists all cohorts and plans: they are public terms, and with them the loss of a whole ledger
costs no patient more than the cap. It holds nothing of patients.

Order of writing: the ledger first, then the anchor. So an anchor may be one entry behind, after a crash between the
two; further behind, or of another ledger, it was itself put back, and nobody can tell what is missing.

Limits: this stops accidents. Who puts back ledger and anchor together is found out by the servers' heads alone
(`Status.ROLLBACK`), and who puts back all three by nobody.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from client.accounts import Accounts
from client.durable import replace_durably
from client.entries import Admitted, CohortOpened, admitted_from
from common.errors import LedgerError, PlanError, RollbackError

VERSION = 1
ACCEPT = "accept the loss with `wardround client budget SITE.yaml --accept-restore` (all earlier plans then end)"


@dataclass(frozen=True)
class Anchor:
    """What an anchor file says: the newest head it saw (hex), the number of entries, cohorts and plans until then."""

    head: str
    count: int
    cohorts: tuple[CohortOpened, ...]
    plans: tuple[Admitted, ...]

    @classmethod
    def of(cls, head: str, accounts: Accounts) -> Anchor:
        """The anchor of a ledger as it is now."""
        return cls(
            head,
            accounts.count,
            tuple(CohortOpened(name, c.cap, c.delta, c.order) for name, c in accounts.cohorts.items()),
            tuple(Admitted(a.cohort, study, a.plan, a.epsilon) for study, a in accounts.studies.items()),
        )

    def write(self, path: Path) -> None:
        """Put it in the place of the anchor file, durably.

        Raises:
            LedgerError: it cannot be written, or the path is a link; the old one stands.
        """
        _no_link(path)
        try:
            replace_durably(path, json.dumps({"version": VERSION, **asdict(self)}, allow_nan=False).encode())
        except OSError as error:
            raise LedgerError(
                f"{path}: the ledger's anchor cannot be written ({error.strerror}); "
                "nothing is trained until its disk is back"
            ) from None

    @classmethod
    def read(cls, path: Path) -> Anchor | None:
        """What the file says; None if there is none.

        Raises:
            RollbackError: it cannot be read.
            LedgerError: the path is a link.
        """
        _no_link(path)
        try:
            plain = json.loads(path.read_bytes())
            if plain["version"] > VERSION:
                raise RollbackError(f"{path}: anchor of version {plain['version']}, this one knows {VERSION}; upgrade")
            cohorts = tuple(CohortOpened(**cohort) for cohort in plain["cohorts"])
            plans = tuple(admitted_from(plan) for plan in plain["plans"])
            return cls(str(plain["head"]), int(plain["count"]), cohorts, plans)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, PlanError) as error:
            raise RollbackError(
                f"{path}: the ledger's anchor cannot be read ({type(error).__name__}); bring its disk back, or remove "
                f"the file and {ACCEPT}"
            ) from None


def _no_link(path: Path) -> None:
    """Whoever can exchange what a link names decides how far the ledger has come."""
    if path.is_symlink():
        raise LedgerError(f"{path}: the anchor is a symbolic link; name the file itself")


def check(path: Path, ledger: Path, accounts: Accounts, heads: list[str]) -> None:
    """Compare an anchor with its ledger as it was opened; `heads` are the heads of all entries, in order.

    Raises:
        RollbackError: the ledger is older than the anchor, or the anchor is missing, older than it may be, or of
            another ledger.
    """
    anchor = Anchor.read(path)
    if anchor is None:
        if accounts.anchored:
            raise RollbackError(
                f"{path}: the ledger's anchor is missing, so nobody can tell if {ledger} is its newest copy; "
                f"bring its disk back, or {ACCEPT}"
            )
        return
    if anchor.head not in heads:
        raise RollbackError(
            f"{ledger}: the ledger has {len(heads)} entries, its anchor {path} has seen {anchor.count} and the last of "
            f"them is not here: this is an older copy; put the newest one back, or {ACCEPT}"
        )
    behind = len(heads) - 1 - heads.index(anchor.head)
    if behind > 1:
        raise RollbackError(
            f"{path}: the ledger's anchor is {behind} entries behind {ledger}, at most 1 can be: it was put back to an "
            f"older copy; bring the newest one back, or {ACCEPT}"
        )
