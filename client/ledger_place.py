"""Which ledger a state folder charges: named once, for life, and missed when it is gone.

A ledger lies in the state folder, unless the site file names another's: two studies at the same time have a state
folder each (key, enrolment, log), and one ledger, because their patients have one budget. Once begun, the place is
pinned in STATE/ledger.json. Leaving a study does not forget it: otherwise leaving, and enrolling beside another or a
lost ledger, would be a second budget.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from client.site_file import SiteFile
from client.state import ENROLMENT, LEDGER, LEDGER_PLACE, StateFolder
from common.errors import ConfigurationError, LedgerError
from common.terms import Terms, parse


class LedgerPlace(Terms):
    """What STATE/ledger.json says: the ledger that the site file named; None is the state folder's own."""

    version: Literal[1] = 1
    ledger: str | None

    @classmethod
    def read(cls, state: StateFolder) -> Self | None:
        """The pinned place, or None. Raises ConfigurationError if the file cannot be used."""
        data = state.read_json(LEDGER_PLACE)
        return None if data is None else parse(data, cls, str(state / LEDGER_PLACE))


def ledger_path(site: SiteFile) -> Path:
    """The ledger that this site file charges."""
    return Path(site.ledger) if site.ledger is not None else Path(site.state) / LEDGER


def begun(site: SiteFile, state: StateFolder) -> bool:
    """Whether this state folder has charged, or could have charged, its ledger before.

    Raises:
        ConfigurationError: the site file names another ledger than before.
        LedgerError: the ledger is gone.
    """
    pinned = LedgerPlace.read(state)
    if pinned is not None and pinned.ledger != site.ledger:
        raise ConfigurationError(
            f"site file: `ledger` is {site.ledger or 'not set'}, this state folder charges "
            f"{pinned.ledger or 'its own'}; name that one again: another ledger would be another budget for the same "
            f"patients. A ledger that was moved: correct {state / LEDGER_PLACE}"
        )
    known = pinned is not None or (state / ENROLMENT).exists()
    if known and not ledger_path(site).exists():
        raise LedgerError(
            f"{ledger_path(site)}: this hospital has enrolled before, but its ledger is gone; restore the newest "
            "backup, then run `wardround client budget SITE.yaml --accept-restore`"
        )
    return known


def pin(site: SiteFile, state: StateFolder) -> None:
    """Note the place, once the ledger is there."""
    if LedgerPlace.read(state) is None:
        state.write_json(LEDGER_PLACE, LedgerPlace(ledger=site.ledger).model_dump(mode="json"))
