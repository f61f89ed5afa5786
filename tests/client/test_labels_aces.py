"""Labels as ACES writes them, in one file or a folder of shards, through the reader that a study uses."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq  # type: ignore[import-untyped]  # pyarrow ships no types
import pytest
from meds.schema import LabelSchema
from typer.testing import CliRunner

from client.commands import app
from client.hospital import site_with
from client.ledger import MemoryLedger
from client.readers.meds import MedsDirectory
from client.readers.own import read_records
from common.errors import DataError
from common.models.network import build_network
from common.provenance import code_digest
from common.records import WIRE_VERSION, Header, Request, Status
from common.training import state_of
from tests.client.hospitals import with_key, write_site, write_study

SERVER = {"address": "localhost:1", "plaintext": True}


def write_as_aces(rows: pl.DataFrame, path: Path) -> None:
    """What ACES 0.7 does with a cohort (src/aces/run.py): all four label columns, aligned, by pyarrow."""
    kinds = {"integer_value": pl.Int64, "float_value": pl.Float64, "categorical_value": pl.String}
    table = rows.with_columns(pl.lit(None, dtype=kind).alias(name) for name, kind in kinds.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(LabelSchema.align(table.to_arrow()), path)


@pytest.fixture
def records(own_process: None, cohort: dict[str, Path], tmp_path: Path) -> Path:
    """North's records without its label files."""
    shutil.copytree(cohort["north"], tmp_path / "records")
    shutil.rmtree(tmp_path / "records" / "labels")
    write_study(tmp_path)
    return tmp_path / "records"


@pytest.fixture
def rows(cohort: dict[str, Path]) -> pl.DataFrame:
    return pl.read_parquet(cohort["north"] / "labels" / "diagnosis.parquet").sample(fraction=1, shuffle=True, seed=1)


@pytest.mark.parametrize(
    "shards",
    [
        ["diagnosis.parquet"],
        ["diagnosis/0.parquet", "diagnosis/1.parquet"],
        ["diagnosis/train/0.parquet", "diagnosis/train/1.parquet", "diagnosis/held_out/a/0.parquet"],
    ],
)
def test_any_layout_gives_the_same_sequences(
    records: Path, rows: pl.DataFrame, cohort: dict[str, Path], shards: list[str]
) -> None:
    """One file or many, at any depth, in any order of rows, one shard empty: as from the cohort's own label file."""
    for number, shard in enumerate(shards):
        write_as_aces(rows[number :: len(shards)], records / "labels" / shard)
    if len(shards) > 1:
        write_as_aces(rows.clear(), records / "labels" / "diagnosis" / "nobody.parquet")
    sites = [with_key(write_site(where, folder, SERVER)) for where, folder in places(records, cohort)]
    study = write_study(records.parent)
    ours, original = (read_records(site, study, state) for site, state, _ in sites)
    for name in ("patient_id", "label", "prediction_time", "values", "codes", "start"):
        assert np.array_equal(getattr(ours, name), getattr(original, name))


def places(records: Path, cohort: dict[str, Path]) -> list[tuple[Path, Path]]:
    other = records.parent / "other"
    other.mkdir()
    shutil.copy(records.parent / "study.yaml", other)
    return [(records.parent, records), (other, cohort["north"])]


def test_a_site_trains_and_checks_from_shards(records: Path, rows: pl.DataFrame) -> None:
    """`client check` finds labels, splits and sequences in order, and a round of training answers OK."""
    write_as_aces(rows[::2], records / "labels" / "diagnosis" / "train" / "0.parquet")
    write_as_aces(rows[1::2], records / "labels" / "diagnosis" / "train" / "1.parquet")
    path = write_site(records.parent, records, SERVER)
    site, state, _ = with_key(path)
    said = CliRunner().invoke(app, ["check", str(path)]).output
    for name in ("labels", "splits", "sequences", "prediction time"):
        assert f"pass        {name}" in said
    study = write_study(records.parent)
    opened = site_with(MemoryLedger(3.0, 1e-5), site, study, state)
    header = Header(study.digest(), code_digest(), 1, WIRE_VERSION)
    assert opened.train(Request(header, state_of(build_network(study)))).status == Status.OK


def test_what_cannot_be_meant_is_one_clear_error(records: Path, rows: pl.DataFrame) -> None:
    """A file and a folder, a row in two shards, shards without a row, and a cohort without a prediction time."""
    labels = MedsDirectory(records).labels
    folder = records / "labels" / "diagnosis"
    write_as_aces(rows.clear(), folder / "0.parquet")
    with pytest.raises(DataError, match="diagnosis: no label row in 1 files"):
        labels("diagnosis")
    assert MedsDirectory(records).tasks == ["diagnosis"]
    write_as_aces(rows, folder / "1.parquet")
    write_as_aces(rows.head(2), folder / "2.parquet")
    with pytest.raises(DataError, match=r"2 of \d+ rows repeat a patient and prediction time"):
        labels("diagnosis")
    write_as_aces(rows, records / "labels" / "diagnosis.parquet")
    with pytest.raises(DataError, match="has this file and the folder"):
        labels("diagnosis")
    shutil.rmtree(folder)
    untimed = rows.with_columns(prediction_time=pl.lit(None, pl.Datetime("us")))
    untimed.write_parquet(records / "labels" / "diagnosis.parquet")
    with pytest.raises(DataError, match="`prediction_time` is null in"):
        labels("diagnosis")
    with pytest.raises(DataError, match="no label file for task other; tasks found: diagnosis"):
        labels("other")
