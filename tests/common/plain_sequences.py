"""A small feature schema, small cohorts, and the plain builder of sequences: one loop per patient and label row."""

from __future__ import annotations

import dataclasses
import math
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
from hypothesis import assume
from hypothesis import strategies as st

from common.schema import FeatureSchema, LevelsFeature, NumericFeature
from common.sequences import Sequences
from common.terms import parse

Event = tuple[int, datetime | None, str, float | None]
Label = tuple[int, datetime, bool]

START = datetime(2000, 1, 1)
SCHEMA = parse(
    {
        "version": 1,
        "name": "small",
        "source": "made up",
        "values": {
            "HR": {"centre": 85, "scale": 18, "unit": "bpm", "min": 15, "max": 250, "basis": "icu"},
            "PH": {"centre": 7.38, "scale": 0.07, "unit": "pH", "min": 6.6, "max": 7.9, "basis": "icu"},
            "LACTATE": {
                "centre": 1.1,
                "scale": 0.45,
                "log": True,
                "unit": "mmol/L",
                "min": 0.2,
                "max": 35,
                "basis": "icu",
            },
        },
        "codes": ["DX//B", "DX//A", "DX//{7..8}", "DX//E1"],
        "shorten": {"DX//": {"before": "."}, "DX//E": {"characters": 1}},
        "statics": {
            "AGE": {"centre": 60, "scale": 15, "unit": "years", "min": 0, "max": 120, "basis": "adults"},
            "UNIT": {"levels": [1, 2, 4], "basis": "flag"},
            "SEX//F": {"present": True, "basis": "flag"},
        },
        "time_gap": {"unit_hours": 2, "centre": 0.7},
    },
    FeatureSchema,
    "small",
)
NUMBERS: dict[str, list[float | None]] = {  # what may be recorded under each code: mostly usable
    "HR": [80.0, 85.0, 103.0, 120.0, 15.0, 250.0, 251.0, None],
    "PH": [7.2, 7.38, 7.9, 8.0],
    "LACTATE": [0.2, 1.0, 4.0, 35.0, 0.1],
    "DX//A": [None, 1.0],
    "DX//B": [None],
    "AGE": [60.0, 75.0, 120.0, 121.0],
    "UNIT": [1.0, 2.0, 3.0, 4.0, 5.0, None],
    "SEX//F": [None, 1.0],
    "UNKNOWN": [None, 1.0],
    "DX//7": [None],
    "DX//7.25": [None, 3.0],
    "DX//7.x.y": [None],
    "DX//9.1": [None],
    "DX//E12.3": [None],
}
COUNTS_AS = {"DX//7.25": "DX//7", "DX//7.x.y": "DX//7", "DX//E12.3": "DX//E1"}  # what `shorten` above means


def hours(number: float) -> datetime:
    """The time `number` hours after the start."""
    return START + timedelta(hours=number)


def events_frame(events: list[Event]) -> pl.LazyFrame:
    """Events as a MEDS table."""
    types = {
        "subject_id": pl.Int64(),
        "time": pl.Datetime("us"),
        "code": pl.String(),
        "numeric_value": pl.Float32(),
    }
    return pl.LazyFrame(events, schema=types, orient="row")


def labels_frame(labels: list[Label]) -> pl.DataFrame:
    """Label rows as a MEDS table."""
    types = {"subject_id": pl.Int64(), "prediction_time": pl.Datetime("us"), "boolean_value": pl.Boolean()}
    return pl.DataFrame(labels, schema=types, orient="row")


@dataclasses.dataclass
class Step:
    """One step of the plain builder."""

    values: list[float]
    measured: list[bool]
    gap: float
    codes: list[int]


@dataclasses.dataclass
class Record:
    """One sequence of the plain builder."""

    subject: int
    steps: list[Step]
    statics: list[float]
    label: bool
    time: datetime


def scaled(feature: NumericFeature, numbers: list[float]) -> float:
    """The mean of `numbers`, scaled and cut."""
    mean = math.fsum(numbers) / len(numbers)
    axis = math.log(mean + 1) if feature.log else mean
    return max(-4.0, min(4.0, (axis - feature.centre) / feature.scale))


def inside(feature: NumericFeature, number: float | None) -> bool:
    """Whether a recorded number is within the limits, all in float32 as the table has it."""
    low, high = np.float32(feature.min), np.float32(feature.max)
    return number is not None and bool(low <= np.float32(number) <= high)


def plain_statics(mine: list[Event]) -> list[float]:
    """The static columns from one patient's events up to the prediction time."""
    columns: list[float] = []
    for code, static in SCHEMA.statics.items():
        found = [(time or datetime.min, number) for _, time, name, number in mine if name == code]
        if isinstance(static, NumericFeature):
            found = [(time, number) for time, number in found if inside(static, number)]
        elif isinstance(static, LevelsFeature):
            found = [(time, number) for time, number in found if number in static.levels]
        newest = max((time for time, _ in found), default=None)
        numbers = [float(np.float32(number)) for time, number in found if time == newest and number is not None]
        if isinstance(static, NumericFeature):
            columns.append(scaled(static, numbers) if numbers else 0.0)
        elif isinstance(static, LevelsFeature):
            columns += [float(bool(numbers) and max(numbers) == level) for level in static.levels]
        else:
            columns.append(float(bool(found)))
    return columns


def plain_steps(mine: list[Event], prediction: datetime, max_steps: int, width: timedelta | None) -> list[Step]:
    """The steps from one patient's events up to the prediction time."""
    runs: dict[Any, list[Event]] = {}
    for event in mine:
        _, time, code, number = event
        value_ok = code in SCHEMA.values and inside(SCHEMA.values[code], number)
        if time is None or not (value_ok or code in SCHEMA.codes):
            continue
        place = time if width is None else -((prediction - time) // width)
        runs.setdefault(place, []).append(event)
    steps: list[Step] = []
    carried = [0.0] * SCHEMA.n_values
    before: datetime | None = None
    for place in sorted(runs):
        run = runs[place]
        measured = []
        for column, (code, feature) in enumerate(SCHEMA.values.items()):
            numbers = [float(np.float32(n)) for _, _, name, n in run if name == code and n is not None]
            measured.append(bool(numbers))
            if numbers:
                carried[column] = scaled(feature, numbers)
        latest = max(time for _, time, _, _ in run if time is not None)
        gap = 0.0 if before is None else (latest - before) / timedelta(hours=1)
        before = latest
        codes = sorted({SCHEMA.codes.index(name) for _, _, name, _ in run if name in SCHEMA.codes})
        gap_input = math.log(1 + gap / SCHEMA.time_gap.unit_hours) - SCHEMA.time_gap.centre
        steps.append(Step(list(carried), measured, gap_input, codes))
    nothing = Step([0.0] * SCHEMA.n_values, [False] * SCHEMA.n_values, -SCHEMA.time_gap.centre, [])
    return steps[-max_steps:] or [nothing]


def plain(events: list[Event], labels: list[Label], max_steps: int, bin_hours: float | None) -> list[Record]:
    """The obviously right builder: one loop per label row over one patient's events."""
    width = None if bin_hours is None else timedelta(hours=bin_hours)
    records = []
    for subject, prediction, label in sorted(labels):
        seen = [e for e in events if e[0] == subject and (e[1] is None or e[1] <= prediction)]
        mine = [(who, time, COUNTS_AS.get(code, code), number) for who, time, code, number in seen]
        steps = plain_steps(mine, prediction, max_steps, width)
        records.append(Record(subject, steps, plain_statics(mine), label, prediction))
    return records


def assert_equal(got: Sequences, want: list[Record]) -> None:
    """The arrays say what the plain records say."""
    subjects = sorted({record.subject for record in want})
    assert got.patient_id.tolist() == subjects
    assert got.patient.tolist() == [subjects.index(record.subject) for record in want]
    assert got.start.tolist() == np.cumsum([0, *(len(record.steps) for record in want)]).tolist()
    steps = [step for record in want for step in record.steps]
    assert got.measured.tolist() == [step.measured for step in steps]
    np.testing.assert_allclose(got.values, [step.values for step in steps], atol=2e-5)
    np.testing.assert_allclose(got.gap, [step.gap for step in steps], atol=1e-6)
    assert got.codes.tolist() == [code for step in steps for code in step.codes]
    assert got.code_start.tolist() == np.cumsum([0, *(len(step.codes) for step in steps)]).tolist()
    np.testing.assert_allclose(got.statics, [record.statics for record in want], atol=1e-6)
    assert got.label.tolist() == [float(record.label) for record in want]
    assert got.prediction_time.tolist() == [record.time for record in want]


def same(one: Sequences, other: Sequences) -> bool:
    """Bit for bit the same arrays of the same types."""
    pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(Sequences)]
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


quarters = st.integers(0, 24).map(lambda number: hours(number / 4))
recorded = st.sampled_from(["HR"] * 6 + sorted(NUMBERS))  # one value often, so that histories have depth


def is_known(code: str) -> bool:
    """Whether the small schema has a use for a code."""
    return code not in ("UNKNOWN", "DX//9.1")


def one_event(subject: int) -> st.SearchStrategy[Event]:
    """An event of a patient; statics often lack a time, other events rarely."""

    def of_code(code: str) -> st.SearchStrategy[Event]:
        time = st.none() | quarters if code in SCHEMA.statics else st.one_of(*[quarters] * 9, st.none())
        return st.tuples(st.just(subject), time, st.just(code), st.sampled_from(NUMBERS[code]))

    return recorded.flatmap(of_code)


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[list[Event], list[Label]]:
    """Up to three patients: ties, unknown codes, null and out-of-range numbers, several label rows each."""
    events: list[Event] = []
    labels: list[Label] = []
    for subject in draw(st.lists(st.integers(-3, 3), min_size=1, max_size=3, unique=True)):
        size = draw(st.integers(1, 25))  # drawn first: lists alone are mostly short, and then nothing is cut
        mine = draw(st.lists(one_event(subject), min_size=size, max_size=size))
        first = min((time for _, time, _, _ in mine if time is not None), default=START)
        at = draw(st.lists(st.tuples(quarters, st.booleans()), max_size=3, unique_by=lambda row: row[0]))
        events += mine
        labels += [(subject, time, label) for time, label in at if time >= first]
    assume(labels)
    assume(any(is_known(code) for _, _, code, _ in events))
    return draw(st.permutations(events)), draw(st.permutations(labels))
