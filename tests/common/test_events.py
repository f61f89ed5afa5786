"""Tables of events and labels: what is refused, in words that give no patient away, and the count of fates."""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Any

import polars as pl
import pytest

from common.errors import DataError
from common.events import LISTED, Coverage, checked_labels, features, known_codes, survey, typed_events
from common.schema import FeatureSchema
from tests.common.plain_sequences import SCHEMA, events_frame, hours

ID = 987654321
NUMBER = 77.125
EVENTS = pl.DataFrame(
    {"subject_id": [ID, ID], "time": [hours(0), None], "code": ["HR", "AGE"], "numeric_value": [NUMBER, NUMBER]},
    schema_overrides={"numeric_value": pl.Float32, "time": pl.Datetime("us")},
)
LABELS = pl.DataFrame({"subject_id": [ID, ID], "prediction_time": [hours(1), hours(2)], "boolean_value": [True, False]})


def with_column(frame: pl.DataFrame, name: str, values: list[Any], kind: Any = None) -> pl.DataFrame:
    """The frame with one column replaced."""
    return frame.with_columns(pl.Series(name, values, dtype=kind))


def assert_speaks_of(error: DataError, words: list[str]) -> None:
    """The message holds the source and the words, and neither the patient's id nor the number."""
    message = str(error)
    for word in ["shard.parquet", *words]:
        assert word in message
    assert str(ID) not in message
    assert str(NUMBER) not in message


@pytest.mark.parametrize(
    ("events", "words"),
    [
        (EVENTS.drop("subject_id"), ["`subject_id` is missing", "unit of privacy"]),
        (EVENTS.drop("time"), ["`time` is missing"]),
        (EVENTS.drop("code"), ["`code` is missing"]),
        (EVENTS.drop("numeric_value"), ["`numeric_value` is missing", "schema small"]),
        (with_column(EVENTS, "subject_id", [1.0, 2.0]), ["`subject_id` is Float64", "64-bit integer"]),
        (with_column(EVENTS, "subject_id", ["a", "b"]), ["`subject_id` is String", "64-bit integer"]),
        (with_column(EVENTS, "time", [date(2000, 1, 1)] * 2), ["`time` is Date", "leak"]),
        (with_column(EVENTS, "time", ["2000-01-01"] * 2), ["`time` is String", "date-time"]),
        (
            with_column(EVENTS, "time", [datetime(2000, 1, 1, tzinfo=UTC)] * 2),
            ["`time` has the time zone UTC", "without a zone"],
        ),
        (with_column(EVENTS, "code", [1, 2]), ["`code` is Int64", "strings"]),
        (with_column(EVENTS, "numeric_value", ["77.125", "x"]), ["`numeric_value` is String", "float32"]),
        (with_column(EVENTS, "subject_id", [ID, None]), ["`subject_id` is null in 1 of 2", "unit of privacy"]),
        (with_column(EVENTS, "code", ["HR", None]), ["`code` is null in 1 of 2"]),
        (with_column(EVENTS, "numeric_value", [NUMBER, float("nan")]), ["`numeric_value`", "1 of 2", "null"]),
        (with_column(EVENTS, "numeric_value", [float("-inf")] * 2), ["`numeric_value`", "2 of 2", "null"]),
        (with_column(EVENTS, "numeric_value", [1e39, NUMBER]), ["`numeric_value`", "beyond float32", "1 of 2"]),
        (
            with_column(EVENTS, "time", [-(2**62), 0], pl.Int64).cast({"time": pl.Datetime("us")}),
            ["`time`", "years 1 to 9999", "1 of 2"],
        ),
    ],
)
def test_unusable_events_are_refused(events: pl.DataFrame, words: list[str]) -> None:
    """Each fault of an event table is one message with file, column, count and remedy, and no patient in it."""
    with pytest.raises(DataError) as caught:
        survey(typed_events(events.lazy(), SCHEMA, "shard.parquet"), SCHEMA, "shard.parquet")
    assert_speaks_of(caught.value, words)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (LABELS.drop("subject_id"), ["`subject_id` is missing", "unit of privacy"]),
        (LABELS.drop("prediction_time"), ["`prediction_time` is missing"]),
        (LABELS.rename({"boolean_value": "float_value"}), ["`boolean_value` is missing"]),
        (with_column(LABELS, "boolean_value", [1, 0]), ["`boolean_value` is Int64", "boolean"]),
        (with_column(LABELS, "subject_id", ["a", "b"]), ["`subject_id` is String"]),
        (with_column(LABELS, "prediction_time", [date(2000, 1, 1)] * 2), ["`prediction_time` is Date"]),
        (
            with_column(LABELS, "prediction_time", [datetime(2000, 1, 1, tzinfo=UTC)] * 2),
            ["`prediction_time` has the time zone UTC"],
        ),
        (LABELS.clear(), ["no label rows"]),
        (with_column(LABELS, "subject_id", [None, ID]), ["`subject_id` is null in 1 of 2 rows"]),
        (with_column(LABELS, "prediction_time", [hours(0), None]), ["`prediction_time` is null in 1 of 2"]),
        (with_column(LABELS, "boolean_value", [None, True]), ["`boolean_value` is null in 1 of 2"]),
        (with_column(LABELS, "prediction_time", [hours(0)] * 2), ["1 of 2 rows repeat a patient"]),
        (
            with_column(LABELS, "prediction_time", [2**62, 0], pl.Int64).cast({"prediction_time": pl.Datetime("us")}),
            ["`prediction_time`", "years 1 to 9999 in 1 rows"],
        ),
    ],
)
def test_unusable_labels_are_refused(labels: pl.DataFrame, words: list[str]) -> None:
    """Each fault of a label table is one message with file, column, count and remedy, and no patient in it."""
    with pytest.raises(DataError) as caught:
        checked_labels(labels, "shard.parquet")
    assert_speaks_of(caught.value, words)


def test_labels_are_sorted() -> None:
    """Label rows come out by patient, then by time, whatever their order in the file."""
    rows = checked_labels(LABELS.reverse(), "labels")
    assert rows["prediction_time"].is_sorted()


def test_numbers_are_optional_where_none_are_asked_for() -> None:
    """A schema of codes and presences alone reads a table without `numeric_value`."""
    statics = {code: static for code, static in SCHEMA.statics.items() if code == "SEX//F"}
    codes_only: FeatureSchema = SCHEMA.model_copy(update={"values": {}, "statics": statics})
    events = typed_events(EVENTS.drop("numeric_value").lazy(), codes_only, "events")
    assert survey(events, codes_only, "events").unknown_code == 2


def test_every_event_has_one_fate() -> None:
    """Each event is counted once, under the first reason for which it cannot be used, or as usable."""
    events = events_frame(
        [
            (1, hours(0), "HR", 80.0),
            (1, hours(0), "DX//A", None),
            (1, None, "SEX//F", None),
            (1, hours(0), "UNIT", 4.0),
            (1, hours(0), "UNIT", 3.0),  # between two levels, and none
            (1, hours(0), "UNIT", None),
            (1, hours(0), "HR", 251.0),
            (1, hours(0), "HR", None),
            (1, None, "HR", 80.0),
            (1, None, "DX//A", None),
            (1, hours(0), "ELSE", 1.0),
            (1, hours(0), "DX//7.25", None),
            (1, None, "DX//7.25", None),
            (1, hours(0), "DX//9.1", None),
        ]
    )
    counted = survey(typed_events(events, SCHEMA, "events"), SCHEMA, "events")
    assert counted == Coverage(usable=5, unknown_code=2, without_time=3, without_number=2, out_of_range=2)
    assert (counted.events, counted.known) == (14, 12)
    assert counted + counted == Coverage(10, 4, 6, 4, 4)


def test_no_events_are_no_fault_of_a_shard() -> None:
    """An empty shard counts nothing."""
    empty = typed_events(events_frame([]), SCHEMA, "events")
    assert survey(empty, SCHEMA, "events") == Coverage(0, 0, 0, 0, 0)


def test_feature_table_has_one_row_per_code() -> None:
    """The join on `code` can neither lose nor double an event of the schema."""
    table = features(SCHEMA)
    assert sorted(table["code"]) == sorted([*SCHEMA.values, *SCHEMA.codes, *SCHEMA.statics])


def test_known_codes_add_the_finer_codes_of_the_events() -> None:
    """Each finer code found gets its parent's place, once however often it occurs; nothing else changes."""
    found = ["DX//7.25", "DX//7.25", "DX//7", "DX//E12.3", "DX//9.1", "HR.5", "ELSE", "HR"]
    table = known_codes(events_frame([(1, hours(0), code, None) for code in found]), SCHEMA)
    n_listed = len(features(SCHEMA))
    assert table[:n_listed].equals(features(SCHEMA))
    added = {code: (group, column) for code, group, column, _, _ in table[n_listed:].iter_rows()}
    assert len(table) == n_listed + len(added)
    assert added == {
        "DX//7.25": (LISTED, SCHEMA.codes.index("DX//7")),
        "DX//E12.3": (LISTED, SCHEMA.codes.index("DX//E1")),
    }
