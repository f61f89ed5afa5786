"""Virtual hospitals as MEDS 0.4 folders, with the best possible AUROC known.

    OUT/north/data/0.parquet                    what happened: subject_id, time, code, numeric_value
    OUT/north/labels/diagnosis.parquet          what to predict, at the time of the last visit: boolean_value
    OUT/north/labels/phenotype_0..9.parquet     ten more, a file each, as MEDS has no column for many: boolean_value
    OUT/north/labels/time_to_readmission.parquet  float_value: days, to readmission (boolean_value true) or censored
    OUT/north/labels/next_visit.parquet         categorical_value: a row per code of the last visit, at the one before
    OUT/north/metadata/{dataset.json, codes.parquet, subject_splits.parquet}
    OUT/north/truth.parquet                     P(label = 1 | record); no reader of features opens it

How records and the diagnosis come about stands in `mechanism.py`, the other labels in `outcomes.py`, which hospitals
there are in `recipe.py`.

Decisions a reader would question:

- Patients come in blocks of BLOCK; block b of a split has the stream Philox(seed, site) jumped 2 b + split
  times (2**128 draws each). Memory stays bounded, a larger cohort begins with the smaller one, and neither
  another site nor the number of held-out patients changes a patient. Identifiers are as stable.
- `dataset.json` has no `created_at`, so that equal arguments give equal bytes.
- A hospital's local codes (`CODE//12.1`) are in its codes.parquet with the common code as parent, as MEDS has it. What
  they are worth to a model is the study's choice: a feature schema without `shorten` ignores them.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa  # type: ignore[import-untyped]  # ships no types
from meds.schema import (
    code_metadata_filepath,
    data_subdirectory,
    dataset_metadata_filepath,
    held_out_split,
    subject_splits_filepath,
    train_split,
)

from client.readers.meds import LABELS
from common.errors import ConfigurationError, DataError
from simulations import mechanism
from simulations.mechanism import (
    CODE_COUNT,
    CODES_PER_VISIT,
    DIAGNOSIS,
    DRUG,
    SHARED_CODES,
    VITALS,
    FloatArray,
    Records,
)
from simulations.meds_folder import TRUTH, new_folder, write_table
from simulations.optimum import best_possible
from simulations.outcomes import PHENOTYPES, Outcomes, draw_outcomes
from simulations.recipe import PRESETS, Preset, SiteRecipe, find_preset

__all__ = [
    "BINARY_TASKS",
    "CODES",
    "LOCAL_CODES",
    "PRESETS",
    "Preset",
    "SiteRecipe",
    "SiteRecords",
    "best_possible",
    "find_preset",
    "generate_site",
    "read_truth",
    "true_tasks",
    "write_cohort",
]

VERSION = 1  # raised whenever a seed gives other patients than before
BLOCK = 2000
SUBJECTS_PER_SPLIT = 5_000_000
EPOCH = np.datetime64("2000-01-01T00:00", "us")
DIAGNOSIS_TASK, READMISSION_TASK, NEXT_VISIT_TASK = "diagnosis", "time_to_readmission", "next_visit"
PHENOTYPE_TASKS = tuple(f"phenotype_{number}" for number in range(len(PHENOTYPES)))
BINARY_TASKS = (DIAGNOSIS_TASK, *PHENOTYPE_TASKS)

CODES: tuple[str, ...] = (
    *(f"VITAL//{vital}" for vital in range(VITALS)),
    *(f"CODE//{code}" for code in range(1, CODE_COUNT + 1)),
    "AGE",
    "SEX//F",
)
AGE, FEMALE = len(CODES) - 2, len(CODES) - 1
LOCAL_CODES = tuple(f"CODE//{code}.1" for code in range(1, SHARED_CODES + 1))
DESCRIPTIONS = {
    f"CODE//{DRUG}": "drug that lowers vital sign 0",
    f"CODE//{DIAGNOSIS}": "diagnosis that the drug is meant for",
    "AGE": "age in years",
    "SEX//F": "female",
}


@dataclass(frozen=True)
class SiteRecords:
    """One site's patients and events, in memory, as columns. Training patients come first.

    Attributes:
        subject_id: [P] int64, ascending.
        held_out: [P] bool.
        prediction_time: [P] datetime64[us], the time of the last visit.
        label: [P] bool.
        probability: [P] float64, exact P(label = 1 | observed record).
        event_subject: [E] int64, contiguous and in the order of `subject_id`.
        event_time: [E] datetime64[us], ascending within a subject; NaT first, for facts without a time.
        event_code: [E] int16, index into CODES + LOCAL_CODES.
        event_value: [E] float32, NaN where the code carries no number.
        phenotype, phenotype_probability: [P, 10], as `label` and `probability`.
        readmission_days: [P] float32, until readmission or the end of follow-up, from the prediction time.
        readmission_seen: [P] bool, whether it is the readmission.
        readmission_rate: [P] float64, exact rate of readmission per day.
    """

    subject_id: npt.NDArray[np.int64]
    held_out: npt.NDArray[np.bool_]
    prediction_time: npt.NDArray[np.datetime64]
    label: npt.NDArray[np.bool_]
    probability: FloatArray
    event_subject: npt.NDArray[np.int64]
    event_time: npt.NDArray[np.datetime64]
    event_code: npt.NDArray[np.int16]
    event_value: npt.NDArray[np.float32]
    phenotype: npt.NDArray[np.bool_]
    phenotype_probability: FloatArray
    readmission_days: npt.NDArray[np.float32]
    readmission_seen: npt.NDArray[np.bool_]
    readmission_rate: FloatArray


def generate_site(
    recipe: SiteRecipe,
    seed: int,
    index: int,
    *,
    signal: float = 1.4,
    order: float = 1.0,
    scale: float = 1.0,
    held_out_ratio: float = 2.0,
) -> SiteRecords:
    """All patients of one site, from (seed, index) alone.

    Args:
        recipe: The hospital.
        seed: Of the cohort, 0 .. 2**63 - 1.
        index: Place of the site in the cohort; with the seed it is the key of the site's random streams.
        signal: Strength of the label mechanism, as in `Preset`.
        order: Strength of its terms of order, as in `Preset`.
        scale: Factor on the number of patients.
        held_out_ratio: Held-out patients per training patient.

    Raises:
        ConfigurationError: a seed, index, scale or ratio out of range.
    """
    if not 0 <= seed < 2**63 or not 0 <= index < 2**31:
        raise ConfigurationError(f"seed={seed}, index={index}: must be at least 0 and below 2**63 and 2**31")
    if not 0 < scale < np.inf or not 0 <= held_out_ratio < np.inf:
        raise ConfigurationError(f"scale={scale} must be above 0 and held_out_ratio={held_out_ratio} 0 or more")
    training = max(1, round(recipe.patients * scale))
    sizes = (training, round(training * held_out_ratio))
    if max(sizes) > SUBJECTS_PER_SPLIT:
        raise ConfigurationError(
            f"{recipe.name}: {max(sizes)} patients in a split, at most {SUBJECTS_PER_SPLIT}; lower the scale"
        )
    parts = []
    for split, size in enumerate(sizes):
        for block, start in enumerate(range(0, size, BLOCK)):
            random = np.random.Generator(np.random.Philox(key=[seed, index]).jumped(2 * block + split))
            records = mechanism.draw_records(recipe, BLOCK, random).first(size - start)
            coin = random.random(BLOCK)[: size - start]
            score = mechanism.score(records, order)
            probability = mechanism.label_probability(score, recipe, signal, order)
            outcomes = draw_outcomes(records, score, BLOCK, random)
            local = _local(records.codes, recipe.local_code_share, random)
            first_id = (2 * index + split) * SUBJECTS_PER_SPLIT + start + 1
            parts.append(_columns(records, local, probability, coin < probability, outcomes, first_id, split == 1))
    names = [field.name for field in fields(SiteRecords)]
    return SiteRecords(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def write_cohort(
    preset: Preset, seed: int, out: Path, *, scale: float = 1.0, sites: Collection[str] | None = None
) -> list[Path]:
    """Write the sites of a preset below `out` and return the sites' folders, in the preset's order.

    All or nothing: the cohort is written beside `out` and renamed, so an interrupted run leaves no half
    cohort.

    Args:
        preset: The hospitals.
        seed: 0 .. 2**63 - 1.
        out: A new folder.
        scale: Factor on the number of patients.
        sites: Names of those to write, None for all; a site's patients do not depend on which others are written.

    Raises:
        ConfigurationError: `out` holds something already or cannot be written; seed or scale out of range; a site that
            the preset does not have.
    """
    chosen = [recipe.name for recipe in preset.sites] if sites is None else list(sites)
    unknown = sorted(set(chosen) - {recipe.name for recipe in preset.sites})
    if unknown or not chosen:
        raise ConfigurationError(
            f"site `{''.join(unknown[:1])}` is not in preset {preset.name}, which has "
            f"{', '.join(recipe.name for recipe in preset.sites)}"
        )
    with new_folder(out) as folder:
        for index, recipe in enumerate(preset.sites):
            if recipe.name in chosen:
                site = generate_site(
                    recipe,
                    seed,
                    index,
                    signal=preset.signal,
                    order=preset.order,
                    scale=scale,
                    held_out_ratio=preset.held_out_ratio,
                )
                _write_site(folder / recipe.name, site, title=f"{preset.name}/{recipe.name}", seed=seed)
    return [out / recipe.name for recipe in preset.sites if recipe.name in chosen]


def read_truth(site: Path, task: str = DIAGNOSIS_TASK) -> pl.DataFrame:
    """The exact probabilities of a virtual site: subject_id int64, probability float64.

    Raises:
        DataError: the folder has no truth, as no real hospital has, or none for this task.
    """
    path = site / TRUTH
    if not path.is_file():
        raise DataError(f"{path}: no such file; only cohorts made by `wardround simulate` know the truth")
    if task not in true_tasks(site):
        raise DataError(f"{path}: no exact probability for task {task}; it has {', '.join(true_tasks(site))}")
    column = "probability" if task == DIAGNOSIS_TASK else task
    return pl.read_parquet(path, columns=["subject_id", column]).rename({column: "probability"})


def true_tasks(site: Path) -> tuple[str, ...]:
    """The tasks whose exact probabilities a folder has; none at a real hospital."""
    path = site / TRUTH
    columns = list(pl.read_parquet_schema(path)) if path.is_file() else []
    known = ("probability", *PHENOTYPE_TASKS)
    return tuple(task for task, column in zip(BINARY_TASKS, known, strict=True) if column in columns)


def _local(codes: npt.NDArray[np.int16], share: float, random: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Which codes [n, T, 4] the hospital writes by its local code; nothing is drawn where it has none."""
    if share == 0:
        return np.zeros(codes.shape, np.bool_)
    n, T, width = codes.shape
    drawn = random.random((BLOCK, T, width))[:n] < share
    return np.asarray(drawn & (codes > 0) & (codes <= SHARED_CODES))


def _columns(
    records: Records,
    local: npt.NDArray[np.bool_],
    probability: FloatArray,
    label: npt.NDArray[np.bool_],
    outcomes: Outcomes,
    first_id: int,
    held_out: bool,
) -> SiteRecords:
    """Padded records and their labels [n] as the columns of a site."""
    n, T = records.visit.shape
    subject = np.arange(first_id, first_id + n, dtype=np.int64)
    # One row of cells for what has no time, then one per visit; a cell is an event or empty (-1).
    code = np.full((n, 1 + T, VITALS + CODES_PER_VISIT), -1, np.int16)
    code[:, 0, 0] = AGE
    code[records.female, 0, 1] = FEMALE
    code[:, 1:, :VITALS] = np.where(np.isnan(records.vitals), -1, np.arange(VITALS))
    code[:, 1:, VITALS:] = np.where(records.codes > 0, VITALS - 1 + records.codes, -1)
    code[:, 1:, VITALS:][local] = len(CODES) - 1 + records.codes[local]
    value = np.full(code.shape, np.nan, np.float32)
    value[:, 0, 0] = records.age
    value[:, 1:, :VITALS] = records.vitals
    time = np.full((n, 1 + T), np.datetime64("NaT", "us"))
    time[:, 1:] = EPOCH + records.minute.astype("timedelta64[m]")
    cell = code >= 0
    return SiteRecords(
        subject_id=subject,
        held_out=np.full(n, held_out),
        prediction_time=EPOCH + records.last_minute.astype("timedelta64[m]"),
        label=label,
        probability=probability,
        event_subject=np.repeat(subject, cell.sum(axis=(1, 2))),
        event_time=np.repeat(time.ravel(), cell.sum(axis=2).ravel()),
        event_code=code[cell],
        event_value=value[cell],
        **vars(outcomes),
    )


def _write_site(folder: Path, site: SiteRecords, *, title: str, seed: int) -> None:
    """One site as a MEDS folder with its truth beside `data/`."""
    every = CODES + LOCAL_CODES
    known = every if (site.event_code >= len(CODES)).any() else CODES
    name = pa.array(every)
    tables = {
        f"{data_subdirectory}/0.parquet": {
            "subject_id": pa.array(site.event_subject),
            "time": pa.array(site.event_time),
            "code": pa.DictionaryArray.from_arrays(pa.array(site.event_code), name).cast(pa.string()),
            "numeric_value": pa.array(site.event_value, mask=np.isnan(site.event_value)),
        },
        subject_splits_filepath: {
            "subject_id": pa.array(site.subject_id),
            "split": pa.array(np.where(site.held_out, held_out_split, train_split)),
        },
        code_metadata_filepath: {
            "code": pa.array(known),
            "description": pa.array([_description(code) for code in known]),
            "parent_codes": pa.array([_parents(code) for code in known], pa.list_(pa.string())),
        },
        TRUTH: {
            "subject_id": pa.array(site.subject_id),
            "probability": pa.array(site.probability),
            **dict(zip(PHENOTYPE_TASKS, map(pa.array, site.phenotype_probability.T), strict=True)),
            "readmission_rate": pa.array(site.readmission_rate),
        },
        **{f"{LABELS}/{task}.parquet": columns for task, columns in _label_tables(site, name).items()},
    }
    for path, table in tables.items():
        write_table(pa.table(table), folder / path)
    description = {
        "dataset_name": f"wardround virtual hospital {title}",
        "dataset_version": f"mechanism {VERSION}, seed {seed}",
        "etl_name": "simulations.cohort",
        "etl_version": str(VERSION),
        "meds_version": version("meds"),
    }
    (folder / dataset_metadata_filepath).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _label_tables(site: SiteRecords, name: pa.Array) -> dict[str, dict[str, pa.Array]]:
    """Columns of each label file."""
    at_last_visit = {"subject_id": pa.array(site.subject_id), "prediction_time": pa.array(site.prediction_time)}
    binary = np.column_stack([site.label, site.phenotype]).T
    # Every visit has a code, so the event before the first one of the last visit is of the visit before.
    patient = np.searchsorted(site.subject_id, site.event_subject)
    last = site.event_time == site.prediction_time[patient]
    before = site.event_time[np.flatnonzero(last & ~np.roll(last, 1)) - 1]
    next_code = np.flatnonzero(last & (site.event_code >= VITALS))
    return {
        **{
            task: {**at_last_visit, "boolean_value": pa.array(label)}
            for task, label in zip(BINARY_TASKS, binary, strict=True)
        },
        READMISSION_TASK: {
            **at_last_visit,
            "boolean_value": pa.array(site.readmission_seen),
            "float_value": pa.array(site.readmission_days),
        },
        NEXT_VISIT_TASK: {
            "subject_id": pa.array(site.event_subject[next_code]),
            "prediction_time": pa.array(before[patient[next_code]]),
            "categorical_value": name.take(pa.array(site.event_code[next_code])),
        },
    }


def _description(code: str) -> str:
    kind, _, number = code.partition("//")
    for parent in _parents(code) or ():
        return f"local code for {parent}"
    return DESCRIPTIONS.get(code) or f"made-up {'vital sign' if kind == 'VITAL' else 'code'} {number}"


def _parents(code: str) -> list[str] | None:
    """The common code that a local one stands for."""
    return [code.rpartition(".")[0]] if code in LOCAL_CODES else None
