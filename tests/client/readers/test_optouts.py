"""Patients who opted out: as if they had never been in the records."""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from client.hospital import site_with
from client.ledger import MemoryLedger
from client.readers.meds import MedsDirectory
from client.readers.optouts import WithoutOptouts, read_optouts
from client.readers.own import read_records
from client.site_file import load_site_file, study_of
from common.batching import Batch, Dataset
from common.errors import DataError
from common.models.network import build_network
from common.provenance import code_digest
from common.records import Header, Request, Status
from common.schema import SUBJECT_ID
from common.sequences import Sequences
from common.training import state_of
from tests.client.hospitals import with_key, write_site, write_study


def optouts(folder: Path, ids: list[int]) -> Path:
    path = folder / "optouts.csv"
    path.write_text("\n".join([SUBJECT_ID, *map(str, ids)]) + "\n")
    return path


def training_ids(root: Path, folder: Path) -> list[int]:
    """Ids of the patients who would train without anybody opting out."""
    study = write_study(folder)
    options = {"max_steps": study.records.max_steps, "bin_hours": None}
    found = MedsDirectory(root).read(study.task.name, study.features, "train", **options)  # type: ignore[arg-type]  # two kinds in one dict
    return [int(one) for one in found.patient_id]


def without_rows(root: Path, folder: Path, ids: list[int]) -> Path:
    """A copy of a MEDS directory from which every row of these patients was deleted."""
    shutil.copytree(root, folder / "copy")
    for path in (folder / "copy").rglob("*.parquet"):
        table = pl.read_parquet(path, glob=False)
        if SUBJECT_ID in table.columns:
            table.filter(~pl.col(SUBJECT_ID).is_in(ids)).write_parquet(path)
    return folder / "copy"


def test_reading_is_as_if_they_had_never_been_there(cohort: dict[str, Path], tmp_path: Path) -> None:
    """Sequences and coverage equal those of a directory from which all of their rows were deleted."""
    ids = training_ids(cohort["north"], tmp_path)[::7]
    study = write_study(tmp_path)
    left_out = WithoutOptouts(cohort["north"], read_optouts(optouts(tmp_path, [*ids, 99_999_999])))
    deleted = MedsDirectory(without_rows(cohort["north"], tmp_path, ids))
    one, two = (
        directory.read(study.task.name, study.features, "train", max_steps=24, bin_hours=None)
        for directory in (left_out, deleted)
    )
    assert one.n_patients > 0
    for field in fields(Sequences):
        assert np.array_equal(getattr(one, field.name), getattr(two, field.name)), field.name
    assert left_out.coverage(study.features) == deleted.coverage(study.features)


def test_they_are_in_no_batch(cohort: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A site whose every patient is drawn trains on all the others and on none of those who opted out."""
    everybody = training_ids(cohort["north"], tmp_path)
    ids = everybody[::5]
    optouts(tmp_path, ids)
    study = write_study(
        tmp_path, privacy={"epsilon": 3.0, "delta": 1e-5, "sampling_rate": 1.0, "clip": 1.0, "spare_rounds": 0}
    )
    server = {"address": "localhost:1", "plaintext": True}
    site, state, _ = with_key(write_site(tmp_path, cohort["north"], server, exclude="optouts.csv"))
    seen: set[int] = set()
    usual = Dataset.batch

    def batch(self: Dataset, patients: NDArray[np.int64]) -> Batch:
        seen.update(int(one) for one in self.sequences.patient_id[patients])
        return usual(self, patients)

    monkeypatch.setattr(Dataset, "batch", batch)
    hospital = site_with(MemoryLedger(3.0, 1e-5), site, study, state)
    weights = state_of(build_network(study))
    assert hospital.train(Request(Header(study.digest(), code_digest(), 1), weights)).status is Status.OK
    assert seen == set(everybody) - set(ids)


def test_without_a_file_nobody_is_left_out(cohort: dict[str, Path], tmp_path: Path) -> None:
    """`exclude` is optional, and an empty list excludes nobody."""
    everybody = training_ids(cohort["north"], tmp_path)
    server = {"address": "localhost:1", "plaintext": True}
    for more in ({}, {"exclude": str(optouts(tmp_path, []))}):
        path = write_site(tmp_path, cohort["north"], server, state=f"state{len(more)}", **more)
        site, state, _ = with_key(path)
        assert read_records(site, study_of(load_site_file(path)), state).patient_id.tolist() == everybody


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "first line must be `subject_id`"),
        ("4711\n", "first line must be `subject_id`"),
        ("subject_id,reason\n4711,x\n", "first line must be `subject_id`"),
        ("subject_id\n4711\nA4712\n", "line 3 is no whole number"),
        ("subject_id\n4711,4712\n", "line 2 is no whole number"),
        ("subject_id\n99999999999999999999\n", "line 2 does not fit into 64 bits"),
        ("subject_id\n4711.0\n", "line 2 is no whole number"),
    ],
)
def test_a_file_that_is_not_understood_is_refused(content: str, expected: str, tmp_path: Path) -> None:
    """A guess could train on somebody who said no; the error names the line, and no id."""
    path = tmp_path / "optouts.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=expected) as caught:
        read_optouts(path)
    assert "4711" not in str(caught.value)
    assert "4712" not in str(caught.value)


def test_plain_variants_are_understood(tmp_path: Path) -> None:
    """A byte order mark, quotes, empty lines, other line ends and an id given twice are no fault."""
    path = tmp_path / "optouts.csv"
    path.write_bytes(b'\xef\xbb\xbf"subject_id"\r\n7\r\n\r\n"3"\r\n7\r\n-1\r\n')
    assert read_optouts(path).to_list() == [-1, 3, 7]


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """A file of opt-outs that is named and not there stops everything."""
    with pytest.raises(DataError, match="no such file; without it nobody knows who opted out"):
        read_optouts(tmp_path / "optouts.csv")


def test_events_without_a_patient_are_still_refused(cohort: dict[str, Path], tmp_path: Path) -> None:
    """Leaving patients out must not leave out the check that every event has one."""
    study = write_study(tmp_path)
    copy = without_rows(cohort["north"], tmp_path, [])
    shard = next((copy / "data").rglob("*.parquet"))
    table = pl.read_parquet(shard, glob=False)
    nobody = pl.when(pl.int_range(pl.len()) == 0).then(None).otherwise(pl.col(SUBJECT_ID)).alias(SUBJECT_ID)
    table.with_columns(nobody).write_parquet(shard)
    directory = WithoutOptouts(copy, read_optouts(optouts(tmp_path, [1])))
    with pytest.raises(DataError, match=r"`subject_id` is null in 1 of"):
        directory.coverage(study.features)


def test_nobody_left_is_one_line(cohort: dict[str, Path], tmp_path: Path) -> None:
    """If everybody opted out there is nothing to read, and the error says why."""
    study = write_study(tmp_path)
    labels = pl.read_parquet(cohort["west"] / "labels" / f"{study.task.name}.parquet")
    everybody = optouts(tmp_path, labels[SUBJECT_ID].unique().to_list())
    with pytest.raises(DataError, match="everybody with a label of task diagnosis opted out"):
        WithoutOptouts(cohort["west"], read_optouts(everybody)).labels(study.task.name)
