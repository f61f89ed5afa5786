"""Virtual hospitals as MEDS 0.4 folders, with the best possible AUROC known.

    OUT/north/data/0.parquet                    what happened: subject_id, time, code, numeric_value
    OUT/north/labels/diagnosis.parquet          what to predict, at the time of the last visit
    OUT/north/metadata/{dataset.json, codes.parquet, subject_splits.parquet}
    OUT/north/truth.parquet                     P(label = 1 | record); no reader of features opens it

How records and labels come about stands in `mechanism.py`, which hospitals there are in `recipe.py`.

Decisions a reader would question:

- Patients come in blocks of BLOCK; block b of a split has the stream Philox(seed, site) jumped 2 b + split
  times (2**128 draws each). Memory stays bounded, a larger cohort begins with the smaller one, and neither
  another site nor the number of held-out patients changes a patient. Identifiers are as stable.
- Files are written through pyarrow, not polars: `meds.DataSchema.validate` refuses polars' large strings, and
  a virtual hospital should be as valid as a real one. `dataset.json` has no `created_at`, so that equal
  arguments give equal bytes.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa  # type: ignore[import-untyped]  # ships no types
import pyarrow.parquet as pq  # type: ignore[import-untyped]  # ships no types
from meds.schema import (
    code_metadata_filepath,
    data_subdirectory,
    dataset_metadata_filepath,
    held_out_split,
    subject_splits_filepath,
    train_split,
)

from common.errors import ConfigurationError, DataError
from common.metrics import auroc
from simulations import mechanism
from simulations.mechanism import CODE_COUNT, CODES_PER_VISIT, DIAGNOSIS, DRUG, VITALS, FloatArray, Records
from simulations.recipe import PRESETS, Preset, SiteRecipe, find_preset

__all__ = [
    "CODES",
    "PRESETS",
    "Preset",
    "SiteRecipe",
    "SiteRecords",
    "best_possible",
    "find_preset",
    "generate_site",
    "read_truth",
    "write_cohort",
]

VERSION = 1  # raised whenever a seed gives other patients than before
BLOCK = 2000
SUBJECTS_PER_SPLIT = 5_000_000
EPOCH = np.datetime64("2000-01-01T00:00", "us")
TASK = "diagnosis"
TRUTH = "truth.parquet"

CODES: tuple[str, ...] = (
    *(f"VITAL//{vital}" for vital in range(VITALS)),
    *(f"CODE//{code}" for code in range(1, CODE_COUNT + 1)),
    "AGE",
    "SEX//F",
)
AGE, FEMALE = len(CODES) - 2, len(CODES) - 1
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
        event_code: [E] int16, index into CODES.
        event_value: [E] float32, NaN where the code carries no number.
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


def generate_site(
    recipe: SiteRecipe,
    seed: int,
    index: int,
    *,
    signal: float = 1.4,
    scale: float = 1.0,
    held_out_ratio: float = 2.0,
) -> SiteRecords:
    """All patients of one site, from (seed, index) alone.

    Args:
        recipe: The hospital.
        seed: Of the cohort, 0 .. 2**63 - 1.
        index: Place of the site in the cohort; with the seed it is the key of the site's random streams.
        signal: Strength of the label mechanism, as in `Preset`.
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
            probability = mechanism.label_probability(records, recipe, signal)
            first_id = (2 * index + split) * SUBJECTS_PER_SPLIT + start + 1
            parts.append(_columns(records, probability, coin < probability, first_id, held_out=split == 1))
    names = [field.name for field in fields(SiteRecords)]
    return SiteRecords(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def best_possible(probability: npt.ArrayLike) -> float:
    """The AUROC that no model can beat on patients with these exact probabilities P(label = 1 | record), [P].

    Analytic: the expected number of (positive, negative) pairs of different patients in the right order, over
    the expected number of such pairs, when patients are ranked by the probability itself. That ranking is
    optimal (Neyman and Pearson 1933). One draw of labels scatters around it.

    Raises:
        DataError: fewer than two patients, or probabilities outside [0, 1] or that make one class certain.
    """
    p = np.asarray(probability, dtype=np.float64)
    if p.size < 2:
        raise DataError("ranking needs at least two patients; raise the scale of the cohort")
    # Every patient is a positive with weight p and a negative with weight 1 - p; the pairs of a patient with
    # itself, which a ranking counts one half each, are taken out again.
    both = auroc(np.repeat([True, False], len(p)), np.concatenate([p, p]), np.concatenate([p, 1 - p]))
    pairs, with_itself = p.sum() * (1 - p).sum(), p @ (1 - p)
    return float((both * pairs - with_itself / 2) / (pairs - with_itself))


def write_cohort(preset: Preset, seed: int, out: Path, *, scale: float = 1.0) -> list[Path]:
    """Write every site of a preset below `out` and return the sites' folders, in the preset's order.

    All or nothing: the cohort is written beside `out` and renamed, so an interrupted run leaves no half
    cohort.

    Raises:
        ConfigurationError: `out` holds something already or cannot be written; seed or scale out of range.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigurationError(f"{out}: exists and is not an empty folder; name another or remove it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        workshop = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise ConfigurationError(f"{out}: cannot be written ({error.strerror}); name another folder") from None
    try:
        cohort = workshop / "cohort"  # mkdtemp's own folder is closed to others, this one is as umask says
        for index, recipe in enumerate(preset.sites):
            site = generate_site(
                recipe, seed, index, signal=preset.signal, scale=scale, held_out_ratio=preset.held_out_ratio
            )
            _write_site(cohort / recipe.name, site, title=f"{preset.name}/{recipe.name}", seed=seed)
        if out.exists():
            out.rmdir()
        cohort.rename(out)
    except OSError as error:
        raise ConfigurationError(f"{out}: cannot be written ({error.strerror}); name another folder") from None
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    return [out / recipe.name for recipe in preset.sites]


def read_truth(site: Path) -> pl.DataFrame:
    """The exact probabilities of a virtual site: subject_id int64, probability float64.

    Raises:
        DataError: the folder has no truth, as no real hospital has.
    """
    path = site / TRUTH
    if not path.is_file():
        raise DataError(f"{path}: no such file; only cohorts made by `wardround simulate` know the truth")
    return pl.read_parquet(path)


def _columns(
    records: Records, probability: FloatArray, label: npt.NDArray[np.bool_], first_id: int, *, held_out: bool
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
    )


def _write_site(folder: Path, site: SiteRecords, *, title: str, seed: int) -> None:
    """One site as a MEDS folder with its truth beside `data/`."""
    events = {
        "subject_id": pa.array(site.event_subject),
        "time": pa.array(site.event_time),
        "code": pa.DictionaryArray.from_arrays(pa.array(site.event_code), pa.array(CODES)).cast(pa.string()),
        "numeric_value": pa.array(site.event_value, mask=np.isnan(site.event_value)),
    }
    labels = {
        "subject_id": pa.array(site.subject_id),
        "prediction_time": pa.array(site.prediction_time),
        "boolean_value": pa.array(site.label),
    }
    splits = {
        "subject_id": pa.array(site.subject_id),
        "split": pa.array(np.where(site.held_out, held_out_split, train_split)),
    }
    codes = {
        "code": pa.array(CODES),
        "description": pa.array([_description(code) for code in CODES]),
        "parent_codes": pa.array([None] * len(CODES), pa.list_(pa.string())),
    }
    truth = {"subject_id": pa.array(site.subject_id), "probability": pa.array(site.probability)}
    for path, table in (
        (f"{data_subdirectory}/0.parquet", events),
        (f"labels/{TASK}.parquet", labels),
        (subject_splits_filepath, splits),
        (code_metadata_filepath, codes),
        (TRUTH, truth),
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(table), folder / path, compression="zstd")
    description = {
        "dataset_name": f"wardround virtual hospital {title}",
        "dataset_version": f"mechanism {VERSION}, seed {seed}",
        "etl_name": "simulations.cohort",
        "etl_version": str(VERSION),
        "meds_version": version("meds"),
    }
    (folder / dataset_metadata_filepath).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _description(code: str) -> str:
    kind, _, number = code.partition("//")
    return DESCRIPTIONS.get(code) or f"made-up {'vital sign' if kind == 'VITAL' else 'code'} {number}"
