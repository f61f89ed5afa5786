"""Long tables: what each key of the YAML does, and what is refused."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from client.readers.meds import MedsDirectory
from common.errors import ConfigurationError, DataError
from common.schema import SPLITS
from tests.client.readers.extracts import convert_to, events_of, terms_of
from tests.common.plain_sequences import SCHEMA

ROOT = Path(__file__).resolve().parents[3]
DATA = Path(os.environ.get("WARDROUND_DATA", ROOT.parent / "shared" / "data"))
EVENTS_CSV = DATA / "diabetes130" / "csv" / "events.csv.gz"
PATIENT = 987654321  # would be seen in a message
TABLE = {"files": "labs.csv", "patient": "pid", "time": "when", "code": "item", "value": "result"}
CSV = """\
when,pid,item,result,unit,note
2024-03-01 08:15,987654321,HR,81.5,bpm,
2024-03-01T08:15:30.25,-7,GLU,,mmol/l,fasting
2024-03-01,987654321,DX//A,NA,,
2024-02-29 23:00:00,987654321,HR,80,bpm,"a, b"
"""


def read(folder: Path, *tables: dict[str, Any], **keys: Any) -> list[tuple[Any, ...]]:
    """The events that the tables become."""
    convert_to(folder / "out", kind="events", tables=list(tables), **keys)
    return events_of(folder / "out").rows()


def test_rows_become_events(tmp_path: Path) -> None:
    """Columns are found by name, in any order; a date alone is the end of its day; patients may be negative."""
    (tmp_path / "labs.csv").write_text(CSV)
    assert read(tmp_path, TABLE) == [
        (-7, datetime(2024, 3, 1, 8, 15, 30, 250_000), "GLU", None, None),
        (PATIENT, datetime(2024, 2, 29, 23), "HR", 80.0, None),
        (PATIENT, datetime(2024, 3, 1, 8, 15), "HR", 81.5, None),
        (PATIENT, datetime(2024, 3, 1, 23, 59, 59), "DX//A", None, None),
    ]


def test_codes_are_joined_prefixed_and_keep_their_text(tmp_path: Path) -> None:
    """Several code columns are joined by `//` without the empty ones; text goes to text_value."""
    (tmp_path / "labs.csv").write_text(CSV)
    found = read(tmp_path, {**TABLE, "code": ["item", "unit"], "prefix": "LAB//", "text": "note"})
    assert [(code, text) for _, _, code, _, text in found] == [
        ("LAB//GLU//mmol/l", "fasting"),
        ("LAB//HR//bpm", "a, b"),
        ("LAB//HR//bpm", None),
        ("LAB//DX//A", None),
    ]


def test_several_tables_and_files_are_one_extract(tmp_path: Path) -> None:
    """A table without `time` holds facts; a pattern names several files; compressed files are read as they are."""
    (tmp_path / "labs.csv").write_text(CSV)
    for number in (1, 2):
        raw = f"pid;sex\n{number};F\n{number};F\n".encode()
        (tmp_path / f"people{number}.csv.gz").write_bytes(gzip.compress(raw))
    people = {"files": "people*.csv.gz", "patient": "pid", "code": "sex", "prefix": "SEX//", "separator": ";"}
    found = read(tmp_path, TABLE, people)
    assert [row for row in found if row[2] == "SEX//F"] == [(n, None, "SEX//F", None, None) for n in (1, 2)]
    assert len(found) == 6


def test_a_folder_whose_name_looks_like_a_pattern_is_a_folder(tmp_path: Path) -> None:
    """Brackets and stars in the name of the YAML's own folder, or of a file, are letters."""
    odd = tmp_path / "site[1]*"
    odd.mkdir()
    for name in ("labs[1].csv", "labs2.csv"):
        (odd / name).write_text(CSV)
    assert len(read(odd, {**TABLE, "files": "labs[1].csv"}, {**TABLE, "files": "../site*/labs2.*"})) == 8


def test_only_reads_the_rows_of_one_hospital(tmp_path: Path) -> None:
    """`only` keeps the rows with that value and no others."""
    (tmp_path / "labs.csv").write_text(CSV)
    assert [row[2] for row in read(tmp_path, {**TABLE, "only": {"unit": "bpm"}})] == ["HR", "HR"]


@pytest.mark.parametrize(
    ("time", "cells", "wanted"),
    [
        ({"format": "%d.%m.%Y %H:%M"}, ["01.03.2024 08:15"], [datetime(2024, 3, 1, 8, 15)]),
        ({"format": "%d.%m.%Y"}, ["01.03.2024"], [datetime(2024, 3, 1, 23, 59, 59)]),
        ({"format": "%Y-%m-%d %H:%M %z"}, ["2024-07-01 08:00 -0400"], [datetime(2024, 7, 1, 14)]),
        ({"unit": "hours"}, ["1.5"], [datetime(2000, 1, 1, 1, 30)]),
        ({"unit": "days", "each": 30, "origin": "2010-01-01"}, ["2"], [datetime(2010, 3, 2)]),
        ({"midnight": "end_of_day"}, ["2024-03-01 00:00:00"], [datetime(2024, 3, 1, 23, 59, 59)]),
        ({}, ["2024-03-01T00:00:00"], [datetime(2024, 3, 1)]),
        # winter and summer differ by an hour of the same zone; `Z`, `+01` and blanks before the offset are read
        (
            {},
            ["2024-03-01T08:00:00Z", "2024-07-01 08:00:00 +00", "2024-07-01T08:00:00.5-04:00", "2024-07-01"],
            [
                datetime(2024, 3, 1, 9),
                datetime(2024, 7, 1, 10),
                datetime(2024, 7, 1, 14, 0, 0, 500_000),
                datetime(2024, 7, 1, 23, 59, 59),
            ],
        ),
    ],
)
def test_times_become_local(tmp_path: Path, time: dict[str, Any], cells: list[str], wanted: list[datetime]) -> None:
    """Formats, numbers since an origin, dates, midnights and zones give the hospital's local time."""
    (tmp_path / "labs.csv").write_text("pid,when,item,result\n" + "".join(f"1,{cell},HR,1\n" for cell in cells))
    table = {**TABLE, "time": {"column": "when", **time}}
    assert [row[1] for row in read(tmp_path, table, timezone="Europe/Berlin")] == sorted(wanted)


def test_hours_since_a_column_follow_that_column(tmp_path: Path) -> None:
    """A number may count from another column's moment, so that a patient's stays do not overlap."""
    (tmp_path / "labs.csv").write_text(
        "pid,in,when,item,result\n1,2024-01-01 10:00,2,HR,1\n1,2025-01-01 10:00,2,HR,2\n"
    )
    table = {**TABLE, "time": {"column": "when", "unit": "hours", "origin_column": "in"}}
    assert [row[1] for row in read(tmp_path, table)] == [datetime(2024, 1, 1, 12), datetime(2025, 1, 1, 12)]


def test_parquet_gives_what_csv_gives(tmp_path: Path) -> None:
    """Typed columns (dates, zoned moments, integers, NaN for missing) become the same events."""
    zone = timezone(timedelta(hours=1))
    pl.DataFrame(
        {
            "pid": pl.Series([PATIENT, -7], dtype=pl.Int32),
            "when": [datetime(2024, 3, 1, 8, 15, tzinfo=zone), datetime(2024, 7, 1, 8, tzinfo=zone)],
            "item": pl.Series(["HR", "GLU "], dtype=pl.Categorical),
            "result": [81.5, float("nan")],
        }
    ).write_parquet(tmp_path / "labs.parquet")
    assert read(tmp_path, {**TABLE, "files": "labs.parquet"}, timezone="Europe/Berlin") == [
        (-7, datetime(2024, 7, 1, 9), "GLU", None, None),
        (PATIENT, datetime(2024, 3, 1, 8, 15), "HR", 81.5, None),
    ]
    pl.DataFrame({"pid": [1], "when": [date(2024, 3, 1)], "item": [250], "result": [None]}).write_parquet(
        tmp_path / "days.parquet"
    )
    (tmp_path / "second").mkdir()
    convert_to(tmp_path / "out2", kind="events", tables=[{**TABLE, "files": "days.parquet"}])
    assert events_of(tmp_path / "out2").rows() == [(1, datetime(2024, 3, 1, 23, 59, 59), "250", None, None)]


def test_text_in_the_number_column_is_kept_when_asked(tmp_path: Path) -> None:
    """`not_numbers: text` keeps `<0.1` for people, and a missing mark is nothing."""
    (tmp_path / "labs.csv").write_text(
        "pid,when,item,result\n" + "".join(f"1,2024-01-01,L,{v}\n" for v in ("<0.1", "2", "NA", ""))
    )
    found = read(tmp_path, {**TABLE, "not_numbers": "text"})
    assert [row[3:] for row in found] == [(None, "<0.1"), (2.0, None), (None, None), (None, None)]


def test_labels_and_splits_are_carried_over(tmp_path: Path) -> None:
    """Given labels and splits come out as MEDS files, and the whole way to sequences works on them."""
    (tmp_path / "labs.csv").write_text(CSV.replace("DX//A", "DX//A").replace("-7", "7"))
    (tmp_path / "l.csv").write_text(
        "pid,at,died,split\n987654321,2024-03-02,yes,train\n7,2024-03-02 10:00,0,held_out\n"
    )
    labels = {"died": {"files": "l.csv", "patient": "pid", "time": "at", "label": "died"}}
    splits = {"files": "l.csv", "patient": "pid"}
    done = convert_to(tmp_path / "out", kind="events", tables=[TABLE], labels=labels, splits=splits)
    assert (done.events, done.patients, done.labels) == (4, 2, {"died": 2})
    directory = MedsDirectory(tmp_path / "out")
    assert directory.read("died", SCHEMA, "train", max_steps=4, bin_hours=None).label.tolist() == [1.0]
    assert directory.read("died", SCHEMA, SPLITS, max_steps=4, bin_hours=None).n_patients == 2


FAULTS: list[tuple[dict[str, Any], str, list[str]]] = [
    ({}, "pid,when,item\n987654321,2024-01-01,SECRET\n", ["`result`"]),
    ({}, "987654321,2024-01-01,SECRET,1\n", ["`pid`", "among its 4"]),
    ({}, "pid;when;item;result\n", ["separator"]),
    ({}, "", ["is empty"]),
    ({}, "\n", ["empty line"]),
    ({}, "pid,when,item,result\n", ["holds no event"]),
    ({}, "pid,when,item,result,pid\n1,2024-01-01,SECRET,1,987654321\n", ["`pid`", "2 times"]),
    ({}, "pid,when,item,result\n987654321,2024-01-01,SECRET,1,5\n", ["number of columns"]),
    ({}, "pid,when,item,result\n,2024-01-01,SECRET,1\n", ["`pid`", "1 of 1", "no patient"]),
    ({}, "pid,when,item,result\nP987654321,2024-01-01,SECRET,1\n", ["`pid`", "number the patients"]),
    ({}, "pid,when,item,result\n98765432100000000000,2024-01-01,SECRET,1\n", ["`pid`", "64 bits"]),
    ({}, "pid,when,item,result\n987654321,,SECRET,1\n", ["`when`", "missing in 1"]),
    ({}, "pid,when,item,result\n987654321,01.02.2024,SECRET,1\n", ["`when`", "`format`"]),
    ({}, "pid,when,item,result\n987654321,2024-01-01 08:00:00Z,SECRET,1\n", ["`when`", "`timezone`"]),
    ({}, "pid,when,item,result\n987654321,2024-01-01,,1\n", ["`item`", "no code"]),
    ({}, 'pid,when,item,result\n987654321,2024-01-01,SECRET,"1,5"\n', ["`result`", "`decimal`"]),
    ({}, "pid,when,item,result\n987654321,2024-01-01,SECRET,inf\n", ["`result`", "infinite"]),
    ({}, "pid,when,item,result\n987654321,2024-01-01,SECRET,1e39\n", ["`result`", "beyond float32"]),
    ({}, 'pid,when,item,result\n987654321,2024-01-01,"SECRET,1\n', ["quotation marks"]),
    ({}, "pid,when,item,result\n987654321,2024-01-01,SECRET\0,1\n", ["NUL"]),
    ({}, "pid,when,item,result\n987654321,2024-01-01,S\udce4CRET,1\n", ["`encoding`"]),
    ({"separator": ";", "decimal": ","}, "pid;when;item;result\n987654321;2024-01-01;SECRET;1.5\n", ["`result`"]),
    ({"time": {"column": "when", "unit": "days"}}, "pid,when,item,result\n987654321,9e9,SECRET,1\n", ["`unit`"]),
    ({"files": "absent*.csv"}, "x", ["absent*.csv", "no such file"]),
]


@pytest.mark.parametrize(("keys", "text", "words"), FAULTS)
def test_faulty_tables_are_refused(tmp_path: Path, keys: dict[str, Any], text: str, words: list[str]) -> None:
    """Each fault is one line that names file, column and remedy, shows nothing of a patient, and leaves no folder."""
    (tmp_path / "labs.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError) as caught:
        convert_to(tmp_path / "out", kind="events", tables=[{**TABLE, **keys}])
    message = str(caught.value)
    assert [word for word in words if word not in message] == []
    assert not [secret for secret in ("9876", "SECRET", "\n") if secret in message]
    assert [path.name for path in tmp_path.iterdir()] == ["labs.csv"]


def test_zones_in_some_times_only_are_refused(tmp_path: Path) -> None:
    """Whether in one column or in two tables: nobody can say what the times without a zone meant."""
    head = "pid,when,item,result\n"
    (tmp_path / "labs.csv").write_text(head + "1,2024-01-01 08:00:00Z,HR,1\n")
    (tmp_path / "more.csv").write_text(head + "1,2024-01-01 08:00:00,HR,1\n")
    (tmp_path / "both.csv").write_text(head + "1,2024-01-01 08:00:00Z,HR,1\n1,2024-01-01 08:00:00,HR,1\n")
    for tables in ([TABLE, {**TABLE, "files": "more.csv"}], [{**TABLE, "files": "both.csv"}]):
        with pytest.raises(DataError, match="some times of this extract carry a zone and others do not"):
            convert_to(tmp_path / "out", kind="events", tables=tables, timezone="Europe/Berlin")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"time": {"column": "when", "each": 2}}, "`unit`"),
        ({"time": {"column": "when", "unit": "days", "format": "%d"}}, "exclude each other"),
        ({"time": {"column": "when", "format": "%Y-%m"}}, "names no year or no day"),
        ({"time": {"column": "when", "format": "%H:%M"}}, "names no year or no day"),
        ({"code": []}, "list at least one"),
        ({"text": "note", "not_numbers": "text"}, "remove one"),
        ({"seperator": ";"}, "did you mean `separator`"),
    ],
)
def test_terms_that_cannot_be_are_refused(keys: dict[str, Any], words: str) -> None:
    """A YAML that contradicts itself is one clear line."""
    with pytest.raises(ConfigurationError, match=words) as caught:
        terms_of(kind="events", tables=[{**TABLE, **keys}])
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not EVENTS_CSV.is_file(), reason=f"{EVENTS_CSV} is absent")
def test_real_event_table_of_one_site_has_the_events_of_its_meds_form(tmp_path: Path) -> None:
    """The smallest site of Diabetes 130: the CSV rows and the MEDS form made elsewhere hold the same facts."""
    table = {"files": str(EVENTS_CSV), "patient": "patient_id", "code": "code", "value": "value"}
    when = {"column": "visit", "unit": "days", "each": 30}
    convert_to(tmp_path / "out", kind="events", tables=[{**table, "time": when, "only": {"site": "hmo"}}])
    ours = events_of(tmp_path / "out")
    theirs = pl.read_parquet(EVENTS_CSV.parents[1] / "meds/hmo/data/0.parquet")
    columns = ["subject_id", "visit", "code", "numeric_value"]  # in the MEDS form, hours and days pass within a visit

    def visits(events: pl.DataFrame) -> pl.DataFrame:
        visit = (pl.col("time") - datetime(2000, 1, 1)).dt.total_days() // 30
        return events.with_columns(visit=visit).select(columns).sort(columns)

    assert visits(ours).equals(visits(theirs))


@pytest.mark.full
@pytest.mark.parametrize("way", ["events", "folder"])
@pytest.mark.skipif(not EVENTS_CSV.is_file(), reason=f"{EVENTS_CSV} is absent")
def test_two_million_events_take_less_than_their_memory(way: str) -> None:
    """1,943,790 rows of CSV.gz, read or written as a MEDS folder in a process of its own, peak below 1.5 GB."""
    command = [sys.executable, "-m", "tests.benchmarks.read_raw", "--data", str(DATA), "--here", way]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=True)
    events, _, _, peak = map(float, done.stdout.split())
    assert events == 1_943_790
    assert peak < 1500 * 1e6 / 2**20


def test_only_goes_with_labels_and_splits_too(tmp_path: Path) -> None:
    """Of one file that holds several hospitals, the labels and splits of other hospitals' patients are not read."""
    (tmp_path / "labs.csv").write_text("pid,when,item,result,site\n1,2024-01-01,HR,80,a\n2,2024-01-01,HR,80,b\n")
    (tmp_path / "l.csv").write_text("pid,at,died,split,site\n1,2024-01-02,1,train,a\n2,2024-01-02,0,nowhere,b\n")
    mine = {"files": "l.csv", "patient": "pid", "only": {"site": "a"}}
    labels = {"died": {**mine, "time": "at", "label": "died"}}
    table = {**TABLE, "only": {"site": "a"}}
    done = convert_to(tmp_path / "out", kind="events", tables=[table], labels=labels, splits=mine)
    assert (done.patients, done.labels) == (1, {"died": 1})
    splits = pl.read_parquet(tmp_path / "out/metadata/subject_splits.parquet")
    assert splits.rows() == [(1, "train")]
