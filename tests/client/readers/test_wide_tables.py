"""Wide tables and code sequences: what becomes of a row, and what is refused."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from client.readers import tables
from client.readers.meds import MedsDirectory
from common.errors import ConfigurationError, DataError
from tests.client.readers.extracts import convert_to, events_of, terms_of
from tests.common.plain_sequences import SCHEMA, same

WIDE: dict[str, Any] = {
    "kind": "wide",
    "files": "grid.csv",
    "patient": "pid",
    "time": {"column": "hour", "unit": "hours"},
    "values": {"hr": "HR", "lact": "LACTATE"},
    "codes": {"dx": "DX//"},
    "statics": {"age": "AGE"},
    "static_codes": {"sex": "SEX//"},
}
GRID = "pid,hour,hr,lact,dx,age,sex\n2,0,80,,A,60,F\n1,0,NaN,1.5,,70,M\n2,1,85,,NA,60,F\n"


def test_a_filled_cell_is_an_event(tmp_path: Path) -> None:
    """Numbers and codes get the row's time; facts that every row repeats count once; empty cells are nothing."""
    (tmp_path / "grid.csv").write_text(GRID)
    convert_to(tmp_path / "out", **WIDE)
    first, second = datetime(2000, 1, 1), datetime(2000, 1, 1, 1)
    assert events_of(tmp_path / "out").drop("text_value").rows() == [
        (1, None, "AGE", 70.0),
        (1, None, "SEX//M", None),
        (1, first, "LACTATE", 1.5),
        (2, None, "AGE", 60.0),
        (2, None, "SEX//F", None),
        (2, first, "HR", 80.0),
        (2, first, "DX//A", None),
        (2, second, "HR", 85.0),
    ]


def test_wide_and_long_forms_give_the_same_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same patients through both readers, in blocks of a few rows, are the same to the model."""
    monkeypatch.setattr(tables, "BLOCK_BYTES", 256)
    numbers = range(40)
    start = datetime(2024, 1, 1)
    wide = [f"{p},{h},{60 + h + p},{1 + h / 8},{30 + p}" for p in numbers for h in range(p % 5 + 1)]
    long = [
        line
        for row in wide
        for p, h, hr, lact, _ in [row.split(",")]
        for line in (f"{p},{h},HR,{hr}", f"{p},{h},LACTATE,{lact}")
    ]
    facts = [f"{p},AGE,{30 + p}" for p in numbers]
    (tmp_path / "grid.csv").write_text("\n".join(["pid,hour,hr,lact,age", *wide]))
    (tmp_path / "long.csv").write_text("\n".join(["pid,hour,code,value", *long]))
    (tmp_path / "facts.csv").write_text("\n".join(["pid,code,value", *facts]))
    lines = [f"{p},{start.replace(hour=p % 5)},{p % 2}" for p in numbers]
    (tmp_path / "labels.csv").write_text("\n".join(["subject_id,prediction_time,boolean_value", *lines]))
    time = {"column": "hour", "unit": "hours", "origin": "2024-01-01"}
    shared: dict[str, Any] = {"labels": {"died": {"files": "labels.csv"}}}
    convert_to(tmp_path / "a", **{**WIDE, "time": time, "codes": {}, "static_codes": {}}, **shared)
    table = {"patient": "pid", "code": "code", "value": "value"}
    both = [{**table, "files": "long.csv", "time": time}, {**table, "files": "facts.csv"}]
    convert_to(tmp_path / "b", kind="events", tables=both, **shared)
    keyed: dict[str, Any] = {"max_steps": 8, "bin_hours": None, "split_key": bytes(32)}
    splits = ("train", "tuning", "held_out")
    one, other = (MedsDirectory(tmp_path / name).read("died", SCHEMA, splits, **keyed) for name in "ab")
    assert one.n_patients == 40
    assert same(one, other)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pid,hour,hr\n98765,0,1\n", "no column `lact`"),
        (GRID.replace("2,1,85", "98765,,85"), "`hour`: is missing in 1"),
        (GRID.replace("1.5", "98765x"), "`lact`: in 1 of 3"),
        (GRID.replace("2,1,85", "98765x,1,85"), "`pid`: in 1 of 3"),
    ],
)
def test_faulty_grids_are_refused(tmp_path: Path, text: str, words: str) -> None:
    """File, column and count are named, a cell never."""
    (tmp_path / "grid.csv").write_text(text)
    with pytest.raises(DataError, match=words) as caught:
        convert_to(tmp_path / "out", **WIDE)
    assert "98765" not in str(caught.value)


def test_a_grid_of_nothing_is_refused() -> None:
    """Without values and codes nothing would be read."""
    with pytest.raises(ConfigurationError, match="neither values nor codes"):
        terms_of(**{**WIDE, "values": {}, "codes": {}})


CODES: dict[str, Any] = {"kind": "code_sequences", "files": "codes.csv", "patient": "pid", "codes": "history"}


def test_code_k_is_on_day_k(tmp_path: Path) -> None:
    """The order becomes days; the label is predicted with the last code; a patient without codes is left out."""
    (tmp_path / "codes.csv").write_text("pid,history,sick\n7,I10; E11;I10,1\n8,,0\n9,N18,0\n")
    done = convert_to(tmp_path / "out", **CODES, prefix="DX//", label="sick", task="ckd")
    days = [datetime(2000, 1, day) for day in (1, 2, 3)]
    assert events_of(tmp_path / "out").drop("numeric_value", "text_value").rows() == [
        *((7, day, code) for day, code in zip(days, ("DX//I10", "DX//E11", "DX//I10"), strict=True)),
        (9, days[0], "DX//N18"),
    ]
    assert done.left_out == {"patients without a code": 1}
    labels = pl.read_parquet(tmp_path / "out/labels/ckd.parquet")
    assert labels.rows() == [(7, days[2], True), (9, days[0], False)]


def test_codes_of_one_visit_are_together(tmp_path: Path) -> None:
    """With `together`, codes of a visit share its day."""
    (tmp_path / "codes.csv").write_text('pid,history\n7,"I10,E11;N18"\n')
    convert_to(tmp_path / "out", **CODES, together=",")
    assert events_of(tmp_path / "out")["time"].dt.day().to_list() == [1, 1, 2]


def test_a_patient_in_two_rows_is_refused(tmp_path: Path) -> None:
    """Nobody can say which row came first."""
    (tmp_path / "codes.csv").write_text("pid,history\n98765,I10\n8,E11\n98765,I10\n")
    with pytest.raises(DataError, match="1 rows are of a patient who has one already") as caught:
        convert_to(tmp_path / "out", **CODES)
    assert "98765" not in str(caught.value)


def test_a_sequence_of_ten_thousand_codes_is_read_whole(tmp_path: Path) -> None:
    """Every code is there, each a day later."""
    (tmp_path / "codes.csv").write_text("pid,history\n7," + ";".join(f"C{k % 50}" for k in range(10_000)) + "\n")
    assert convert_to(tmp_path / "out", **CODES).events == 10_000
    gaps = events_of(tmp_path / "out")["time"].diff().drop_nulls().dt.total_days()
    assert gaps.unique().to_list() == [1]


def test_only_goes_with_every_table(tmp_path: Path) -> None:
    """Rows of another hospital are not read, in a grid or in code sequences."""
    (tmp_path / "grid.csv").write_text("pid,hour,hr,ward\n1,0,80,a\n2,0,90,b\n")
    grid = {"kind": "wide", "files": "grid.csv", "patient": "pid", "time": WIDE["time"], "values": {"hr": "HR"}}
    assert convert_to(tmp_path / "one", **grid, only={"ward": "a"}).patients == 1
    (tmp_path / "codes.csv").write_text("pid,history,ward\n7,I10,a\n7,E11,b\n")
    assert convert_to(tmp_path / "two", **CODES, only={"ward": "a"}).events == 1
