"""The two PhysioNet challenges' text files: what they become, and that a patient's file is never named."""

from __future__ import annotations

import os
from datetime import datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from client.readers import physionet
from client.readers.meds import MedsDirectory
from common.errors import DataError
from common.schema import SPLITS, FeatureSchema
from common.terms import load
from tests.client.readers.extracts import convert_to, events_of
from tests.common.plain_sequences import same

REPOSITORY = Path(__file__).parents[3]
DATA = Path(os.environ.get("WARDROUND_DATA", REPOSITORY.parent / "shared" / "data")) / "physionet2012"
START = datetime(2000, 1, 1)
STAY_2012 = """\
Time,Parameter,Value
00:00,RecordID,{id}
00:00,Age,54
00:00,Height,-1
00:00,Weight,-1
00:00,ICUType,4
00:07,HR,73
47:59,Urine,900.5
"""
HEAD_2019 = "HR|Temp|Age|Gender|Unit1|HospAdmTime|ICULOS|SepsisLabel"


def minutes(number: int) -> datetime:
    return START + timedelta(minutes=number)


@pytest.fixture
def set_a(tmp_path: Path) -> Path:
    """Three stays of 2012."""
    folder = tmp_path / "set-a"
    folder.mkdir()
    for stay in (98765001, 98765002, 98765003):
        (folder / f"{stay}.txt").write_text(STAY_2012.format(id=stay))
    return folder


@pytest.fixture
def set_b(tmp_path: Path) -> Path:
    """Two stays of 2019."""
    folder = tmp_path / "training_setA"
    folder.mkdir()
    first = ["NaN|NaN|60|1|NaN|-0.5|1|0", "80|37.5|60|1|NaN|-0.5|2|1"]
    (folder / "p98765001.psv").write_text("\n".join([HEAD_2019, *first]))
    (folder / "p98765002.psv").write_text("\r\n".join([HEAD_2019, "90|NaN|70|0|1|-3|5|0", ""]))
    return folder


def test_stays_of_2012_become_events(set_a: Path) -> None:
    """Facts lose their time, -1 is left out, other lines keep their minute; outcomes become labels after 48 hours."""
    (set_a.parent / "o.txt").write_text("RecordID,SAPS-I,In-hospital_death\n98765001,6,0\n98765002,6,1\n5,6,1\n")
    done = convert_to(set_a.parent / "out", kind="physionet2012", folders="set-a", outcomes="o.txt")
    assert (done.patients, done.left_out) == (3, {"numbers that mean missing (-1)": 6})
    found = events_of(set_a.parent / "out").drop("text_value").filter(pl.col("subject_id") == 98765002)
    assert [row[1:] for row in found.rows()] == [
        (None, "Age", 54.0),
        (None, "ICUType", 4.0),
        (minutes(7), "HR", 73.0),
        (minutes(47 * 60 + 59), "Urine", 900.5),
    ]
    labels = pl.read_parquet(set_a.parent / "out/labels/in_hospital_death.parquet")
    assert labels.rows() == [(98765001, minutes(48 * 60), False), (98765002, minutes(48 * 60), True)]


def test_stays_of_2019_become_events(set_b: Path) -> None:
    """Hour k ends after k hours; facts count once; SepsisLabel is never an event, and a label only when asked."""
    keys = {"kind": "physionet2019", "folders": "training_setA"}
    convert_to(set_b.parent / "out", **keys)
    assert events_of(set_b.parent / "out").drop("text_value").rows() == [
        (98765001, None, "Age", 60.0),
        (98765001, None, "Gender", 1.0),
        (98765001, None, "HospAdmTime", -0.5),
        (98765001, minutes(120), "HR", 80.0),
        (98765001, minutes(120), "Temp", 37.5),
        (98765002, None, "Age", 70.0),
        (98765002, None, "Gender", 0.0),
        (98765002, None, "Unit1", 1.0),
        (98765002, None, "HospAdmTime", -3.0),
        (98765002, minutes(300), "HR", 90.0),
    ]
    assert not list((set_b.parent / "out/labels").iterdir())
    convert_to(set_b.parent / "out2", **keys, carry_label=True)
    labels = pl.read_parquet(set_b.parent / "out2/labels/sepsis.parquet")
    assert [row[1:] for row in labels.rows()] == [(minutes(60), False), (minutes(120), True), (minutes(300), False)]


def test_how_many_files_are_parsed_together_changes_nothing(
    set_a: Path, set_b: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file at a time gives the same events as all at once."""
    for kind, folder in (("physionet2012", set_a), ("physionet2019", set_b)):
        convert_to(folder.parent / f"{kind}-all", kind=kind, folders=str(folder))
        with monkeypatch.context() as patch:
            patch.setattr(physionet, "_TOGETHER_BYTES", 0)
            convert_to(folder.parent / f"{kind}-one", kind=kind, folders=str(folder))
        assert events_of(folder.parent / f"{kind}-all").equals(events_of(folder.parent / f"{kind}-one"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["file 2 of 3", "is empty"]),
        ("Time,Parameter\n", ["file 2 of 3", "not that of the first"]),
        ("Time,Parameter,Value\n00:07,SECRET\n", ["file 2 of 3", "number of columns"]),
        ("Time,Parameter,Value\n00:07,SECRET,1\n\n00:08,SECRET,2\n", ["file 2 of 3", "empty line"]),
        ("Time,Parameter,Value\n00:07,SECRET,high\n", ["`Value`", "is no number"]),
        ("Time,Parameter,Value\n7,SECRET,1\n", ["`Time`", "hours:minutes"]),
        ("Time,Parameter,Value\n00:00,RecordID,98765009\n", ["RecordID is not the name"]),
        ("Time,Parameter,Value\n00:07,SECRET\0,1\n", ["file 2 of 3", "NUL"]),
    ],
)
def test_a_faulty_file_is_named_by_its_position(set_a: Path, content: str, words: list[str]) -> None:
    """The file's name is a patient's number, so it is not in the message; nor is anything in the file."""
    (set_a / "98765002.txt").write_text(content)
    with pytest.raises(DataError) as caught:
        convert_to(set_a.parent / "out", kind="physionet2012", folders="set-a")
    assert [word for word in words if word not in str(caught.value)] == []
    assert not [secret for secret in ("98765", "SECRET", "\n") if secret in str(caught.value)]


@pytest.mark.parametrize("name", ["SECRET.txt", "p1x.txt", "098765001.txt"])
def test_a_folder_with_other_files_is_refused(set_a: Path, name: str) -> None:
    """A name that is no number, or the same number twice, is refused without being shown."""
    (set_a / name).write_text(STAY_2012.format(id=1))
    with pytest.raises(DataError, match="named by") as caught:
        convert_to(set_a.parent / "out", kind="physionet2012", folders="set-a")
    assert name[:5] not in str(caught.value)


def test_a_folder_without_stays_is_refused(tmp_path: Path) -> None:
    """A wrong folder is named."""
    with pytest.raises(DataError, match=r"no \*\.psv file"):
        convert_to(tmp_path / "out", kind="physionet2019", folders=".")


@pytest.mark.skipif(not (DATA / "raw_sample").is_dir(), reason=f"{DATA / 'raw_sample'} is absent")
def test_real_text_files_and_their_meds_form_give_identical_sequences(tmp_path: Path) -> None:
    """40 real stays, read from the challenge's text and from MEDS folders made elsewhere, are the same to the model."""
    sample = DATA / "raw_sample"
    keys = {"folders": str(sample / "set-a"), "outcomes": str(sample / "Outcomes-a.txt")}
    convert_to(tmp_path / "text", kind="physionet2012", **keys)
    stays = events_of(tmp_path / "text")["subject_id"].unique()
    other = tmp_path / "meds"
    (other / "labels").mkdir(parents=True)
    (other / "data").mkdir()
    for name in ("data/0.parquet", "labels/in_hospital_death.parquet"):
        frame = pl.concat([pl.read_parquet(site / name) for site in sorted((DATA / "meds").iterdir())])
        frame.filter(pl.col("subject_id").is_in(stays.implode())).write_parquet(other / name)
    schema = load(REPOSITORY / "configs/features/physionet2012.yaml", FeatureSchema)
    for bins in (None, 2.0):
        one, two = (
            MedsDirectory(folder).read(
                "in_hospital_death", schema, SPLITS, max_steps=100, bin_hours=bins, split_key=bytes(32)
            )
            for folder in (tmp_path / "text", other)
        )
        assert one.n_patients == 40
        assert same(one, two)
