"""Virtual hospitals on disk: valid MEDS, reproducible, nested, nothing given away, a known optimum."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow.parquet as pq  # type: ignore[import-untyped]  # ships no types
import pytest
from meds.schema import (
    CodeMetadataSchema,
    DataSchema,
    DatasetMetadataSchema,
    LabelSchema,
    SubjectSplitSchema,
)
from sklearn.linear_model import LogisticRegression

from common.errors import ConfigurationError, DataError
from common.metrics import auroc
from simulations.cohort import (
    BINARY_TASKS,
    CODES,
    SiteRecords,
    best_possible,
    generate_site,
    read_truth,
    true_tasks,
    write_cohort,
)
from simulations.recipe import PRESETS, Preset, SiteRecipe

MEDIUM = PRESETS["medium"]
GOLDEN = "d966ca1caccd88ae672bc84019df736652b54cdadd0a3e94da525fd34d05523c"


def _same(one: SiteRecords, other: SiteRecords) -> bool:
    return all(
        np.array_equal(getattr(one, f.name), getattr(other, f.name), equal_nan=f.name in ("event_time", "event_value"))
        for f in fields(SiteRecords)
    )


def _patients(site: SiteRecords, chosen: npt.NDArray[np.bool_]) -> SiteRecords:
    """The columns of some patients."""
    events = np.isin(site.event_subject, site.subject_id[chosen])
    return SiteRecords(
        *(getattr(site, f.name)[events if f.name.startswith("event_") else chosen] for f in fields(SiteRecords))
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A small `medium` on disk: 440 training patients at four sites."""
    return write_cohort(MEDIUM, 5, tmp_path_factory.mktemp("simulated") / "cohort", scale=0.05)


def test_every_table_is_valid_meds(folders: list[Path]) -> None:
    """All tables and the description of each site pass the schemas of the `meds` package."""
    for folder in folders:
        DataSchema.validate(pq.read_table(folder / "data" / "0.parquet"))
        for labels in (folder / "labels").iterdir():
            LabelSchema.validate(pq.read_table(labels))
        SubjectSplitSchema.validate(pq.read_table(folder / "metadata" / "subject_splits.parquet"))
        CodeMetadataSchema.validate(pq.read_table(folder / "metadata" / "codes.parquet"))
        DatasetMetadataSchema.validate(json.loads((folder / "metadata" / "dataset.json").read_text()))


def test_rows_are_grouped_by_subject_and_sorted_by_time(folders: list[Path]) -> None:
    """Subjects are contiguous, facts without a time come first, then events in order of time."""
    for folder in folders:
        data = pl.read_parquet(folder / "data" / "0.parquet")
        assert data.equals(data.sort("subject_id", "time", nulls_last=False, maintain_order=True))
        assert data.filter(pl.col("time").is_null())["code"].unique().sort().to_list() == ["AGE", "SEX//F"]


def test_codes_are_known_and_carry_numbers_where_they_should(folders: list[Path]) -> None:
    """Every code is in codes.parquet; vitals and age have finite numbers, others none; none repeats."""
    for folder in folders:
        data = pl.read_parquet(folder / "data" / "0.parquet")
        known = pl.read_parquet(folder / "metadata" / "codes.parquet")["code"]
        assert known.to_list() == list(CODES)
        assert set(data["code"]) <= set(known)
        numeric = data["code"].str.starts_with("VITAL//") | (data["code"] == "AGE")
        assert (data["numeric_value"].is_not_null() == numeric).all()
        assert data["numeric_value"].drop_nulls().is_finite().all()
        assert not data.select("subject_id", "time", "code").is_duplicated().any()


def test_each_patient_has_one_label_at_its_last_visit(folders: list[Path]) -> None:
    """Labels, splits, truth and data name the same patients; prediction time is the last event's time."""
    for folder in folders:
        data = pl.read_parquet(folder / "data" / "0.parquet")
        labels = pl.read_parquet(folder / "labels" / "diagnosis.parquet")
        last = data.group_by("subject_id", maintain_order=True).agg(pl.col("time").max())
        assert labels["subject_id"].to_list() == last["subject_id"].to_list()
        assert labels["prediction_time"].to_list() == last["time"].to_list()
        assert read_truth(folder)["subject_id"].equals(labels["subject_id"])
        splits = pl.read_parquet(folder / "metadata" / "subject_splits.parquet")
        assert splits["subject_id"].equals(labels["subject_id"])
        visits = data.drop_nulls("time").group_by("subject_id").agg(pl.col("time").n_unique())["time"]
        assert visits.min() == 3
        half = data.filter(pl.col("code") == "SEX//F").height / labels.height
        assert 0.35 < half < 0.65


def test_sizes_follow_preset_scale_and_ratio(folders: list[Path]) -> None:
    """Each site has scale x patients for training and twice that held out, and no patient is at two sites."""
    seen: set[int] = set()
    for folder, recipe in zip(folders, MEDIUM.sites, strict=True):
        assert folder.name == recipe.name
        splits = pl.read_parquet(folder / "metadata" / "subject_splits.parquet")
        training = round(recipe.patients * 0.05)
        assert dict(splits["split"].value_counts().iter_rows()) == {
            "train": training,
            "held_out": 2 * training,
        }
        assert not seen & set(splits["subject_id"])
        seen |= set(splits["subject_id"])


def test_only_truth_parquet_knows_the_truth(folders: list[Path]) -> None:
    """No other file holds a probability: the data have the four MEDS columns, and no table has a float64."""
    for folder in folders:
        assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
            "data/0.parquet",
            "labels/diagnosis.parquet",
            "labels/next_visit.parquet",
            *(f"labels/phenotype_{number}.parquet" for number in range(10)),
            "labels/time_to_readmission.parquet",
            "metadata/codes.parquet",
            "metadata/dataset.json",
            "metadata/subject_splits.parquet",
            "truth.parquet",
        ]
        assert list(pl.read_parquet_schema(folder / "data" / "0.parquet")) == [
            "subject_id",
            "time",
            "code",
            "numeric_value",
        ]
        for path in folder.glob("*/*.parquet"):
            assert pl.Float64 not in pl.read_parquet_schema(path).values()


def test_equal_arguments_give_equal_bytes(folders: list[Path], tmp_path: Path) -> None:
    """A cohort written again is the same in every byte, one of another seed is not."""
    again = write_cohort(MEDIUM, 5, tmp_path / "again", scale=0.05)
    other = write_cohort(MEDIUM, 6, tmp_path / "other", scale=0.05)
    for first, second, third in zip(folders, again, other, strict=True):
        for path in (path for path in first.rglob("*") if path.is_file()):
            name = path.relative_to(first)
            assert path.read_bytes() == (second / name).read_bytes()
        assert (first / "data/0.parquet").read_bytes() != (third / "data/0.parquet").read_bytes()


def test_adding_a_site_changes_no_other(tmp_path: Path) -> None:
    """The sites of a preset keep every byte when a further site is appended."""
    fifth = SiteRecipe("fifth", 700, 0.3, shift=1.0)
    few = write_cohort(Preset("few", MEDIUM.sites), 2, tmp_path / "few", scale=0.02)
    more = write_cohort(Preset("few", (*MEDIUM.sites, fifth)), 2, tmp_path / "more", scale=0.02)
    assert len(more) == len(few) + 1
    for one, same in zip(few, more[:-1], strict=True):
        for path in (path for path in one.rglob("*") if path.is_file()):
            assert path.read_bytes() == (same / path.relative_to(one)).read_bytes()


def test_a_larger_cohort_begins_with_the_smaller_one() -> None:
    """Scale adds patients and changes none, across blocks, probabilities included, in both splits."""
    recipe = SiteRecipe("north", 1000, 0.2)
    small, large = (generate_site(recipe, 3, 1, scale=scale) for scale in (0.3, 2.5))
    assert len(large.subject_id) == 7500
    assert _same(_patients(large, np.isin(large.subject_id, small.subject_id)), small)


def test_held_out_patients_leave_training_patients_alone() -> None:
    """Another number of held-out patients, none included, gives the same training patients."""
    recipe = SiteRecipe("north", 300, 0.2)
    usual, alone = generate_site(recipe, 3, 1), generate_site(recipe, 3, 1, held_out_ratio=0)
    assert len(alone.subject_id) == 300
    assert _same(_patients(usual, ~usual.held_out), alone)


def test_no_patient_is_drawn_twice() -> None:
    """Blocks, splits, sites and seeds of one recipe have different patients."""
    recipe = SiteRecipe("north", 4500, 0.2)  # three blocks in each split
    draws = [generate_site(recipe, seed, index, held_out_ratio=1) for seed, index in ((3, 1), (3, 2), (4, 1))]
    fingerprint = [np.stack([site.prediction_time.astype(np.float64), site.probability]) for site in draws]
    assert np.unique(np.concatenate(fingerprint, axis=1), axis=1).shape[1] == 27_000


def test_golden_patients() -> None:
    """A seed gives the same patients everywhere and in every release; if not, cohort.VERSION must rise.

    Arrays are hashed before parquet, as integers: times in minutes, values in thousandths, probabilities in
    billionths (their last bits are the platform's exp).
    """
    digest = hashlib.sha256()
    for index, recipe in enumerate(MEDIUM.sites):
        site = generate_site(recipe, 7, index, scale=0.05)
        for column in (
            site.subject_id,
            site.held_out,
            site.prediction_time.astype("datetime64[m]"),
            site.label,
            np.round(site.probability * 1e9),
            site.event_subject,
            site.event_time.astype("datetime64[m]"),
            site.event_code,
            np.round(np.nan_to_num(site.event_value, nan=-999.0).astype(np.float64) * 1e3),
        ):
            digest.update(column.astype("<i8").tobytes())
    assert digest.hexdigest() == GOLDEN


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_best_possible_auroc_of_medium(seed: int) -> None:
    """The pooled optimum of `medium` is .865 +- .003: the ceiling that stands beside every curve."""
    sites = [generate_site(recipe, seed, index) for index, recipe in enumerate(MEDIUM.sites)]
    probability = np.concatenate([site.probability for site in sites])
    assert len(probability) == 26_400
    assert abs(best_possible(probability) - 0.865) < 0.003


@pytest.mark.parametrize(("name", "best"), [("easy", 0.90), ("hard", 0.86)])
def test_best_possible_auroc_of_easy_and_hard(name: str, best: float) -> None:
    """The pooled optimum of `easy` is .90, of `hard` .86."""
    preset = PRESETS[name]
    probability = [
        generate_site(recipe, 0, index, signal=preset.signal, order=preset.order, held_out_ratio=1).probability
        for index, recipe in enumerate(preset.sites)
    ]
    assert abs(best_possible(np.concatenate(probability)) - best) < 0.01


def test_a_model_without_order_leaves_headroom() -> None:
    """Logistic regression on codes, mean vitals and statics learns something, far below the optimum."""
    sites = [generate_site(recipe, 0, index) for index, recipe in enumerate(MEDIUM.sites)]
    inputs = np.concatenate([_bag(site) for site in sites])
    label = np.concatenate([site.label for site in sites])
    held_out = np.concatenate([site.held_out for site in sites])
    model = LogisticRegression(C=0.01, max_iter=300).fit(inputs[~held_out], label[~held_out])
    reached = auroc(label[held_out], model.decision_function(inputs[held_out]))
    best = best_possible(np.concatenate([site.probability for site in sites])[held_out])
    assert 0.65 < reached < best - 0.08


def _bag(site: SiteRecords) -> npt.NDArray[np.float64]:
    """Presence of each code, mean of each number: [P, len(CODES)]."""
    row = np.searchsorted(site.subject_id, site.event_subject)
    cell = row * len(CODES) + site.event_code
    shape = (len(site.subject_id), len(CODES))
    count = np.bincount(cell, minlength=np.prod(shape)).reshape(shape)
    total = np.bincount(cell, np.nan_to_num(site.event_value), np.prod(shape)).reshape(shape)
    bag = np.where(total != 0, total / np.maximum(count, 1), count > 0)
    bag[:, CODES.index("AGE")] = (bag[:, CODES.index("AGE")] - 62) / 14
    return bag


def test_an_existing_folder_is_refused(folders: list[Path], tmp_path: Path) -> None:
    """A folder that holds something and a file in the way are left alone; an empty folder is used."""
    with pytest.raises(ConfigurationError, match="name another or remove it"):
        write_cohort(MEDIUM, 0, folders[0].parent, scale=0.01)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigurationError, match="not an empty folder"):
        write_cohort(MEDIUM, 0, tmp_path / "file", scale=0.01)
    with pytest.raises(ConfigurationError, match="cannot be written"):
        write_cohort(MEDIUM, 0, tmp_path / "file" / "below", scale=0.01)
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert all(folder.is_dir() for folder in write_cohort(MEDIUM, 0, tmp_path / "empty", scale=0.01))


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing(
    failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the disk is full or the person stops it half-way, neither a cohort nor a workshop remains."""
    write, calls = pq.write_table, []

    def fails_at_the_second_site(table: object, path: Path, **options: object) -> None:
        calls.append(path)
        if len(calls) > 20:  # 17 files a site
            raise failure
        write(table, path, **options)

    monkeypatch.setattr(pq, "write_table", fails_at_the_second_site)
    with pytest.raises(ConfigurationError if isinstance(failure, OSError) else KeyboardInterrupt):
        write_cohort(MEDIUM, 0, tmp_path / "cohort", scale=0.01)
    assert len(calls) == 21
    assert list(tmp_path.iterdir()) == []


def test_arguments_out_of_range_are_refused() -> None:
    """Seeds, indices, scales and ratios out of range, and more patients than identifiers, are refused."""
    recipe = SiteRecipe("north", 100, 0.1)
    for seed, index in ((-1, 0), (2**63, 0), (0, -1)):
        with pytest.raises(ConfigurationError, match="seed="):
            generate_site(recipe, seed, index)
    for scale, ratio in ((0.0, 2.0), (float("inf"), 2.0), (1.0, -1.0)):
        with pytest.raises(ConfigurationError, match="scale="):
            generate_site(recipe, 0, 0, scale=scale, held_out_ratio=ratio)
    with pytest.raises(ConfigurationError, match="lower the scale"):
        generate_site(recipe, 0, 0, scale=1e6)


def test_a_real_hospital_has_no_truth(tmp_path: Path) -> None:
    """A folder without truth.parquet is refused with the reason."""
    with pytest.raises(DataError, match="wardround simulate"):
        read_truth(tmp_path)
    assert true_tasks(tmp_path) == ()


def test_each_binary_task_has_its_own_truth(folders: list[Path]) -> None:
    """Truth is read by task; a task without an exact probability is refused with the names of those that have one."""
    table = pl.read_parquet(folders[0] / "truth.parquet")
    assert true_tasks(folders[0]) == BINARY_TASKS
    assert read_truth(folders[0]).equals(table.select("subject_id", "probability"))
    assert read_truth(folders[0], "phenotype_3")["probability"].equals(table["phenotype_3"].rename("probability"))
    with pytest.raises(DataError, match="task next_visit; it has diagnosis, phenotype_0"):
        read_truth(folders[0], "next_visit")


def test_chosen_sites_are_those_of_the_whole_cohort(folders: list[Path], tmp_path: Path) -> None:
    """Writing some of the sites gives the same bytes; a site that the preset lacks is refused."""
    some = write_cohort(MEDIUM, 5, tmp_path / "some", scale=0.05, sites=("west", "east"))
    assert [folder.name for folder in some] == ["east", "west"]
    for folder, whole in zip(some, (folders[1], folders[3]), strict=True):
        for path in (path for path in folder.rglob("*") if path.is_file()):
            assert path.read_bytes() == (whole / path.relative_to(folder)).read_bytes()
    for wrong in (("wset",), ()):
        with pytest.raises(ConfigurationError, match="has north, east, south, west"):
            write_cohort(MEDIUM, 5, tmp_path / "none", scale=0.05, sites=wrong)


def test_generation_imports_no_training_library() -> None:
    """Cohorts are made without torch, opacus and flwr: the command starts fast."""
    code = "import sys, simulations.cohort; print(sorted({'torch', 'opacus', 'flwr'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
