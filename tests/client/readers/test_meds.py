"""MEDS directories: the way from a folder to sequences, the split, and what is refused."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq  # type: ignore[import-untyped]  # pyarrow ships no types
import pytest
from meds.schema import DataSchema

from client.readers.meds import MedsDirectory, read, split_by_key
from common.errors import ConfigurationError, DataError, WardroundError
from common.schema import SPLITS, FeatureSchema
from common.sequences import Sequences, build, check_trainable
from common.terms import load
from tests.common.plain_sequences import SCHEMA, hours, same

REPOSITORY = Path(__file__).parents[3]
DATA = Path(os.environ.get("WARDROUND_DATA", REPOSITORY.parent / "shared" / "data"))
PHYSIONET, DIABETES = DATA / "physionet2012", DATA / "diabetes130"
KEY = bytes(range(32))
BASE = 987654000  # ids that would be seen in a message
HOW: dict[str, Any] = {"max_steps": 4, "bin_hours": None}


def events_table(patients: int = 8) -> pl.DataFrame:
    """Three events of each patient."""
    rows = [
        row
        for subject in range(BASE, BASE + patients)
        for row in (
            (subject, None, "AGE", 60.0),
            (subject, hours(0), "HR", 85.0 + subject % 7),
            (subject, hours(1), "DX//A", None),
        )
    ]
    types = {
        "subject_id": pl.Int64(),
        "time": pl.Datetime("us"),
        "code": pl.String(),
        "numeric_value": pl.Float32(),
    }
    return pl.DataFrame(rows, schema=types, orient="row")


def labels_table(patients: int = 8) -> pl.DataFrame:
    """One label row of each patient."""
    return pl.DataFrame(
        {
            "subject_id": range(BASE, BASE + patients),
            "prediction_time": [hours(2)] * patients,
            "boolean_value": [i % 2 == 0 for i in range(patients)],
        }
    )


def splits_table(patients: int = 8) -> pl.DataFrame:
    """Half of the patients in train, a quarter each in tuning and held_out."""
    cycle = ("train", "train", "tuning", "held_out")
    return pl.DataFrame({"subject_id": range(BASE, BASE + patients), "split": [cycle[i % 4] for i in range(patients)]})


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A directory with two shards, one task and a split file."""
    for folder in ("data/a", "labels", "metadata"):
        (tmp_path / folder).mkdir(parents=True)
    events = events_table()
    events.head(12).write_parquet(tmp_path / "data/0.parquet")
    events.tail(12).write_parquet(tmp_path / "data/a/1.parquet")
    labels_table().write_parquet(tmp_path / "labels/died.parquet")
    splits_table().write_parquet(tmp_path / "metadata/subject_splits.parquet")
    return tmp_path


def test_reads_what_build_makes_of_the_tables(site: Path) -> None:
    """Shards in any folder below data/ give the same sequences as the tables in memory."""
    rows = labels_table().filter(pl.col("subject_id").is_in([BASE, BASE + 1, BASE + 4, BASE + 5]))
    assert same(read(site, "died", SCHEMA, "train", **HOW), build(events_table().lazy(), rows, SCHEMA, **HOW))


def test_splits_partition_the_patients(site: Path) -> None:
    """The three splits together are all labelled patients, each once."""
    parts = [read(site, "died", SCHEMA, split, **HOW).patient_id.tolist() for split in SPLITS]
    assert [len(part) for part in parts] == [4, 2, 2]
    together = sorted(subject for part in parts for subject in part)
    assert together == read(site, "died", SCHEMA, SPLITS, **HOW).patient_id.tolist()


def test_tables_aligned_by_meds_are_read(site: Path) -> None:
    """Files in the exact types of the `meds` package (string, not large_string) are read the same."""
    before = read(site, "died", SCHEMA, SPLITS, **HOW)
    for shard in MedsDirectory(site).shards:
        pq.write_table(DataSchema.align(pl.read_parquet(shard).to_arrow()), shard)
    assert same(before, read(site, "died", SCHEMA, SPLITS, **HOW))


def test_coverage_adds_up_over_shards(site: Path) -> None:
    """The fates of all events of all shards are counted."""
    counted = MedsDirectory(site).coverage(SCHEMA)
    assert (counted.events, counted.usable, counted.known) == (24, 24, 24)


def test_tasks_are_the_label_files(site: Path) -> None:
    """A person can ask which tasks a directory has."""
    assert MedsDirectory(site).tasks == ["died"]


def test_path_with_glob_characters_is_a_plain_path(site: Path) -> None:
    """A folder name with brackets or stars is not read as a pattern."""
    odd = site / "site[1]*"
    odd.mkdir()
    for folder in ("data", "labels", "metadata"):
        (site / folder).rename(odd / folder)
    assert read(odd, "died", SCHEMA, "train", **HOW).n_patients == 4


def test_split_by_key_is_fixed() -> None:
    """The same key and id give the same split for ever: a version that moved patients would leak test into train."""
    subjects = pl.Series([-1, 0, 1, 2, 3, 4, 5, 6, 2**62])
    assert split_by_key(subjects, KEY)["split"].to_list() == [
        *("train", "held_out", "tuning", "train", "tuning"),
        *("train", "train", "train", "train"),
    ]


def test_split_by_key_has_its_shares_and_depends_on_the_key() -> None:
    """About 70/15/15 percent, each patient alone, another key another split."""
    subjects = pl.Series(range(20_000))
    split = split_by_key(subjects, KEY)["split"]
    counts = Counter(split.to_list())
    # 5 standard deviations of a binomial count: sqrt(20000 * .7 * .3) = 65, sqrt(20000 * .15 * .85) = 50
    assert abs(counts["train"] - 14_000) < 325
    assert abs(counts["tuning"] - 3_000) < 250
    assert abs(counts["held_out"] - 3_000) < 250
    assert split_by_key(subjects.reverse(), KEY)["split"].reverse().equals(split)
    assert not split_by_key(subjects, KEY[::-1])["split"].equals(split)


def test_split_by_key_is_used_without_a_split_file(site: Path) -> None:
    """Without metadata/subject_splits.parquet the keyed hash decides."""
    (site / "metadata/subject_splits.parquet").unlink()
    subjects = labels_table()["subject_id"]
    wanted = split_by_key(subjects, KEY).filter(pl.col("split") == "train")["subject_id"]
    records = read(site, "died", SCHEMA, "train", split_key=KEY, **HOW)
    assert records.patient_id.tolist() == wanted.to_list()


@pytest.mark.parametrize("key", [b"", b"short", bytes(65)])
def test_key_of_wrong_length_is_refused(key: bytes) -> None:
    """A guessable key, or one that blake2b cannot take, is refused without being shown."""
    with pytest.raises(ConfigurationError, match=f"{len(key)} bytes, expected 16 to 64"):
        split_by_key(pl.Series([1]), key)


@pytest.mark.parametrize("task", ["../died", "a/b", "", ".hidden", "died\n"])
def test_task_cannot_leave_the_folder(site: Path, task: str) -> None:
    """The task's name comes from the study, so it may only name a file in labels/."""
    with pytest.raises(ConfigurationError, match="plain name"):
        read(site, task, SCHEMA, "train", **HOW)


def test_unknown_split_is_refused(site: Path) -> None:
    """A split that MEDS does not know is a fault of the caller, named with the three that exist."""
    with pytest.raises(ConfigurationError, match="train, tuning, held_out"):
        read(site, "died", SCHEMA, "test", **HOW)


def rewrite(name: str, change: Callable[[pl.DataFrame], pl.DataFrame]) -> Callable[[Path], None]:
    """A fault: one file of the directory replaced by a changed table."""

    def apply(site: Path) -> None:
        change(pl.read_parquet(site / name)).write_parquet(site / name)

    return apply


def overwrite(name: str) -> Callable[[Path], None]:
    """A fault: one file of the directory is no parquet."""

    def apply(site: Path) -> None:
        (site / name).write_text("subject_id,time\n")

    return apply


def truncate(site: Path) -> None:
    """A fault: the pages of a shard are damaged, its footer is not."""
    path = site / "data/0.parquet"
    content = bytearray(path.read_bytes())
    content[4:120] = bytes(116)
    path.write_bytes(content)


def empty_data(site: Path) -> None:
    """A fault: no shard at all."""
    for path in (site / "data").rglob("*.parquet"):
        path.unlink()


FIRST, DIED, SPLIT_FILE = "data/0.parquet", "labels/died.parquet", "metadata/subject_splits.parquet"
NAN, ZONED = pl.lit(float("nan"), pl.Float32), pl.lit(datetime(2000, 1, 1, tzinfo=UTC))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (empty_data, ["data", "no *.parquet file"]),
        (overwrite(FIRST), [FIRST, "cannot be read as parquet"]),
        (overwrite(DIED), [DIED, "cannot be read as parquet"]),
        (overwrite(SPLIT_FILE), [SPLIT_FILE, "cannot be read as parquet"]),
        (truncate, [FIRST, "cannot be read as parquet"]),
        (lambda site: (site / DIED).unlink(), [DIED, "tasks found: none"]),
        (lambda site: (site / SPLIT_FILE).unlink(), [SPLIT_FILE, "split key"]),
        (rewrite(FIRST, lambda t: t.drop("subject_id")), [FIRST, "`subject_id` is missing"]),
        (rewrite(FIRST, lambda t: t.with_columns(time=ZONED)), [FIRST, "time zone UTC"]),
        (rewrite(FIRST, lambda t: t.with_columns(numeric_value=NAN)), [FIRST, "`numeric_value`", "12 of 12"]),
        (rewrite(DIED, lambda t: pl.concat([t, t.head(3)])), [DIED, "3 of 11 rows repeat"]),
        (rewrite(DIED, lambda t: t.with_columns(pl.col("subject_id") + 1)), [SPLIT_FILE, "1 of 8 labelled"]),
        (rewrite(FIRST, lambda t: t.clear()), [DIED, "without any event"]),
        (
            rewrite(DIED, lambda t: t.with_columns(prediction_time=hours(-1))),
            [DIED, "`prediction_time`", "8 of 8 label rows"],
        ),
        (rewrite(SPLIT_FILE, lambda t: t.drop("split")), [SPLIT_FILE, "`split` is missing"]),
        (rewrite(SPLIT_FILE, lambda t: t.cast({"subject_id": pl.Float64})), [SPLIT_FILE, "Float64"]),
        (rewrite(SPLIT_FILE, lambda t: t.with_columns(split=None).cast({"split": pl.String})), ["null in 8 of 8"]),
        (rewrite(SPLIT_FILE, lambda t: t.with_columns(split=pl.lit("Train"))), [SPLIT_FILE, "8 of 8", "rename"]),
        (
            rewrite(SPLIT_FILE, lambda t: pl.concat([t, t.head(4).with_columns(split=pl.lit("tuning"))])),
            [SPLIT_FILE, "3 patients are in more than one split"],
        ),
        (rewrite(SPLIT_FILE, lambda t: t.with_columns(split=pl.lit("train"))), ["0 of 8 patients", "tuning"]),
    ],
)
def test_faulty_directory_is_refused(site: Path, fault: Callable[[Path], None], words: list[str]) -> None:
    """Each fault of a directory is one DataError with file, column, count and remedy, and no patient in it."""
    fault(site)
    with pytest.raises(DataError) as caught:
        read(site, "died", SCHEMA, ("tuning", "held_out") if "0 of 8 patients" in words else SPLITS, **HOW)
    message = str(caught.value)
    for word in [str(site), *words]:
        assert word in message
    assert str(BASE)[:6] not in message
    assert "\n" not in message


def test_reading_writes_nothing(site: Path) -> None:
    """A directory may be read-only: after reading and after a refusal it holds the files it held before."""
    before = {path: path.stat().st_mtime_ns for path in site.rglob("*")}
    read(site, "died", SCHEMA, "train", **HOW)
    with pytest.raises(WardroundError):
        read(site, "absent", SCHEMA, "train", **HOW)
    assert {path: path.stat().st_mtime_ns for path in site.rglob("*")} == before


@pytest.mark.skipif(not PHYSIONET.is_dir(), reason=f"{PHYSIONET} is absent")
def test_real_icu_records_are_read_whole() -> None:
    """The four ICU types of PhysioNet 2012 give one sequence per stay, 22 to 24 steps long on average."""
    schema = load(REPOSITORY / "configs/features/physionet2012.yaml", FeatureSchema)
    sites: dict[str, Sequences] = {
        site: read(PHYSIONET / "meds" / site, "in_hospital_death", schema, SPLITS, max_steps=24, bin_hours=2)
        for site in ("ccu", "csru", "micu", "sicu")
    }
    assert [records.n_patients for records in sites.values()] == [1167, 1656, 2917, 2260]
    for records in sites.values():
        check_trainable(records)
        assert 22 < records.n_steps / records.n_sequences <= 24
        assert np.abs(records.values).max() <= 4
        assert np.isfinite(records.values).all()
        assert np.array_equal(records.statics[:, -4:].sum(axis=1), np.ones(records.n_sequences))


@pytest.mark.skipif(not DIABETES.is_dir(), reason=f"{DIABETES} is absent")
def test_real_stays_are_read_with_several_labels_a_patient() -> None:
    """The four payer groups of Diabetes 130 give one sequence per discharge, each patient's together, and finer
    diagnoses count: all but 2 % of the events, the rarer specialties, are used.
    """
    schema = load(REPOSITORY / "configs/features/diabetes130.yaml", FeatureSchema)
    assert schema.shorten
    patients = sequences = 0
    for site in ("hmo", "medicare", "other_payer", "payer_missing"):
        directory = MedsDirectory(DIABETES / "meds" / site)
        records = directory.read("readmit_30d_each_visit", schema, SPLITS, max_steps=24, bin_hours=None)
        check_trainable(records)
        patients += records.n_patients
        sequences += records.n_sequences
        assert (np.diff(records.patient) >= 0).all()
        assert np.diff(records.start).max() == 24
        coverage = directory.coverage(schema)
        assert coverage.unknown_code < 0.02 * coverage.events
        assert coverage.usable == coverage.known
        assert schema.codes.index("DIAG//250") in records.codes
    assert (patients, sequences) == (69_990, 99_343)
