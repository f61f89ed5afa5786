"""Ragged sequences: the fast builder against a plain one, and what must hold of every record."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import common.assembly
from common.errors import ConfigurationError, DataError
from common.sequences import Sequences, build, check_trainable
from tests.common.plain_sequences import (
    NUMBERS,
    SCHEMA,
    START,
    Event,
    Label,
    Record,
    assert_equal,
    cohorts,
    events_frame,
    hours,
    is_known,
    labels_frame,
    plain,
    same,
)

MICROSECOND = timedelta(microseconds=1)


def make(events: list[Event], labels: list[Label], **changes: Any) -> Sequences:
    """Sequences of the small schema."""
    options: dict[str, Any] = {"max_steps": 10, "bin_hours": None, **changes}
    return build(events_frame(events), labels_frame(labels), SCHEMA, **options)


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
    assume(any(is_known(code) for _, _, code, _ in rest[0]))
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


def test_finer_codes_count_once_as_their_listed_parent() -> None:
    """Two finer codes of one listed code, at one step, are that code once; a finer code of none is ignored."""
    events: list[Event] = [(1, hours(0), code, None) for code in ("DX//7.25", "DX//7.x.y", "DX//7", "DX//9.1")]
    records = make(events, [(1, hours(1), True)])
    assert records.codes.tolist() == [SCHEMA.codes.index("DX//7")]


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
