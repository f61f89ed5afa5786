"""Any table, written any way: the right events, or one clear error without anything of a patient in it."""

from __future__ import annotations

import csv
import gzip
import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.client.readers.extracts import convert_to, events_of, read_or_refused

Row = tuple[int, datetime, str, float | None]
SECRETS = ("98765", "Zyx", "77.125", "1987")  # patient, code, value and year, as they would be seen in a message
TIMES = st.integers(0, 10**6).map(lambda minutes: datetime(1987, 1, 1) + timedelta(minutes=minutes))
IDS = st.sampled_from([987650, 987651, -987652, 9198765432101234567, -(2**63) + 9])
CODES = st.text(st.sampled_from("ZyxÄß/ ,;\"'|\t#%"), min_size=1, max_size=8).map(lambda code: f"Zyx{code}".strip())
NUMBERS = st.one_of(st.none(), st.sampled_from([0.0, -1.5, 77.125, 1e-3, 3e30, 12345678.0]))
ROWS = st.lists(st.tuples(IDS, TIMES, CODES, NUMBERS), min_size=1, max_size=12)
DIALECTS = st.fixed_dictionaries(
    {
        "order": st.permutations(["pid", "when", "item", "result", "extra"]),
        "separator": st.sampled_from([",", ";", "\t", "|"]),
        "decimal": st.sampled_from([".", ","]),
        "encoding": st.sampled_from(["utf-8", "utf-8-sig", "latin-1", "cp1252"]),
        "newline": st.sampled_from(["\n", "\r\n"]),
        "quoting": st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
        "time": st.sampled_from(["%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M", "%d.%m.%Y %H:%M:%S"]),
        "suffix": st.sampled_from([".csv", ".csv.gz"]),
        "repeat": st.booleans(),
    }
)


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def written(rows: list[Row], dialect: dict[str, Any]) -> bytes:
    """The rows as CSV in that dialect."""
    text = io.StringIO()
    writer = csv.writer(
        text, delimiter=dialect["separator"], lineterminator=dialect["newline"], quoting=dialect["quoting"]
    )
    writer.writerow(dialect["order"])
    for patient, time, code, number in rows:
        cells = {
            "pid": str(patient),
            "when": time.strftime(dialect["time"]),
            "item": code,
            "result": "" if number is None else repr(number).replace(".", dialect["decimal"]),
            "extra": "x,;y",
        }
        writer.writerow([cells[name] for name in dialect["order"]])
    return text.getvalue().encode(dialect["encoding"])


def table_of(dialect: dict[str, Any], path: str) -> dict[str, Any]:
    """The terms that describe that dialect."""
    format_ = dialect["time"] if dialect["time"].startswith("%d") else None
    return {
        "files": path,
        "patient": "pid",
        "time": {"column": "when", **({"format": format_} if format_ else {})},
        "code": "item",
        "value": "result",
        "separator": dialect["separator"],
        "decimal": dialect["decimal"],
        "encoding": dialect["encoding"].removesuffix("-sig"),
    }


@settings(deadline=None, max_examples=40)
@given(rows=ROWS, dialect=DIALECTS)
def test_every_dialect_gives_the_same_events(rows: list[Row], dialect: dict[str, Any]) -> None:
    """Column order, separator, decimal mark, encoding, BOM, line ends, quotation, compression, time format and
    repeated rows change nothing but what they say.
    """
    if dialect["repeat"]:
        rows = rows + rows
    content = written(rows, dialect)
    with folder() as place:
        path = place / f"e{dialect['suffix']}"
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
        convert_to(place / "out", kind="events", tables=[table_of(dialect, path.name)])
        found = events_of(place / "out").drop("text_value")
    wanted = pl.DataFrame(rows, schema=found.schema, orient="row").sort("subject_id", "time", maintain_order=True)
    assert found.equals(wanted)


@settings(deadline=None, max_examples=60)
@given(rows=ROWS, dialect=DIALECTS, data=st.data())
def test_damaged_files_give_events_or_one_clear_error(
    rows: list[Row], dialect: dict[str, Any], data: st.DataObject
) -> None:
    """Bytes that are cut, changed or put in (NUL, quotation marks, line ends, half letters) end in events or in one
    line of ours, with nothing of a patient in it and nothing left on the disk.
    """
    content = bytearray(written(rows, dialect))
    packed = data.draw(st.booleans())  # damage what is compressed, or the text
    if packed:
        content = bytearray(gzip.compress(bytes(content)))
    for _ in range(data.draw(st.integers(1, 4))):
        place, how = data.draw(st.integers(0, max(0, len(content) - 1))), data.draw(st.integers(0, 2))
        if how == 0:
            content[place:] = b""
        elif how == 1:
            content[place : place + 1] = bytes([data.draw(st.integers(0, 255))])
        else:
            content[place:place] = data.draw(st.sampled_from([b"\0", b'"', b"\n", b"\r", b"\xc3", b",", b"\xff\xfe"]))
    with folder() as here:
        name = "e.csv.gz" if packed else "e.csv"
        (here / name).write_bytes(bytes(content))
        read_or_refused(here, SECRETS, kind="events", tables=[table_of(dialect, name)])


TYPED: list[list[Any]] = [
    [1, 2],
    [2**63, 1],
    [-5, None],
    [1.0, 2.5],
    [float("nan"), float("inf")],
    ["1", "Zyx98765"],
    ["1987-01-01 10:00", "1987-01-02"],
    ["1987-01-01 10:00:00Z", None],
    [True, False],
    [None, None],
    [b"Zyx98765", b"1"],
    [[1], [2]],
    [{"a": 1}, {"a": 2}],
    [datetime(1987, 1, 1), datetime(1, 1, 1)],
    [datetime(1987, 1, 1).date(), None],
    [datetime(1987, 1, 1, tzinfo=UTC), None],
    [timedelta(hours=1), timedelta(0)],
    [datetime(1987, 1, 1).time(), None],
    [Decimal("77.125"), Decimal("98765")],
]


def write_typed(path: Path, columns: dict[str, list[Any]]) -> None:
    pl.DataFrame({name: pl.Series(cells, dtype=_dtype(cells)) for name, cells in columns.items()}).write_parquet(path)


@settings(deadline=None, max_examples=60)
@given(
    cells=st.fixed_dictionaries({name: st.sampled_from(TYPED) for name in ("pid", "when", "item", "result")}),
    keys=st.fixed_dictionaries({}, optional={"text": st.just("result"), "only": st.just({"item": "1"})}),
    unit=st.sampled_from([None, "hours"]),
    zone=st.sampled_from([None, "Europe/Berlin"]),
    given_too=st.sampled_from([None, "labels", "splits"]),
)
def test_parquet_of_any_types_gives_events_or_one_clear_error(
    cells: dict[str, list[Any]], keys: dict[str, Any], unit: str | None, zone: str | None, given_too: str | None
) -> None:
    """Whatever types the columns have, of events, labels or splits: events, or one clear line."""
    time = {"column": "when", **({"unit": unit} if unit else {})}
    table = {"files": "e.parquet", "patient": "pid", "time": time, "code": "item", "value": "result", **keys}
    more: dict[str, Any] = {"timezone": zone} if zone else {}
    files = {"files": "e.parquet", "patient": "pid"}
    if given_too is not None:  # then the events are as they should be
        table["files"] = "good.csv"
        labels = {"t": {**files, "time": time, "label": "result"}}
        more |= {"labels": labels} if given_too == "labels" else {"splits": {**files, "split": "item"}}
    with folder() as place:
        (place / "good.csv").write_text("pid,when,item,result\n" + ("1,1,1,1\n" if unit else "1,1987-01-01,1,1\n"))
        write_typed(place / "e.parquet", cells)
        read_or_refused(place, SECRETS, kind="events", tables=[table], **more)


OMOP_COLUMNS = (
    *("person_id", "measurement_concept_id", "measurement_datetime", "value_as_number", "unit_concept_id"),
    *("visit_occurrence_id", "measurement_type_concept_id", "unit_source_value"),
)


@settings(deadline=None, max_examples=40)
@given(cells=st.fixed_dictionaries({}, optional={name: st.sampled_from(TYPED) for name in OMOP_COLUMNS}))
def test_omop_of_any_types_gives_events_or_one_clear_error(cells: dict[str, list[Any]]) -> None:
    """The same for a table of a CDM, of which all but one column are as they should be more often than not."""
    good: dict[str, list[Any]] = {
        "person_id": [1, 2],
        "measurement_concept_id": [3, 0],
        "measurement_datetime": [datetime(1987, 1, 1)] * 2,
    }
    with folder() as place:
        (place / "cdm").mkdir()
        write_typed(place / "cdm/person.parquet", {"person_id": [1, 2]})
        write_typed(place / "cdm/measurement.parquet", {**good, **cells})
        read_or_refused(place, SECRETS, kind="omop", folder="cdm")


def _dtype(values: list[Any]) -> pl.DataType | None:
    return pl.UInt64() if 2**63 in values else None


def test_a_patient_of_ten_thousand_steps_is_read_whole(tmp_path: Path) -> None:
    """One patient, 10,000 times: every event is there, in order."""
    start = datetime(2020, 1, 1)
    lines = [f"5,{start + timedelta(minutes=k)},HR,{k % 200}" for k in reversed(range(10_000))]
    (tmp_path / "e.csv").write_text("\n".join(["pid,when,item,result", *lines]))
    table = {"files": "e.csv", "patient": "pid", "time": "when", "code": "item", "value": "result"}
    done = convert_to(tmp_path / "out", kind="events", tables=[table])
    assert (done.events, done.patients) == (10_000, 1)
    assert events_of(tmp_path / "out")["numeric_value"].to_list() == [float(k % 200) for k in range(10_000)]
