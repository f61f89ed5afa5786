"""What an inspection counts, against slow loops over any small records."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from unittest import mock

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.inspection import facts
from client.inspection.facts import events_of, outcome_of, same_without_later_events
from client.readers.meds import MedsDirectory
from common.study import Study
from tests.client.hospitals import write_study

START = datetime(2020, 1, 1)
CODES = ["CODE//1", "CODE//2", "SEX//F", "LOCAL"]
Event = tuple[int, int | None, str]
SETTINGS = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # each example writes the whole folder anew
HOURS = st.sampled_from([0, 1, 23, 24, 30, 48, 60, 72])
some_events = st.lists(st.tuples(st.integers(1, 4), st.none() | HOURS, st.sampled_from(CODES)), min_size=1, max_size=30)
some_labels = st.dictionaries(st.tuples(st.integers(1, 4), HOURS), st.booleans(), min_size=1, max_size=8)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return write_study(tmp_path / "study")


@pytest.fixture(autouse=True)
def everybody_counts() -> Iterator[None]:
    """So few patients are counted only here."""
    with mock.patch.object(facts, "LEAST_PATIENTS", 1):
        yield


def folder(root: Path, events: list[Event]) -> MedsDirectory:
    (root / "data").mkdir(exist_ok=True)
    pl.DataFrame(
        {
            "subject_id": [patient for patient, _, _ in events],
            "time": [None if hour is None else START + timedelta(hours=hour) for _, hour, _ in events],
            "code": [code for _, _, code in events],
            "numeric_value": [None] * len(events),
        },
        schema={"subject_id": pl.Int64, "time": pl.Datetime("us"), "code": pl.String, "numeric_value": pl.Float32},
    ).write_parquet(root / "data" / "0.parquet")
    return MedsDirectory(root)


def rows_of(labels: dict[tuple[int, int], bool]) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "subject_id": [patient for patient, _ in labels],
            "prediction_time": [START + timedelta(hours=hour) for _, hour in labels],
            "boolean_value": list(labels.values()),
        },
        schema={"subject_id": pl.Int64, "prediction_time": pl.Datetime("us"), "boolean_value": pl.Boolean},
    ).sort("subject_id", "prediction_time")


@SETTINGS
@given(events=some_events, labels=some_labels)
def test_codes_are_counted_up_to_the_prediction_and_no_further(
    tmp_path: Path, study: Study, events: list[Event], labels: dict[tuple[int, int], bool]
) -> None:
    """Rows, patients and positives of each code that the study reads, as a loop over rows and events counts them."""
    found = outcome_of(folder(tmp_path, events), rows_of(labels), study.features)
    expected = {}
    for code in CODES[:3]:
        timeless = code == "SEX//F"  # the only one that may lack a time
        held = [
            (patient, positive)
            for (patient, until), positive in labels.items()
            if any(
                who == patient and what == code and (timeless if hour is None else hour <= until)
                for who, hour, what in events
            )
        ]
        if held:
            expected[code] = (len(held), len({patient for patient, _ in held}), sum(positive for _, positive in held))
    assert {one.code: (one.rows, one.patients, one.positives) for one in found.held} == expected
    assert (found.rows, found.positives) == (len(labels), sum(labels.values()))


@SETTINGS
@given(events=some_events)
def test_every_event_is_counted_once(tmp_path: Path, study: Study, events: list[Event]) -> None:
    """Patients, range, midnights and unknown codes as a loop counts them; fates add up to all events."""
    found = events_of(folder(tmp_path, events), study.features)
    hours = [hour for _, hour, _ in events if hour is not None]
    assert found.fates.events == len(events)
    assert found.patients == len({patient for patient, _, _ in events})
    assert found.timed == len(hours)
    assert found.at_midnight == sum(hour % 24 == 0 for hour in hours)
    assert found.first == (START + timedelta(hours=min(hours)) if hours else None)
    assert found.last == (START + timedelta(hours=max(hours)) if hours else None)
    local = [patient for patient, _, code in events if code == "LOCAL"]
    assert found.unknown.frequent == ((("LOCAL", len(local), len(set(local))),) if local else ())


@SETTINGS
@given(events=some_events, labels=some_labels)
def test_later_events_never_change_the_earliest_prediction(
    tmp_path: Path, study: Study, events: list[Event], labels: dict[tuple[int, int], bool]
) -> None:
    """The prediction-time rule, looked at as `check` does, for any records that can be read."""
    begun = [(patient, 0, "CODE//1") for patient in range(1, 5)]  # nobody is predicted before the first event
    assert same_without_later_events(folder(tmp_path, begun + events), rows_of(labels), study)


def test_a_reader_that_looks_ahead_is_found(tmp_path: Path, study: Study) -> None:
    """If sequences did hold what comes after the prediction time, the answer would be no."""
    directory = folder(tmp_path, [(1, 0, "CODE//1"), (1, 5, "CODE//2")])
    rows = rows_of({(1, 2): True})

    def ahead(events: pl.LazyFrame, labels: pl.DataFrame, *arguments: object, **more: object) -> object:
        later = labels.with_columns(pl.col("prediction_time") + timedelta(hours=12))
        return build(events, later, *arguments, **more)  # type: ignore[arg-type]  # passed on as it came

    build = facts.build
    with mock.patch.object(facts, "build", ahead):
        assert not same_without_later_events(directory, rows, study)
    assert same_without_later_events(directory, rows, study)
