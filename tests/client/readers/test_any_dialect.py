"""Every kind of extract, written in any dialect: what the plain dialect gives, refusals included."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import tempfile
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DataError
from tests.client.readers.extracts import convert_to, events_of, read_or_refused
from tests.client.readers.test_any_table import SECRETS, TYPED, write_typed

Dialect = dict[str, Any]
Rows = list[dict[str, Any]]
Writer = Callable[[Path, Rows, Dialect], dict[str, Any]]

PLAIN: Dialect = {
    "separator": ",",
    "decimal": ".",
    "encoding": "utf-8",
    "newline": "\n",
    "quoting": csv.QUOTE_MINIMAL,
    "packed": False,
    "shuffle": None,
    "extra": True,
}
DIALECTS = st.fixed_dictionaries(
    {
        "separator": st.sampled_from([",", ";", "\t", "|"]),
        "decimal": st.sampled_from([".", ","]),
        "encoding": st.sampled_from(["utf-8", "utf-8-sig", "latin-1", "cp1252"]),
        "newline": st.sampled_from(["\n", "\r\n"]),
        "quoting": st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
        "packed": st.booleans(),
        "extra": st.booleans(),
        "shuffle": st.randoms(use_true_random=False),
    }
)
PATIENTS = st.sampled_from([98765, -98766, 2**62])
DAYS = st.integers(1, 28).map(lambda day: f"1987-01-{day:02}")
TIMES = st.builds(lambda day, hour: f"{day} {hour:02}:30", DAYS, st.integers(0, 23))
NUMBERS = st.sampled_from([None, 0.5, 77.125, -3.0, 1e-3])
WORDS = st.sampled_from(["Zyx", "Zyx Ä/ß", "Zyx;1", "Zyx,2", 'Zyx"3'])
ROWS = st.fixed_dictionaries(
    {"patient": PATIENTS, "time": TIMES, "hr": NUMBERS, "age": NUMBERS, "dx": WORDS, "sick": st.sampled_from([0, 1])}
)


def write_csv(path: Path, rows: Rows, dialect: Dialect) -> str:
    """The rows as a CSV file in that dialect, maybe with a column that nobody asked for; its name."""
    names = [*rows[0], *(["extra"] if dialect["extra"] else [])]
    if dialect["shuffle"] is not None:
        dialect["shuffle"].shuffle(names)
    text = io.StringIO()
    writer = csv.writer(
        text, delimiter=dialect["separator"], lineterminator=dialect["newline"], quoting=dialect["quoting"]
    )
    writer.writerow(names)
    for row in rows:
        cells = {**row, "extra": "x"}
        writer.writerow([_cell(cells[name], dialect) for name in names])
    content = text.getvalue().encode(dialect["encoding"])
    path = path.with_name(path.name + ".gz") if dialect["packed"] else path
    path.write_bytes(gzip.compress(content) if dialect["packed"] else content)
    return path.name


def _cell(cell: Any, dialect: Dialect) -> str:
    if cell is None:
        return ""
    return repr(cell).replace(".", dialect["decimal"]) if isinstance(cell, float) else str(cell)


def _csv_terms(dialect: Dialect) -> dict[str, str]:
    encoding = dialect["encoding"].removesuffix("-sig")
    return {"separator": dialect["separator"], "decimal": dialect["decimal"], "encoding": encoding}


def wide(place: Path, rows: Rows, dialect: Dialect) -> dict[str, Any]:
    file = write_csv(
        place / "w.csv", [{key: row[key] for key in ("patient", "time", "hr", "age", "dx")} for row in rows], dialect
    )
    columns = {"values": {"hr": "HR"}, "codes": {"dx": "DX//"}, "statics": {"age": "AGE"}}
    return {"kind": "wide", "files": file, "patient": "patient", "time": "time", **columns, **_csv_terms(dialect)}


def code_sequences(place: Path, rows: Rows, dialect: Dialect) -> dict[str, Any]:
    table = [{"patient": row["patient"], "codes": f"{row['dx']}|{row['dx']}2", "sick": row["sick"]} for row in rows]
    terms = {"patient": "patient", "codes": "codes", "between": "|", "label": "sick", **_csv_terms(dialect)}
    return {"kind": "code_sequences", "files": write_csv(place / "c.csv", table, dialect), **terms}


def omop(place: Path, rows: Rows, dialect: Dialect) -> dict[str, Any]:
    (place / "cdm").mkdir()
    persons = [{"person_id": p, "year_of_birth": 1950, "gender_concept_id": 8507} for p in {r["patient"] for r in rows}]
    visits = [
        {"visit_occurrence_id": k, "person_id": row["patient"], "visit_concept_id": 9201}
        | {"visit_start_datetime": row["time"], "visit_end_date": row["time"][:10]}
        for k, row in enumerate(rows)
    ]
    conditions = [
        {"person_id": row["patient"], "condition_concept_id": 0, "condition_source_value": row["dx"]}
        | {"condition_start_datetime": row["time"], "condition_type_concept_id": 32821, "visit_occurrence_id": k}
        for k, row in enumerate(rows)
    ]
    measurements = [
        {"person_id": row["patient"], "measurement_concept_id": 3, "measurement_datetime": row["time"]}
        | {"value_as_number": row["hr"], "unit_source_value": row["dx"]}
        for row in rows
    ]
    tables = {"visit_occurrence": visits, "condition_occurrence": conditions, "measurement": measurements}
    for table, content in {"person": persons, **tables}.items():
        write_csv(place / f"cdm/{table}.csv", content, dialect)
    return {"kind": "omop", "folder": "cdm", **_csv_terms(dialect)}


def physionet2012(place: Path, rows: Rows, dialect: Dialect) -> dict[str, Any]:
    """The challenge's own form has a comma, a point and plain letters; order, line ends and BOM may differ."""
    (place / "set").mkdir()
    for patient in sorted({_stay(row) for row in rows}):
        lines = [
            {"Time": row["time"][-5:], "Parameter": "HR", "Value": row["hr"]} for row in rows if _stay(row) == patient
        ]
        write_csv(place / f"set/{patient}.txt", lines, _own(dialect, ","))
    return {"kind": "physionet2012", "folders": "set"}


def physionet2019(place: Path, rows: Rows, dialect: Dialect) -> dict[str, Any]:
    (place / "set").mkdir()
    for patient in sorted({_stay(row) for row in rows}):
        mine = [row for row in rows if _stay(row) == patient]
        lines = [
            {"HR": row["hr"], "Age": row["age"], "ICULOS": hour + 1, "SepsisLabel": row["sick"]}
            for hour, row in enumerate(mine)
        ]
        write_csv(place / f"set/p{patient}.psv", lines, _own(dialect, "|"))
    return {"kind": "physionet2019", "folders": "set", "carry_label": True}


def _stay(row: dict[str, Any]) -> int:
    """A number that may name a file."""
    return abs(int(row["patient"])) % 10**9


def _own(dialect: Dialect, separator: str) -> Dialect:
    """What a challenge's files leave open of a dialect. All files of a folder have their columns in one order."""
    encoding = "utf-8-sig" if dialect["encoding"] == "utf-8-sig" else "utf-8"
    shuffle = None if dialect["shuffle"] is None else _Reversed()
    kept = {"separator": separator, "encoding": encoding, "newline": dialect["newline"], "shuffle": shuffle}
    return PLAIN | kept | {"extra": False}


class _Reversed:
    """The same other order each time."""

    def shuffle(self, names: list[str]) -> None:
        names.reverse()


KINDS: list[Writer] = [wide, code_sequences, omop, physionet2012, physionet2019]


def outcome(make: Writer, rows: Rows, dialect: Dialect) -> pl.DataFrame | None:
    """The events, or None where the extract is refused."""
    with tempfile.TemporaryDirectory() as name:
        try:
            convert_to(Path(name) / "out", **make(Path(name), rows, dialect))
        except DataError:
            return None
        return events_of(Path(name) / "out")


@pytest.mark.parametrize("make", KINDS)
@settings(deadline=None, max_examples=10)
@given(rows=st.lists(ROWS, min_size=1, max_size=6), dialect=DIALECTS, repeat=st.booleans())
def test_a_dialect_changes_nothing(make: Writer, rows: Rows, dialect: Dialect, repeat: bool) -> None:
    """Column order, separator, decimal mark, encoding, BOM, line ends, quotation marks and compression give the events
    of the plain dialect. Rows that repeat are events, except for code sequences, where they are a fault.
    """
    rows = rows + rows if repeat else rows
    plain, other = outcome(make, rows, PLAIN), outcome(make, rows, dialect)
    refused = {
        code_sequences: len({row["patient"] for row in rows}) < len(rows),
        physionet2012: all(row["hr"] is None for row in rows),
        physionet2019: all(row["hr"] is None and row["age"] is None for row in rows),
    }
    if refused.get(make, False):
        assert plain is None
        assert other is None
    else:
        assert plain is not None
        assert other is not None
        assert other.equals(plain)


@pytest.mark.parametrize("make", KINDS)
def test_a_patient_of_ten_thousand_steps_is_read_whole(make: Writer, tmp_path: Path) -> None:
    """One patient, 10,000 times: all are there, in order; 2012's clock counts minutes, and ends after 999 hours."""
    if make is code_sequences:
        codes = [{"patient": 5, "codes": ";".join(f"C{k % 50}" for k in range(10_000))}]
        keys = {"files": write_csv(tmp_path / "c.csv", codes, PLAIN), "patient": "patient", "codes": "codes"}
        keys["kind"] = "code_sequences"
    else:
        start = datetime(1987, 1, 1, 8)  # no midnight among them: OMOP reads one as a date
        times = [str(start + timedelta(seconds=k)) for k in range(10_000)]
        rows = [
            {"patient": 5, "time": time, "hr": float(k), "age": 50.0, "dx": "Zyx", "sick": 0}
            for k, time in enumerate(times)
        ]
        keys = make(tmp_path, rows, PLAIN)
        if make is physionet2012:
            lines = [f"{k // 60:02}:{k % 60:02},HR,{k}" for k in range(10_000)]
            (tmp_path / "set/5.txt").write_text("\n".join(["Time,Parameter,Value", *lines]))
    assert convert_to(tmp_path / "out", **keys).patients == 1
    timed = events_of(tmp_path / "out").drop_nulls("time")
    if make is not code_sequences:
        found = timed.drop_nulls("numeric_value")
        assert found["numeric_value"].to_list() == [float(k) for k in range(10_000)]
        timed = found
    assert timed["time"].n_unique() == 10_000


@settings(deadline=None, max_examples=40)
@given(
    cells=st.fixed_dictionaries({name: st.sampled_from(TYPED) for name in ("pid", "when", "hr", "dx")}),
    sequences=st.booleans(),
)
def test_parquet_of_any_types_gives_events_or_one_clear_error(cells: dict[str, list[Any]], sequences: bool) -> None:
    """Whatever types the columns of a wide table or of code sequences have: events, or one clear line."""
    own = (
        {"codes": "dx", "label": "hr"}
        if sequences
        else {"time": "when", "values": {"hr": "HR"}, "codes": {"dx": "DX//"}}
    )
    kind = "code_sequences" if sequences else "wide"
    with tempfile.TemporaryDirectory() as name:
        write_typed(Path(name) / "e.parquet", cells)
        read_or_refused(Path(name), SECRETS, kind=kind, files="e.parquet", patient="pid", **own)


def test_a_mark_of_byte_order_is_no_part_of_a_name(tmp_path: Path) -> None:
    """UTF-8 with BOM: the first column is found; the first cell of a file of opt-outs or labels is, too."""
    (tmp_path / "w.csv").write_bytes(codecs.BOM_UTF8 + b"pid,when,hr\n5,1987-01-01,1\n")
    (tmp_path / "l.csv").write_bytes(codecs.BOM_UTF8 + b"subject_id,prediction_time,boolean_value\n5,1987-01-02,1\n")
    keys = {"files": "w.csv", "patient": "pid", "time": "when", "values": {"hr": "HR"}}
    done = convert_to(tmp_path / "out", kind="wide", **keys, labels={"t": {"files": "l.csv"}})
    assert (done.events, done.labels) == (1, {"t": 1})
