"""Any MEDS folder, however damaged, through `wardround client check`: an answer to each requirement, no more."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.inspection.requirements import WORDS
from tests.client.hospitals import write_site, write_study
from tests.client.readers.extracts import convert_to, typed
from tests.client.readers.test_any_extract import KINDS, PIECES
from tests.client.readers.test_any_table import SECRETS, TYPED, write_typed

SERVER = {"address": "localhost:1", "plaintext": True}
GOOD: dict[str, dict[str, list[Any]]] = {
    "data/0.parquet": {
        "subject_id": [987651, 987652],
        "time": [datetime(1987, 1, 1, 10), datetime(1987, 1, 1, 11)],
        "code": ["Zyx", "VITAL//0"],
        "numeric_value": [77.125, 0.5],
    },
    "labels/diagnosis.parquet": {
        "subject_id": [987651, 987652],
        "prediction_time": [datetime(1987, 1, 2)] * 2,
        "boolean_value": [True, False],
    },
    "metadata/subject_splits.parquet": {"subject_id": [987651, 987652], "split": ["train", "train"]},
}


def checked(folder: Path) -> str:
    """What `wardround client check` says of the records in `folder`, after all that must hold of it was looked at."""
    write_study(folder)
    status, said = typed("client", "check", write_site(folder, folder / "records", SERVER))
    said = said.replace(str(folder), "")
    assert "defect" not in said
    assert not [secret for secret in SECRETS if secret in said]
    lines = said.splitlines()
    assert [line[12:].split("  ")[0].strip()[:15].strip() for line in lines[:-1]] == [name[:15] for name in WORDS]
    assert status == (0 if all(line.startswith("pass") for line in lines[:-1]) else 1)
    return said


def write_records(folder: Path, tables: dict[str, dict[str, list[Any]]]) -> None:
    for name, columns in tables.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_typed(folder / name, columns)


@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_any_types_are_answered(data: st.DataObject) -> None:
    """Columns of events, labels and splits of whatever type, or gone: a line per requirement, no patient in it."""
    tables = {name: dict(columns) for name, columns in GOOD.items()}
    for _ in range(data.draw(st.integers(1, 3))):
        columns = tables[data.draw(st.sampled_from(sorted(tables)))]
        column = data.draw(st.sampled_from(sorted(columns)))
        if len(columns) > 1 and data.draw(st.booleans()):
            del columns[column]
        else:
            columns[column] = data.draw(st.sampled_from(TYPED))
    with tempfile.TemporaryDirectory(prefix="wardround") as name:
        write_records(Path(name) / "records", tables)
        checked(Path(name))


@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_any_damage_is_answered(data: st.DataObject) -> None:
    """Bytes cut, replaced or put in, and files that are emptied: the same."""
    with tempfile.TemporaryDirectory(prefix="wardround") as name:
        write_records(Path(name) / "records", GOOD)
        path = Path(name) / "records" / data.draw(st.sampled_from(sorted(GOOD)))
        content = path.read_bytes()
        first, last = sorted(data.draw(st.tuples(*[st.integers(0, len(content))] * 2)))
        length = data.draw(st.sampled_from([0, 1, last - first, len(content)]))
        path.write_bytes(content[:first] + data.draw(st.sampled_from(PIECES)) + content[first + length :])
        checked(Path(name))


@pytest.mark.parametrize("make", KINDS)
def test_what_was_converted_from_any_kind_is_answered(make: Callable[[Path], dict[str, Any]], tmp_path: Path) -> None:
    """From each kind of extract to the check, by way of the folder that the conversion wrote."""
    convert_to(tmp_path / "records", **make(tmp_path))
    checked(tmp_path)


def test_a_patient_of_ten_thousand_steps_is_answered(tmp_path: Path) -> None:
    """One patient with 10,000 moments, and nobody else: the records are sound, and too few to learn from."""
    times = pl.datetime_range(datetime(1987, 1, 1), datetime(1987, 1, 1, 2, 46, 39), "1s", eager=True).to_list()
    events = {"subject_id": [987651] * 10_000, "time": times, "code": ["VITAL//0"] * 10_000}
    labels = {"subject_id": [987651], "prediction_time": [times[-1]], "boolean_value": [True]}
    tables = {**GOOD, "data/0.parquet": events | {"numeric_value": [0.5] * 10_000}, "labels/diagnosis.parquet": labels}
    write_records(tmp_path / "records", tables)
    said = checked(tmp_path)
    assert "10,000 events of 1 patients" in said
    assert "fail        sequences" in said
