"""What must hold of a site's records for a study, one requirement after the other, and what was found.

A requirement has fixed, public words; what was found has private ones. Only the first and the answer reach the page
that may be shared. A requirement that cannot be looked at because one before it failed is `not reached`, which is
not a pass.

The limits are judgements, written here so that every site is asked the same. They catch faults of an extract (wrong
unit, wrong code, wrong label, outcome in the inputs), not small differences between hospitals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import polars as pl

from client.inspection import facts
from client.inspection.facts import Events, Lengths, OptedOut, Outcome
from client.mapping import CodeMap, code_map_of
from client.site_file import SiteFile
from client.state import StateFolder
from common.errors import ConfigurationError, WardroundError
from common.sequences import check_trainable

if TYPE_CHECKING:
    from client.readers.meds import MedsDirectory
    from common.study import Study

Answer = Literal["pass", "fail", "not reached"]

LEAST_VALUES = 0.5  # of the schema's numbers, so many occur here
OUTSIDE = 0.05  # of a number's events may lie outside of its clinical range
WITHOUT = 0.5  # of a number's events may have no number
FACTOR = 2.0  # prevalence against the public one
ERRORS = 3.0  # and by how many standard errors
EMPTY = 0.25  # of the sequences may hold nothing
CARRIES = 0.9  # of the rows with a code are positive: it carries the outcome
EXPECTED = 10.0  # so many positives would be expected with a code, and there is none

WORDS: dict[str, str] = {
    "policy": "the study keeps within the limits of this hospital's own policy",
    "budget": "the budget that is left allows the study's plan",
    "opt-outs": "patients who opted out are known and left out before anything is counted",
    "events": "every event has a patient, a code, and a time and number that can be used",
    "codes": "the records use the study's codes",
    "units": "numbers lie within the study's clinical ranges",
    "labels": "the task's labels are there, and each belongs to one patient and time",
    "splits": "no patient is in two splits, and every labelled patient is in one",
    "sequences": "labels and events make sequences that can be learned from",
    "lengths": "most sequences hold something recorded",
    "cohort": "there are at least as many patients as this hospital's policy asks for",
    "prevalence": "positive labels are about as frequent as the study says",
    "prediction time": "nothing after the prediction time changes what the model reads",
    "outcome codes": "no code before the prediction time stands almost only with positive labels",
    "dates": "no code that is written by date, at midnight, stands on the day of a prediction",
}


@dataclass(frozen=True)
class Finding:
    """One requirement's answer; `detail` is for this hospital alone."""

    name: str
    answer: Answer
    detail: str

    @property
    def words(self) -> str:
        """What the requirement asks, in public words."""
        return WORDS[self.name]


@dataclass
class Inspection:
    """Everything that was found; a part is None where it could not be looked at."""

    findings: list[Finding] = field(default_factory=list)
    opted_out: OptedOut | None = None
    events: Events | None = None
    splits: dict[str, int] | None = None
    lengths: Lengths | None = None
    outcome: Outcome | None = None

    @property
    def passed(self) -> bool:
        """Every requirement was looked at and holds."""
        return all(finding.answer == "pass" for finding in self.findings)

    @contextmanager
    def asking(self, *names: str) -> Iterator[Callable[[str, bool, str], None]]:
        """Note answers to these requirements; an error of ours fails those without one, with its text.

        Any other error is a defect of ours and passes through.
        """
        answered: dict[str, Finding] = {}

        def answer(name: str, holds: bool, detail: str) -> None:
            answered[name] = Finding(name, "pass" if holds else "fail", detail)

        try:
            yield answer
        except WardroundError as error:
            open_ones = [name for name in names if name not in answered]
            answer(open_ones[0], False, str(error).replace("\n", "; "))
        for name in names:
            self.findings.append(answered.get(name) or Finding(name, "not reached", "a requirement before it failed"))


def inspect(site: SiteFile, study: Study, state: StateFolder) -> Inspection:
    """Look at everything, offline; nothing is changed but the split key, made on first use.

    A fault of the records is a finding, not an error, so that one run names all that can be named. Raises
    ConfigurationError where the site's code map cannot be used.
    """
    found = Inspection()
    code_map = code_map_of(site, study.features)  # a fault in it is one of the site's settings: an error, no finding
    with found.asking("policy") as answer:
        site.policy.check(study)
        answer("policy", True, "within every limit")
    with found.asking("budget") as answer:
        answer("budget", True, _budget(site, study, state))
    directory: MedsDirectory | None = None
    with found.asking("opt-outs") as answer:
        directory, found.opted_out = facts.opened(site, study.features)
        answer("opt-outs", True, _opted_out(found.opted_out))
    _look_at_events(found, directory, study, code_map)
    usable = directory if found.events is not None else None
    rows = _look_at_labels(found, usable, site, study, state)
    _look_for_leaks(found, usable, rows, study)
    return found


def _budget(site: SiteFile, study: Study, state: StateFolder) -> str:
    """What is left before this study; without opening, hence without making, a ledger.

    Raises:
        BudgetError: the plan does not fit.
        LedgerError: the ledger is gone or damaged.
        ConfigurationError: the site file does not say whose budget is charged.
    """
    from client.accounts import Accounts
    from client.ledger import DEFAULT_COHORT
    from client.ledger_file import read_accounts
    from client.ledger_place import begun, ledger_path

    path, name, cap = ledger_path(site), site.cohort or DEFAULT_COHORT, site.policy.max_epsilon
    begun(site, state)
    accounts = read_accounts(path)[0] if path.exists() else Accounts()
    if site.cohort is None and set(accounts.cohorts) - {DEFAULT_COHORT}:
        raise ConfigurationError(f"{path}: holds the cohorts {', '.join(accounts.cohorts)}; name one as `cohort`")
    opening = accounts.cohort_opening(name, cap, site.policy.delta)
    if opening is not None:
        accounts.apply(opening)
    left = max(0.0, cap - accounts.cohorts[name].spent)
    known = study.digest() in accounts.studies
    accounts.admit_all(name, study, cap, with_metrics=site.policy.allows_metrics(study))
    said = "the study was charged before" if known else f"the study asks for epsilon {study.privacy.epsilon}"
    return f"epsilon {left:.3g} left of {cap:g}; {said}"


def _opted_out(found: OptedOut | None) -> str:
    if found is None:
        return "the site file names no file of opt-outs"
    return f"{found.listed} patients are listed, {found.here} of them have records here and are left out"


def _look_at_events(found: Inspection, directory: MedsDirectory | None, study: Study, code_map: CodeMap) -> None:
    with found.asking("events", "codes", "units") as answer:
        if directory is None:
            return
        found.events = events = facts.events_of(directory, study.features)
        answer("events", True, f"{events.fates.events:,} events of {events.patients:,} patients")
        recorded = sum(one.events > 0 for one in events.measured)
        enough = recorded >= LEAST_VALUES * len(events.measured) and events.fates.known > 0
        share = events.fates.known / max(1, events.fates.events)
        answer(
            "codes",
            enough,
            f"{share:.1%} of events carry a code of the schema; {recorded} of its {len(events.measured)} numbers and "
            f"{events.listed_seen} of its {study.features.n_codes} listed codes occur{code_map.said}",
        )
        doubtful = [one.code for one in events.measured if _doubtful(one)]
        shown = f"{', '.join(doubtful)}: compare units and codes with the feature file"
        answer("units", not doubtful, shown if doubtful else "every number that is recorded is mostly in its range")


def _doubtful(one: facts.Measured) -> bool:
    return one.patients >= facts.LEAST_PATIENTS and (
        one.outside > OUTSIDE * one.events or one.without_number > WITHOUT * one.events
    )


def _look_at_labels(
    found: Inspection, directory: MedsDirectory | None, site: SiteFile, study: Study, state: StateFolder
) -> pl.DataFrame | None:
    """The label rows that train, if there are any that can be learned from."""
    names = ("labels", "splits", "sequences", "lengths", "cohort", "prevalence")
    rows: pl.DataFrame | None = None
    with found.asking(*names) as answer:
        if directory is None:
            return None
        key, task = state.split_key(), study.task.name
        labels = len(directory.labels(task))
        answer("labels", True, f"{labels:,} label rows")
        found.splits = facts.split_sizes(directory, task, key)
        answer("splits", True, ", ".join(f"{name} {count:,} patients" for name, count in found.splits.items()))
        sequences = directory.read(
            task,
            study.features,
            site.splits,
            max_steps=study.records.max_steps,
            bin_hours=study.records.bin_hours,
            split_key=key,
        )
        check_trainable(sequences, f"{site.records}, {' + '.join(site.splits)}")
        found.lengths = lengths = facts.lengths_of(sequences, study.records.max_steps)
        rows = facts.trained_rows(directory, site, task, key)
        answer("sequences", True, f"{lengths.sequences:,} sequences of {lengths.patients:,} patients")
        empty = lengths.empty / lengths.sequences
        answer("lengths", empty <= EMPTY, f"{empty:.1%} of the sequences hold nothing that the study reads")
        answer("prevalence", *_prevalence(lengths, study))
        site.policy.check_cohort(lengths.patients)  # last: it raises where it does not hold
        declared = study.sites[site.site].declared_patients
        answer("cohort", True, f"{lengths.patients:,} patients train; the study publishes {declared:,}")
    return rows


def _look_for_leaks(
    found: Inspection, directory: MedsDirectory | None, rows: pl.DataFrame | None, study: Study
) -> None:
    with found.asking("prediction time", "outcome codes", "dates") as answer:
        if directory is None or rows is None:
            return
        same = facts.same_without_later_events(directory, rows, study)
        what = "the same" if same else "not the same, a defect: report it"
        answer("prediction time", same, f"each patient's earliest prediction, read without later events, is {what}")
        found.outcome = facts.outcome_of(directory, rows, study.features)
        carriers = suspicious(found.outcome)
        answer("outcome codes", not carriers, _named([one.code for one in carriers], "look when each is written"))
        by_date = [code for code, _ in found.outcome.same_day]
        answer(
            "dates", not by_date, _named(by_date, "if they are dates, stamp them at the day's end (docs/readers.md)")
        )


def _prevalence(lengths: Lengths, study: Study) -> tuple[bool, str]:
    """Whether the share of positive labels is near the public one; patients, not rows, give the standard error."""
    here, said = lengths.positives / lengths.sequences, study.task.prevalence
    error = math.sqrt(said * (1 - said) / lengths.patients)
    near = said / FACTOR <= here <= said * FACTOR or abs(here - said) <= ERRORS * error
    return near, f"{here:.1%} of the labels are positive, the study says {said:.1%}"


def suspicious(outcome: Outcome) -> list[facts.Held]:
    """Codes that stand almost only with positive labels, where a positive label is not the usual thing."""
    usual = outcome.positives / max(1, outcome.rows)
    return [one for one in outcome.held if one.positives >= CARRIES * one.rows and usual <= CARRIES / FACTOR]


def never_positive(outcome: Outcome) -> list[facts.Held]:
    """Codes without one positive label where at least EXPECTED would be expected: often a label that cannot be."""
    usual = outcome.positives / max(1, outcome.rows)
    return [one for one in outcome.held if one.positives == 0 and usual * one.rows >= EXPECTED]


def _named(codes: list[str], remedy: str, most: int = 8) -> str:
    if not codes:
        return "none"
    more = f" and {len(codes) - most} more" if len(codes) > most else ""
    return f"{', '.join(codes[:most])}{more}: {remedy}"
