"""A patient's admissions, discharges and death -> stays: plain times in, plain stays out, patient by patient.

A stay goes from an admission to the first discharge or death from then on. Admissions in between are moves within it.
An end at the very moment of the admission is that of the stay before, if that one ended then; else the stay took no
time, as where both are written by date. Were it ignored, the stay would last until the end of the next one.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True)
class Patient:
    """Times of one patient's events [each ascending]; `codes`: of the code set that the task asks about."""

    admissions: Sequence[datetime]
    discharges: Sequence[datetime]
    deaths: Sequence[datetime]
    codes: Sequence[datetime] = ()


@dataclass(frozen=True)
class Stay:
    """From an admission to its end, if that is known; `died`: the end is a death."""

    start: datetime
    end: datetime | None
    died: bool = False


def stays_of(patient: Patient) -> list[Stay]:
    """All stays, oldest first; only the last one can be without an end."""
    stays: list[Stay] = []
    for start in patient.admissions:
        before = stays[-1] if stays else None
        if before is not None and (before.end is None or start < before.end or start == before.start):
            continue  # a move within the stay, or the same admission written twice
        first = first_after if before is not None and start == before.end else _first_from
        discharge, death = first(patient.discharges, start), first(patient.deaths, start)
        died = death is not None and (discharge is None or death <= discharge)
        stays.append(Stay(start, death if died else discharge, died))
    return stays


def first_after(times: Sequence[datetime], moment: datetime) -> datetime | None:
    """The first of ascending times that is later than a moment."""
    place = bisect_right(times, moment)
    return times[place] if place < len(times) else None


def _first_from(times: Sequence[datetime], moment: datetime) -> datetime | None:
    """The first of ascending times that is not earlier than a moment."""
    place = bisect_left(times, moment)
    return times[place] if place < len(times) else None
