"""A patient's admissions, discharges and death -> stays -> labels: plain times in, plain rows out, patient by patient.

Every label has a horizon, and is a function of the patient's own events up to it: nothing later, and nobody else, can
change it. What makes it true lies strictly after the prediction time, so it is in no input (events up to and including
the prediction time are).

Decisions a reader would question:

- A stay goes from an admission to the first discharge or death after it. Admissions in between are moves within it.
- A stay without an end, and a horizon beyond `observed_until`, give no label, also where the outcome was already seen:
  to keep such positives and drop such negatives would make the outcome look frequent.
- With `first`, only the first stay is looked at; if it has no label, the patient has none. To go on to the next one
  would choose patients by how their first stay ended.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from client.labels.terms import DeathInStay, Readmission, Stays

NO_END = "stays without an end in the records"
ENDED = "stays that had ended by the prediction time"
DIED = "stays that ended with death"
CENSORED = "stays whose horizon lies beyond `observed_until`"


@dataclass(frozen=True)
class Patient:
    """Times of one patient's events [each ascending]."""

    admissions: Sequence[datetime]
    discharges: Sequence[datetime]
    deaths: Sequence[datetime]


@dataclass(frozen=True)
class Stay:
    """From an admission to its end, if that is known; `died`: the end is a death."""

    start: datetime
    end: datetime | None
    died: bool = False


@dataclass(frozen=True)
class Labelled:
    """One label row: predicted at `at`, looking at events in (at, horizon]."""

    at: datetime
    positive: bool
    horizon: datetime


def stays_of(patient: Patient) -> list[Stay]:
    """All stays, oldest first; only the last one can be without an end."""
    stays: list[Stay] = []
    for start in patient.admissions:
        if stays and (stays[-1].end is None or start < stays[-1].end):
            continue  # a move within the stay, or the same admission written twice
        discharge, death = _first_after(patient.discharges, start), _first_after(patient.deaths, start)
        died = death is not None and (discharge is None or death <= discharge)
        stays.append(Stay(start, death if died else discharge, died))
    return stays


def label_rows(
    patient: Patient, label: DeathInStay | Readmission, until: datetime, left_out: Counter[str]
) -> list[Labelled]:
    """The label rows of one patient, in ascending order of time; what has none is counted in `left_out`.

    Args:
        patient: all events of the three kinds.
        label: the task's.
        until: up to when the records are complete.
        left_out: reason -> number of stays; added to.
    """
    rows = []
    for stay in _chosen(stays_of(patient), label.stays):
        if isinstance(label, DeathInStay):
            found = _death(stay, patient, label, until)
        else:
            found = _readmission(stay, patient, label, until)
        if isinstance(found, Labelled):
            rows.append(found)
        else:
            left_out[found] += 1
    return rows


def _chosen(stays: list[Stay], which: Stays) -> list[Stay]:
    return stays[:1] if which == "first" else stays


def _death(stay: Stay, patient: Patient, label: DeathInStay, until: datetime) -> Labelled | str:
    at = stay.start + timedelta(hours=label.after_hours)
    if stay.end is None:
        return NO_END if at <= until else CENSORED
    if stay.end <= at:
        return ENDED
    horizon = stay.end if stay.died else stay.end + timedelta(hours=label.grace_hours)
    if horizon > until:
        return CENSORED
    death = _first_after(patient.deaths, at)
    return Labelled(at, death is not None and death <= horizon, horizon)


def _readmission(stay: Stay, patient: Patient, label: Readmission, until: datetime) -> Labelled | str:
    if stay.end is None:
        return NO_END
    death = _first_after(patient.deaths, stay.start)
    if death is not None and death <= stay.end + timedelta(hours=label.grace_hours):
        return DIED
    last = stay.end + timedelta(days=label.within_days)
    horizon = max(last, stay.end + timedelta(hours=label.grace_hours))
    if horizon > until:
        return CENSORED
    again = _first_after(patient.admissions, stay.end)
    return Labelled(stay.end, again is not None and again <= last, horizon)


def _first_after(times: Sequence[datetime], moment: datetime) -> datetime | None:
    """The first of ascending times that is later than a moment."""
    place = bisect_right(times, moment)
    return times[place] if place < len(times) else None
