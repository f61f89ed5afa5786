"""A patient's stays -> label rows, by a template: one rule a template, each a function of one patient's times.

Every label has a horizon, and is a function of the patient's own events up to it: nothing later, and nobody else, can
change it. What makes it true lies strictly after the prediction time, so it is in no input (events up to and including
the prediction time are).

Decisions a reader would question:

- A horizon beyond `observed_until` gives no label, also where the outcome was already seen: to keep such positives and
  drop such negatives would make the outcome look frequent. Nor does a stay without an end, where the end is needed.
- With `first`, only the first stay is looked at; if it has no label, the patient has none. To go on to the next one
  would choose patients by how their first stay ended.
- A long stay needs no end: that it had none in time is what is asked. Stays that still last when the extract ends are
  the longest, and to leave them out would leave out positives alone. The price: a discharge that was never written
  makes a long stay.
- A death within the horizon of a first code is a negative: this patient has been followed to the end, and the code did
  not come. To leave such rows out would choose patients by what happened after the prediction.
- Which visit is the next one is known only afterwards, and whoever has none is not asked about: the label is about what
  is coded at a next visit, given that there is one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta

from client.labels.stays import Patient, Stay, first_after, stays_of
from client.labels.terms import DeathInStay, FirstCode, Label, LongStay, NextVisit, Readmission

NO_END = "stays without an end in the records"
ENDED = "stays that had ended by the prediction time"
DIED = "stays that ended with death"
DEAD = "stays of patients who had died by the prediction time"
CENSORED = "stays whose horizon lies beyond `observed_until`"
HAD = "stays of patients who had a code of the set before"
NO_NEXT = "stays after which no other is seen"


@dataclass(frozen=True)
class Labelled:
    """One label row: predicted at `at`, looking at events in (at, horizon]."""

    at: datetime
    positive: bool
    horizon: datetime


def label_rows(patient: Patient, label: Label, until: datetime, left_out: Counter[str]) -> list[Labelled]:
    """The label rows of one patient, in ascending order of time; what has none is counted in `left_out`.

    Args:
        patient: all events of the kinds that are asked about.
        label: the task's.
        until: up to when the records are complete.
        left_out: reason -> number of stays; added to.
    """
    stays = stays_of(patient)
    rows = []
    for place in range(min(len(stays), 1) if label.stays == "first" else len(stays)):
        found = _label(stays, place, patient, label, until)
        if isinstance(found, Labelled):
            rows.append(found)
        else:
            left_out[found] += 1
    return rows


def _label(stays: list[Stay], place: int, patient: Patient, label: Label, until: datetime) -> Labelled | str:
    if isinstance(label, DeathInStay):
        return _death(stays[place], patient, label, until)
    if isinstance(label, Readmission):
        return _readmission(stays[place], patient, label, until)
    if isinstance(label, LongStay):
        return _long_stay(stays[place], label, until)
    if isinstance(label, FirstCode):
        return _first_code(stays[place], patient, label, until)
    return _next_visit(stays[place : place + 3], patient, label, until)


def _death(stay: Stay, patient: Patient, label: DeathInStay, until: datetime) -> Labelled | str:
    at = stay.start + timedelta(hours=label.after_hours)
    if stay.end is None:
        return NO_END if at <= until else CENSORED
    if stay.end <= at:
        return ENDED
    horizon = stay.end if stay.died else stay.end + timedelta(hours=label.grace_hours)
    if horizon > until:
        return CENSORED
    death = first_after(patient.deaths, at)
    return Labelled(at, death is not None and death <= horizon, horizon)


def _readmission(stay: Stay, patient: Patient, label: Readmission, until: datetime) -> Labelled | str:
    if stay.end is None:
        return NO_END
    death = first_after(patient.deaths, stay.start)
    if stay.died or (death is not None and death <= stay.end + timedelta(hours=label.grace_hours)):
        return DIED
    last = stay.end + timedelta(days=label.within_days)
    horizon = max(last, stay.end + timedelta(hours=label.grace_hours))
    if horizon > until:
        return CENSORED
    again = first_after(patient.admissions, stay.end)
    return Labelled(stay.end, again is not None and again <= last, horizon)


def _long_stay(stay: Stay, label: LongStay, until: datetime) -> Labelled | str:
    at, horizon = stay.start + timedelta(hours=label.after_hours), stay.start + timedelta(days=label.over_days)
    if stay.end is not None and stay.end <= at:
        return ENDED
    if horizon > until:
        return CENSORED
    return Labelled(at, stay.end is None or stay.end > horizon, horizon)


def _first_code(stay: Stay, patient: Patient, label: FirstCode, until: datetime) -> Labelled | str:
    begins = stay.start if label.predict == "admission" else stay.end
    if begins is None:
        return NO_END
    at = begins + timedelta(hours=label.after_hours)
    horizon = at + timedelta(days=label.within_days)
    if horizon > until:
        return CENSORED
    if patient.codes and patient.codes[0] <= at + timedelta(hours=label.grace_hours):
        return HAD
    if patient.deaths and patient.deaths[0] <= at:
        return DEAD
    return Labelled(at, bool(patient.codes) and patient.codes[0] <= horizon, horizon)


def _next_visit(stays: list[Stay], patient: Patient, label: NextVisit, until: datetime) -> Labelled | str:
    """`stays`: the stay, the next one, and the one after that, as far as they are there."""
    stay, following = stays[0], stays[1:]
    if stay.end is None:
        return NO_END
    if stay.died:
        return DIED
    if not following:
        return NO_NEXT
    visit = following[0]
    if visit.end is None:
        return NO_END
    horizon = visit.end + timedelta(hours=label.grace_hours)
    if horizon > until:
        return CENSORED
    later = following[1].start if len(following) > 1 else None
    seen = [
        time
        for time in patient.codes
        if visit.start <= time <= horizon and time > stay.end and (later is None or time < later or time <= visit.end)
    ]
    return Labelled(stay.end, bool(seen), horizon)
