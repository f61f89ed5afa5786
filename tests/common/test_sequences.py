"""Ragged sequences: the fast builder against a plain one, and what must hold of every record."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import common.assembly
from common.errors import ConfigurationError, DataError
from common.schema import FeatureSchema, LevelsFeature, NumericFeature
from common.sequences import Sequences, build, check_trainable
from common.terms import parse

Event = tuple[int, datetime | None, str, float | None]
Label = tuple[int, datetime, bool]

START = datetime(2000, 1, 1)
MICROSECOND = timedelta(microseconds=1)
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
        "codes": ["DX//B", "DX//A"],
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
}


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


def make(events: list[Event], labels: list[Label], **changes: Any) -> Sequences:
    """Sequences of the small schema."""
    options: dict[str, Any] = {"max_steps": 10, "bin_hours": None, **changes}
    return build(events_frame(events), labels_frame(labels), SCHEMA, **options)


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
        mine = [e for e in events if e[0] == subject and (e[1] is None or e[1] <= prediction)]
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


def one_event(subject: int) -> st.SearchStrategy[Event]:
    """An event of a patient; statics often lack a time, other events rarely."""

    def of_code(code: str) -> st.SearchStrategy[Event]:
        time = st.none() | quarters if code in SCHEMA.statics else st.one_of(*[quarters] * 9, st.none())
        return st.tuples(st.just(subject), time, st.just(code), st.sampled_from(NUMBERS[code]))

    return recorded.flatmap(of_code)


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[list[Event], list[Label]]:
    """Up to four patients: ties, unknown codes, null and out-of-range numbers, several label rows each."""
    events: list[Event] = []
    labels: list[Label] = []
    for subject in draw(st.lists(st.integers(-3, 3), min_size=1, max_size=4, unique=True)):
        mine = draw(st.lists(one_event(subject), min_size=1, max_size=25))
        first = min((time for _, time, _, _ in mine if time is not None), default=START)
        at = draw(st.lists(st.tuples(quarters, st.booleans()), max_size=3, unique_by=lambda row: row[0]))
        events += mine
        labels += [(subject, time, label) for time, label in at if time >= first]
    assume(labels)
    assume(any(code != "UNKNOWN" for _, _, code, _ in events))
    return draw(st.permutations(events)), draw(st.permutations(labels))


options = st.fixed_dictionaries(
    {"max_steps": st.integers(1, 5), "bin_hours": st.sampled_from([None, 0.25, 0.75, 2.0, 5.0, 100.0])}
)


@settings(deadline=None, max_examples=200)
@given(cohorts(), options)
def test_build_equals_the_plain_builder(cohort: tuple[list[Event], list[Label]], how: dict[str, Any]) -> None:
    """Every array equals that of the loop over patients, for event times and bins, in any row order."""
    events, labels = cohort
    assert_equal(make(events, labels, **how), plain(events, labels, **how))


@settings(deadline=None, max_examples=80)
@given(cohorts(), options, st.integers(-4, 4))
def test_a_patient_never_changes_another(
    cohort: tuple[list[Event], list[Label]], how: dict[str, Any], subject: int
) -> None:
    """Without one patient's events and labels, all other patients' arrays stay the same, bit for bit."""
    events, labels = cohort
    rest = [event for event in events if event[0] != subject], [row for row in labels if row[0] != subject]
    assume(rest[1])
    assume(any(code != "UNKNOWN" for _, _, code, _ in rest[0]))
    everyone = make(events, labels, **how)
    others = everyone.select(np.flatnonzero(everyone.patient_id != subject))
    assert same(others, make(*rest, **how))


@settings(deadline=None, max_examples=50)
@given(cohorts(), options)
def test_the_future_never_matters(cohort: tuple[list[Event], list[Label]], how: dict[str, Any]) -> None:
    """Events later than a patient's last prediction change nothing."""
    events, labels = cohort
    events = [*events, *((who, START, "UNKNOWN", None) for who in {who for who, _, _ in labels})]
    until = {subject: max(time for who, time, _ in labels if who == subject) for subject, _, _ in labels}
    later: list[Event] = [(who, time + MICROSECOND, code, 3.0) for who, time in until.items() for code in NUMBERS]
    assert same(make(events, labels, **how), make(events + later, labels, **how))


@pytest.mark.parametrize("block", [1, 50])
@settings(deadline=None, max_examples=30)
@given(cohort=cohorts(), how=options)
def test_size_of_blocks_never_matters(block: int, cohort: tuple[list[Event], list[Label]], how: dict[str, Any]) -> None:
    """The number of sequences that are worked on at once is a matter of memory only."""
    whole = make(*cohort, **how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.assembly, "BLOCK", block)
        assert same(whole, make(*cohort, **how))


def test_types_are_those_of_the_docstring() -> None:
    """Each array has the documented type, and can be written to (torch shares its memory)."""
    records = make([(1, hours(0), "HR", 80.0)], [(1, hours(1), True)])
    types = {field.name: str(getattr(records, field.name).dtype) for field in dataclasses.fields(Sequences)}
    assert types == {
        **dict.fromkeys(["patient_id", "patient", "start", "codes", "code_start"], "int64"),
        **dict.fromkeys(["values", "gap", "statics", "label"], "float32"),
        "measured": "bool",
        "prediction_time": "datetime64[us]",
    }
    assert all(getattr(records, field.name).flags.writeable for field in dataclasses.fields(Sequences))


def test_event_at_the_prediction_time_counts() -> None:
    """Data up to and including the prediction time are used, a microsecond later is not."""
    late: Event = (1, hours(5) + MICROSECOND, "HR", 200.0)
    records = make([(1, hours(0), "HR", 85.0), (1, hours(5), "HR", 103.0), late], [(1, hours(5), True)])
    assert records.values[:, SCHEMA.value_codes.index("HR")].tolist() == pytest.approx([0.0, 1.0])


def test_bins_are_closed_at_their_late_end() -> None:
    """An event exactly k bins before the prediction belongs to bin k; a microsecond earlier, to bin k + 1."""
    events: list[Event] = [(1, hours(10), "DX//A", None), (1, hours(8), "DX//B", None)]
    assert make(events, [(1, hours(10), True)], bin_hours=2).n_steps == 2
    events[1] = (1, hours(8) + MICROSECOND, "DX//B", None)
    assert make(events, [(1, hours(10), True)], bin_hours=2).n_steps == 1


def test_limits_are_inclusive_in_float32() -> None:
    """A pH of exactly the upper limit is kept, though its float32 form is above 7.9."""
    records = make([(1, hours(0), "PH", 7.9)], [(1, hours(0), True)])
    assert records.measured[0, SCHEMA.value_codes.index("PH")]


def test_cut_keeps_what_was_known_before() -> None:
    """The value last measured before the kept steps is carried, none older; the first gap reaches over the cut."""
    early: list[Event] = [(1, hours(0), "HR", 67.0), (1, hours(1), "HR", 103.0)]
    records = make([*early, (1, hours(7), "DX//A", None)], [(1, hours(8), True)], max_steps=1)
    hr = SCHEMA.value_codes.index("HR")
    assert (records.values[0, hr], records.measured[0, hr]) == (1.0, False)
    assert records.gap.tolist() == pytest.approx([math.log(1 + 6 / 2) - 0.7])


def test_own_value_of_the_first_kept_step_stands() -> None:
    """What was known before the cut never overwrites what the first kept step measured."""
    events: list[Event] = [(1, hours(0), "HR", 67.0), (1, hours(1), "HR", 103.0)]
    records = make(events, [(1, hours(8), True)], max_steps=1)
    assert records.values[0, SCHEMA.value_codes.index("HR")] == 1.0


@pytest.mark.parametrize(
    "events",
    [
        [(1, None, "AGE", 75.0)],
        [(1, None, "AGE", 75.0), (1, hours(0), "UNKNOWN", 5.0)],
        [(1, None, "AGE", 75.0), (1, hours(0), "HR", 9999.0)],
        [(1, None, "AGE", 75.0), (1, hours(0), "HR", None)],
        [(1, None, "AGE", 75.0), (1, None, "HR", 80.0)],
        [(1, None, "AGE", 75.0), (1, hours(0), "UNKNOWN", 5.0), (1, hours(3), "HR", 80.0)],
    ],
)
def test_nothing_usable_is_one_empty_step(events: list[Event]) -> None:
    """A patient with events but none usable in time is one step with nothing measured, not a refusal."""
    records = make(events, [(1, hours(2), True)])
    assert records.n_steps == 1
    assert not records.measured.any()
    assert not records.values.any()
    assert records.codes.size == 0
    assert records.statics[0, 0] == 1.0


def test_schema_without_values_or_without_codes() -> None:
    """A schema of codes alone and a schema of values alone both work."""
    events: list[Event] = [(1, hours(0), "HR", 85.0), (1, hours(1), "DX//A", None)]
    for group, nothing in (("values", {}), ("codes", ())):
        schema = SCHEMA.model_copy(update={group: nothing})
        records = build(events_frame(events), labels_frame([(1, hours(2), True)]), schema, max_steps=3, bin_hours=None)
        assert records.n_steps == 1
        assert records.values.shape == (1, schema.n_values)


@settings(deadline=None, max_examples=50)
@given(cohorts(), options, st.lists(st.integers(0, 3), max_size=6))
def test_select_equals_building_from_the_selected(
    cohort: tuple[list[Event], list[Label]], how: dict[str, Any], chosen: list[int]
) -> None:
    """Selecting patients gives what building from their records gives, in ascending order, each once."""
    events, labels = cohort
    everyone = make(events, labels, **how)
    chosen = [index for index in chosen if index < everyone.n_patients]
    part = everyone.select(np.array(chosen, np.int64))
    subjects = {everyone.patient_id[index] for index in chosen}
    assert_equal_or_empty(part, plain(events, [row for row in labels if row[0] in subjects], **how))


def assert_equal_or_empty(got: Sequences, want: list[Record]) -> None:
    """As `assert_equal`; no records at all are empty arrays of the right width."""
    if want:
        assert_equal(got, want)
    else:
        assert (got.n_patients, got.n_sequences, got.n_steps) == (0, 0, 0)
        assert got.values.shape == (0, SCHEMA.n_values)
        assert got.statics.shape == (0, SCHEMA.n_statics)
        assert got.start.tolist() == got.code_start.tolist() == [0]


@pytest.mark.parametrize("chosen", [[1], [-1], [0, 5], [True], [0.0]])
def test_select_refuses_what_is_no_index(chosen: list[Any]) -> None:
    """An index outside [0, P), a mask or a float is refused instead of being read as something else."""
    records = make([(1, hours(0), "HR", 80.0)], [(1, hours(1), True)])
    with pytest.raises(DataError, match="select: "):
        records.select(chosen)


def test_empty_list_selects_nobody() -> None:
    """A Poisson batch may be empty: selecting nobody is valid."""
    records = make([(1, hours(0), "HR", 80.0)], [(1, hours(1), True)])
    assert records.select([]).n_patients == 0


def test_records_are_not_printed() -> None:
    """A log line or a failed assertion that prints Sequences shows no patient and no count."""
    records = make([(987654321, hours(0), "HR", 80.0)], [(987654321, hours(1), True)])
    assert repr(records) == "Sequences(records of patients, not printed)"


def test_shapes_are_checked() -> None:
    """Arrays that do not belong together are refused when they are put together."""
    records = make([(1, hours(0), "HR", 80.0)], [(1, hours(1), True)])
    with pytest.raises(DataError, match=r"`label` has shape \(2,\), expected \(1,\)"):
        dataclasses.replace(records, label=np.zeros(2, np.float32))


TWO: list[Event] = [(1, hours(0), "HR", 80.0), (2, hours(0), "HR", 80.0)]


@pytest.mark.parametrize(
    ("events", "labels", "word"),
    [
        (TWO, [(1, hours(1), True), (2, hours(1), True)], "all 2 labels are the same"),
        (
            [(1, hours(0), "UNKNOWN", 1.0), (2, hours(0), "UNKNOWN", 1.0), (2, None, "AGE", 50.0)],
            [(1, hours(1), True), (2, hours(1), False)],
            "no step of 2 sequences",
        ),
    ],
)
def test_untrainable_records_are_refused_before_enrolment(events: list[Event], labels: list[Label], word: str) -> None:
    """Records that build but could not train anything are refused by the check, and only there."""
    records = make(events, labels)
    with pytest.raises(DataError, match=word):
        check_trainable(records, "site A")


def test_trainable_records_pass_and_nobody_does_not() -> None:
    """Both classes and one measured value suffice; no patients do not."""
    records = make(TWO, [(1, hours(1), True), (2, hours(1), False)])
    check_trainable(records)
    with pytest.raises(DataError, match="0 patients"):
        check_trainable(records.select([]))


@pytest.mark.parametrize(
    "how",
    [
        {"max_steps": 0},
        {"bin_hours": 0.0},
        {"bin_hours": -1.0},
        {"bin_hours": math.nan},
        {"bin_hours": 1e300},
    ],
)
def test_impossible_options_are_refused(how: dict[str, Any]) -> None:
    """No step at all, or a bin without width, is a fault of the configuration."""
    with pytest.raises(ConfigurationError, match=r"max_steps|bin_hours"):
        make(TWO, [(1, hours(1), True)], **how)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([(1, hours(1), True), (3, hours(1), True)], ["1 of 2 label rows", "without any event"]),
        (
            [(1, hours(1), True), (2, hours(-1), True)],
            ["`prediction_time`", "1 of 2 label rows", "first event"],
        ),
    ],
)
def test_labels_that_do_not_fit_the_events_are_refused(labels: list[Label], words: list[str]) -> None:
    """A label row without any event of its patient, or before the first one, is refused with the count."""
    with pytest.raises(DataError) as caught:
        make(TWO, labels, label_source="task.parquet")
    for word in ["task.parquet", "remove the rows", *words]:
        assert word in str(caught.value)


def test_no_known_code_at_all_is_refused_without_naming_the_sites_codes() -> None:
    """A data set in which no event fits the schema is refused; the message lists codes of the schema only."""
    with pytest.raises(DataError) as caught:
        make([(1, hours(0), "SECRET//CODE", 1.0)], [(1, hours(1), True)])
    message = str(caught.value)
    assert "0 of 1 events carry a code of schema small" in message
    assert "`HR`, `LACTATE`, `PH`" in message
    assert "SECRET" not in message


@pytest.mark.parametrize("change", [lambda e: e.with_columns(pl.col("time").cast(pl.Datetime("ns")))])
def test_other_time_units_mean_the_same(change: Callable[[pl.LazyFrame], pl.LazyFrame]) -> None:
    """Date-times in nanoseconds, as pandas writes them, give the same sequences."""
    labels = labels_frame([(1, hours(1), True), (2, hours(1), False)])
    one = build(events_frame(TWO), labels, SCHEMA, max_steps=3, bin_hours=None)
    assert same(one, build(change(events_frame(TWO)), labels, SCHEMA, max_steps=3, bin_hours=None))
