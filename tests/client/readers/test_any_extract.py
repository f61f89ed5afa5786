"""Any damage to any kind of extract: events, or one clear error without anything of a patient in it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.client.readers.extracts import convert_to, events_of, read_or_refused

SECRETS = ("98765", "Zyx", "77.125", "1987")

WIDE = "pid,when,hr,sex\n" + "".join(f"98765{k % 3},1987-01-0{k} 10:00,77.125,Zyx\n" for k in range(1, 9))
CODES = "pid,codes,sick\n" + "".join(f"98765{k},Zyx1;Zyx{k},{k % 2}\n" for k in range(8))
STAY_2012 = "Time,Parameter,Value\n00:00,RecordID,{id}\n00:00,Age,77.125\n00:07,Zyx,77.125\n01:00,Zyx,1987\n"
STAY_2019 = "HR|Age|ICULOS|SepsisLabel\n77.125|1987|1|0\nNaN|1987|2|1\n"
CDM = {
    "person": "person_id,gender_concept_id,gender_source_value,year_of_birth\n-98765,0,Zyx,1987\n",
    "visit_occurrence": "visit_occurrence_id,person_id,visit_concept_id,visit_start_datetime,visit_end_date\n"
    "5,-98765,9201,1987-01-01 10:00:00,1987-01-03\n",
    "condition_occurrence": "person_id,condition_concept_id,condition_source_value,condition_start_date,"
    "condition_type_concept_id,visit_occurrence_id\n-98765,0,Zyx,1987-01-01,32821,5\n",
    "measurement": "person_id,measurement_concept_id,measurement_datetime,value_as_number,unit_concept_id,"
    "unit_source_value,value_as_concept_id\n-98765,300,1987-01-01 12:00:00,77.125,,Zyx,\n",
}


def events(place: Path) -> dict[str, Any]:
    (place / "e.csv").write_text(WIDE)
    (place / "l.csv").write_text("subject_id,prediction_time,boolean_value,split\n987650,1987-02-01,1,train\n")
    table = {"files": "e.csv", "patient": "pid", "time": "when", "code": "sex", "value": "hr"}
    return {"kind": "events", "tables": [table], "labels": {"t": {"files": "l.csv"}}, "splits": {"files": "l.csv"}}


def wide(place: Path) -> dict[str, Any]:
    (place / "w.csv").write_text(WIDE)
    return {"kind": "wide", "files": "w.csv", "patient": "pid", "time": "when", "values": {"hr": "HR"}} | {
        "static_codes": {"sex": "SEX//"}
    }


def code_sequences(place: Path) -> dict[str, Any]:
    (place / "c.csv").write_text(CODES)
    return {"kind": "code_sequences", "files": "c.csv", "patient": "pid", "codes": "codes", "label": "sick"}


def physionet2012(place: Path) -> dict[str, Any]:
    (place / "set").mkdir()
    for stay in (987651, 987652, 987653):
        (place / f"set/{stay}.txt").write_text(STAY_2012.format(id=stay))
    (place / "o.txt").write_text("RecordID,In-hospital_death\n987651,0\n987652,1\n")
    return {"kind": "physionet2012", "folders": "set", "outcomes": "o.txt"}


def physionet2019(place: Path) -> dict[str, Any]:
    (place / "set").mkdir()
    for stay in (987651, 987652):
        (place / f"set/p{stay}.psv").write_text(STAY_2019)
    return {"kind": "physionet2019", "folders": "set", "carry_label": True}


def omop(place: Path) -> dict[str, Any]:
    (place / "cdm").mkdir()
    for table, text in CDM.items():
        (place / f"cdm/{table}.csv").write_text(text)
    return {"kind": "omop", "folder": "cdm"}


KINDS = [events, wide, code_sequences, physionet2012, physionet2019, omop]
PIECES = [b"\0", b'"', b"\n", b"\r", b"\xc3", b",", b"|", b"\xff\xfe", b"-", b"9" * 30, b"1e400", b" ", b"T", b"Z", b""]


@pytest.mark.parametrize("make", KINDS)
def test_an_extract_as_it_should_be_is_converted(make: Callable[[Path], dict[str, Any]], tmp_path: Path) -> None:
    """Before damage, each of these extracts gives events."""
    convert_to(tmp_path / "out", **make(tmp_path))
    assert len(events_of(tmp_path / "out"))


@pytest.mark.parametrize("make", KINDS)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_a_damaged_extract_gives_events_or_one_clear_error(
    make: Callable[[Path], dict[str, Any]], data: st.DataObject
) -> None:
    """Bytes cut, replaced or put in anywhere, and files that are emptied, end in events or in one line of the command,
    with nothing of a patient in it, not even the name of a file that is named after one; and nothing is left.
    """
    with tempfile.TemporaryDirectory(prefix="wardround") as name:
        place = Path(name)
        keys = make(place)
        before = sorted(path for path in place.rglob("*") if path.is_file())
        for _ in range(data.draw(st.integers(1, 3))):
            path = data.draw(st.sampled_from(before), label="file")
            content = path.read_bytes()
            first, last = sorted(data.draw(st.tuples(*[st.integers(0, len(content))] * 2), label="from, to"))
            length = data.draw(st.sampled_from([0, 1, last - first]), label="removed")
            path.write_bytes(content[:first] + data.draw(st.sampled_from(PIECES)) + content[first + length :])
        read_or_refused(place, SECRETS, **keys)


@pytest.mark.parametrize("make", KINDS)
def test_an_empty_or_broken_file_is_read_or_refused(make: Callable[[Path], dict[str, Any]], tmp_path: Path) -> None:
    """Each file in turn: nothing, a line end, a BOM, the names of the columns alone; one patient; a NUL byte, which is
    always refused, at whichever end of the file.
    """
    make(tmp_path)
    names = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    for number, name in enumerate(names):
        whole = (tmp_path / name).read_bytes()
        lines = whole.splitlines(keepends=True)
        broken = [b"", b"\n", b"\xef\xbb\xbf", lines[0], lines[0].rstrip(), b"".join(lines[:2])]
        nul = [b"\0" + whole, whole[:-2] + b"\0" + whole[-2:], whole + b"\0", whole.decode().encode("utf-16")]
        for case, content in enumerate([*broken, *nul]):
            place = tmp_path / f"{number}-{case}"
            place.mkdir()
            keys = make(place)
            (place / name).write_bytes(content)
            read = read_or_refused(place, SECRETS, **keys)
            assert not (read and content in nul)
