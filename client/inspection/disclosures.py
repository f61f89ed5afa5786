"""The exact numbers that a person may put on the page that is shared: a closed list, each by name, each noted.

Such a number is a release that no epsilon covers: it is printed with these words, and the ledger keeps its name and
the file's sha256 (`client.entries.Disclosed`). Numbers of a few people are refused. Two numbers of one kind, taken at
two times, tell what changed between them; the ledger shows that there were two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from client.inspection.facts import LEAST_PATIENTS, Events, Lengths
from client.inspection.requirements import Inspection
from common.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    from client.site_file import SiteFile

EXACT = "exact, not covered by epsilon"
DISCLOSED: dict[str, tuple[str, Callable[[Events, Lengths], str]]] = {
    "patients": ("patients in the splits that train", lambda _, lengths: f"{lengths.patients:,}"),
    "sequences": ("label rows in the splits that train", lambda _, lengths: f"{lengths.sequences:,}"),
    "prevalence": (
        "share of positive labels in the splits that train",
        lambda _, lengths: f"{lengths.positives / lengths.sequences:.1%}",
    ),
    "median-steps": ("median number of steps of a sequence", lambda _, lengths: f"{lengths.quantiles[2]:,}"),
    "events": ("events of all patients", lambda events, _: f"{events.fates.events:,}"),
    "known-events": (
        "share of events that carry a code of the study",
        lambda events, _: f"{events.fates.known / events.fates.events:.1%}",
    ),
}


def check_names(names: Iterable[str]) -> None:
    """Raise ConfigurationError for a name that is not in the closed list."""
    for name in names:
        if name not in DISCLOSED:
            raise ConfigurationError(f"--disclose {name!r:.40} must be one of {', '.join(DISCLOSED)}; nothing was done")


def numbers(found: Inspection, names: Iterable[str]) -> list[tuple[str, str, str]]:
    """(name, what it is, the number as text) for each name, once, in the order of the list.

    Raises:
        ConfigurationError: a name that is not in the list.
        DataError: the records could not be counted, or too few people stand behind a number.
    """
    wanted = set(names)
    check_names(wanted)
    if not wanted:
        return []
    events, lengths = found.events, found.lengths
    if events is None or lengths is None:
        raise DataError("--disclose: the records could not be counted, see the failed requirements; correct them first")
    smallest = min(lengths.patients, lengths.positives, lengths.sequences - lengths.positives)
    if smallest < LEAST_PATIENTS:
        raise DataError(
            f"--disclose: a number here would be about fewer than {LEAST_PATIENTS} patients or labels; leave it out"
        )
    return [(name, what, text(events, lengths)) for name, (what, text) in DISCLOSED.items() if name in wanted]


def note(site: SiteFile, names: Iterable[str], file: str) -> None:
    """Write into the site's ledger that these numbers stand in the file with this sha256; begin it if there is none.

    Raises:
        LedgerError: it is in use, gone, or cannot be written.
        BudgetError: the policy is not the budget that it was begun with.
    """
    from pathlib import Path

    from client.ledger import DEFAULT_COHORT
    from client.ledger_file import SqliteLedger
    from client.ledger_place import begun, ledger_path, pin
    from client.state import StateFolder

    state = StateFolder(Path(site.state))
    with SqliteLedger(
        ledger_path(site),
        site.policy.max_epsilon,
        site.policy.delta,
        site.cohort or DEFAULT_COHORT,
        anchor=Path(site.anchor) if site.anchor is not None else None,
        create=not begun(site, state),
        wait=WAIT_SECONDS,
    ) as ledger:
        for name in names:
            ledger.disclose(name, file)
    pin(site, state)


WAIT_SECONDS = 600.0  # a round of a running client holds the ledger
