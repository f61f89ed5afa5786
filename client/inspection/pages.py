"""Two pages about an inspection: one for this hospital alone, one that may be shared.

They are built apart, from different arguments: `shareable` is given answers, public terms and the numbers that a
person chose, and nothing else, so no statistic can slip onto it. It carries no date: the same answers are the same
bytes, which a test compares across records.

Guarantee of `shareable`:
    The page is a function of the study, the site's name, the program and the answers (15 words of three). Each answer
    is itself a fact about the records that epsilon does not cover; the page says so.
"""

from __future__ import annotations

import platform
from dataclasses import fields
from importlib.metadata import version
from typing import TYPE_CHECKING

from client.inspection.disclosures import EXACT
from client.inspection.facts import LEAST_PATIENTS, Events, Lengths, Outcome
from client.inspection.requirements import OUTSIDE, Finding, Inspection, never_positive, suspicious
from common.events import Coverage
from common.provenance import code_digest
from common.report.page import Block, Bullets, Cell, Notice, Page, Paragraph, Section, Table
from common.report.words import fixed, whole

if TYPE_CHECKING:
    from common.study import Study

MADE_BY = "Made by wardround, research software, not a medical device. This page loads nothing from anywhere."
LOCAL = Notice(
    "For this hospital alone.",
    "Exact counts of its patients. Do not send this page, nor the JSON beside it, to anyone; share.html is the page "
    "that may be shared.",
)
NO_STATISTIC = Notice(
    "No statistic of patients.",
    "This page says which requirements hold. Each answer is a fact about the records as a whole, which epsilon does "
    "not cover; whether to share it is the hospital's decision.",
    "note",
)
FATES = {
    "usable": "used",
    "unknown_code": "dropped: a code that the study does not read",
    "without_time": "dropped: a code that needs a time has none",
    "without_number": "dropped: a code that needs a number has none",
    "out_of_range": "dropped: the number is outside of its clinical range",
}


def shareable(study: Study, site: str, findings: list[Finding], disclosed: list[tuple[str, str, str]]) -> Page:
    """The page that may be shared.

    Args:
        study: public.
        site: this hospital's name in the study.
        findings: of which name and answer are used, and no detail.
        disclosed: (name, what it is, number) that a person chose.
    """
    stamps: tuple[Notice, ...] = (NO_STATISTIC,)
    if disclosed:
        names = ", ".join(name for name, _, _ in disclosed)
        words = (
            f"A person at this hospital chose to share: {names}. There is no other statistic of patients here. Each "
            "answer is a fact about the records as a whole, which epsilon does not cover either."
        )
        stamps = (Notice(f"Numbers that are {EXACT}.", words),)
    sections = [
        Section("requirements", "What holds", (_answers(findings, details=False),)),
        Section("terms", "Study and versions", (_terms(study, site),)),
    ]
    if disclosed:
        rows = tuple((Cell(name), Cell(what), Cell(text), Cell(EXACT)) for name, what, text in disclosed)
        table = Table("disclosed-numbers", "Numbers shared", ("name", "what it is", "number", "how"), rows)
        sections.append(Section("disclosed", "Numbers that this hospital shares", (table,)))
    return Page(f"Records of {site} for study “{study.name}”", stamps, tuple(sections), MADE_BY)


def local(study: Study, site: str, found: Inspection) -> Page:
    """The page with everything that was counted, for this hospital alone."""
    sections = [Section("requirements", "What holds", (_answers(found.findings, details=True),))]
    if found.events is not None:
        sections += [_records(found, found.events), _numbers(found.events), _codes(found.events)]
    if found.lengths is not None:
        sections.append(_sequences(found.lengths, study))
    if found.outcome is not None:
        sections.append(_leaks(found.outcome, found.events))
    sections.append(Section("terms", "Study and versions", (_terms(study, site),)))
    return Page(f"Records of {site} for study “{study.name}”, in full", (LOCAL,), tuple(sections), MADE_BY)


def _answers(findings: list[Finding], *, details: bool) -> Table:
    if details:
        columns: tuple[str, ...] = ("requirement", "answer", "what was found")
        rows = tuple((Cell(one.name, note=one.words), Cell(one.answer), Cell(one.detail)) for one in findings)
    else:
        columns = ("requirement", "answer", "what it asks")
        rows = tuple((Cell(one.name), Cell(one.answer), Cell(one.words)) for one in findings)
    passed = sum(one.answer == "pass" for one in findings)
    return Table("answers", f"{passed} of {len(findings)} requirements hold", columns, rows)


def _terms(study: Study, site: str) -> Table:
    facts = (
        ("site", site),
        ("study", study.name),
        ("study's digest", study.digest()),
        ("task", study.task.name),
        ("feature schema", study.features.name),
        ("feature schema's digest", study.features.digest()),
        ("wardround", version("wardround")),
        ("wardround's code digest", code_digest()),
        ("polars", version("polars")),
        ("Python", platform.python_version()),
    )
    rows = tuple((Cell(what), Cell(value)) for what, value in facts)
    return Table("study-and-versions", "What was compared, by which program", ("what", "value"), rows)


def _records(found: Inspection, events: Events) -> Section:
    rows = [(Cell("patients with events"), whole(events.patients)), (Cell("events"), whole(events.fates.events))]
    if found.opted_out is not None:
        rows += [
            (Cell("opted out, listed"), whole(found.opted_out.listed)),
            (Cell("opted out, with records here: left out of every other count"), whole(found.opted_out.here)),
        ]
    if events.first is not None and events.last is not None:
        rows += [
            (Cell("earliest time"), Cell(f"{events.first:%Y-%m-%d %H:%M}")),
            (Cell("latest time"), Cell(f"{events.last:%Y-%m-%d %H:%M}")),
        ]
    rows += [
        (Cell("events with a time"), whole(events.timed)),
        (Cell("stamped exactly 00:00:00"), _of(events.at_midnight, events.timed)),
        (Cell("stamped 23:59:59"), _of(events.at_day_end, events.timed)),
    ]
    rows += [(Cell(f"patients with labels, {name}"), whole(count)) for name, count in (found.splits or {}).items()]
    total = events.fates.events
    fates = tuple((Cell(FATES[f.name]), _of(getattr(events.fates, f.name), total)) for f in fields(Coverage))
    return Section(
        "records",
        "Records",
        (
            Table("record-counts", "What is there", ("what", "count"), tuple(rows)),
            Table("event-fates", "What becomes of each event", ("fate", "events"), fates),
        ),
    )


def _numbers(events: Events) -> Section:
    rows = tuple(
        (
            Cell(one.code),
            Cell(one.unit),
            Cell(f"{one.low:g} to {one.high:g}"),
            whole(one.events),
            whole(one.patients),
            Cell("none") if _hidden(one.median, one.patients) else Cell(f"{one.median:.4g}", one.median),
            _of(one.outside, one.events),
            _of(one.without_number, one.events),
        )
        for one in events.measured
    )
    columns = ("code", "unit", "range", "events", "patients", "median", "outside", "no number")
    note = f"A share outside of the range above {OUTSIDE:.0%} often means another unit."
    blocks: tuple[Block, ...] = (
        (Table("schema-numbers", "The study's numbers as recorded here", columns, rows, note),)
        if rows
        else (Paragraph("The study reads no numbers over time."),)
    )
    return Section("numbers", "Numbers and units", blocks)


def _hidden(median: float | None, patients: int) -> bool:
    return median is None or patients < LEAST_PATIENTS


def _codes(events: Events) -> Section:
    unknown = events.unknown
    said = (
        f"{unknown.codes:,} codes occur that the study does not read. {unknown.rare:,} of them are held by fewer than "
        f"{LEAST_PATIENTS} patients and are not named."
    )
    rows = tuple((Cell(code), whole(count), whole(patients)) for code, count, patients in unknown.frequent)
    table = Table("unknown-codes", "The most frequent of the others", ("code", "events", "patients"), rows)
    return Section("codes", "Codes that are not read", (Paragraph(said), *([table] if rows else [])))


def _sequences(lengths: Lengths, study: Study) -> Section:
    rows = (
        (Cell("patients"), whole(lengths.patients)),
        (Cell("sequences (label rows)"), whole(lengths.sequences)),
        (Cell("positive labels"), _of(lengths.positives, lengths.sequences)),
        (Cell("prevalence that the study publishes"), Cell(f"{study.task.prevalence:.1%}", study.task.prevalence)),
        *(
            (Cell(f"steps, {what}"), whole(steps))
            for what, steps in zip(
                ("least", "10 % quantile", "median", "90 % quantile", "most"), lengths.quantiles, strict=True
            )
        ),
        (
            Cell(f"sequences of the full {study.records.max_steps} steps: older ones may be cut"),
            _of(lengths.full, lengths.sequences),
        ),
        (Cell("sequences with nothing recorded"), _of(lengths.empty, lengths.sequences)),
    )
    return Section(
        "sequences",
        "Sequences that train",
        (Table("sequence-counts", "The splits that train", ("what", "count"), rows),),
    )


def _leaks(outcome: Outcome, events: Events | None) -> Section:
    blocks: list[Block] = [
        Paragraph(
            "A model that can read the outcome before the prediction time looks excellent and is useless. No program "
            "can see when something was known; these codes are worth a look."
        )
    ]
    carriers, never = suspicious(outcome), never_positive(outcome)
    columns = ("code", "label rows", "patients", "positive")
    for name, caption, held in (
        ("outcome-codes", "Codes almost only with positive labels: does one of them record the outcome?", carriers),
        ("never-positive-codes", "Codes with no positive label, against expectation: can these be positive?", never),
    ):
        rows = tuple((Cell(h.code), whole(h.rows), whole(h.patients), _of(h.positives, h.rows)) for h in held)
        if rows:
            blocks.append(Table(name, caption, columns, rows))
    if outcome.same_day:
        days = tuple((Cell(code), whole(count)) for code, count in outcome.same_day)
        caption = "Codes written by date, at 00:00:00 of the very day of a prediction"
        blocks.append(Table("same-day-codes", caption, ("code", "label rows"), days))
    if len(blocks) == 1:
        blocks.append(Bullets(("No code stood out.",)))
    if events is not None and events.at_day_end:
        blocks.append(
            Paragraph("Rows stamped 23:59:59 count from the end of their day, so they cannot leak within it.")
        )
    return Section("leaks", "What could tell the outcome", tuple(blocks))


def _of(count: int, total: int) -> Cell:
    """A count with its share."""
    return Cell(f"{count:,}", count, note=f"{fixed(100 * count / total, 1)} %" if total else "")
