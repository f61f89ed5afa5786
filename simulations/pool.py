"""MEDS directories read whole and put together, ready to be dealt out to virtual sites."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from meds.schema import code_metadata_filepath, dataset_metadata_filepath

from client.readers.meds import LABELS, MedsDirectory
from common.errors import ConfigurationError, DataError
from common.schema import BOOLEAN_VALUE, CODE, PREDICTION_TIME, SUBJECT_ID, TIME
from simulations.meds_folder import TRUTH
from simulations.sources import SPLIT_KEY

CLASS = "class"
LABEL_VALUES = (BOOLEAN_VALUE, "integer_value", "float_value", "categorical_value")


@dataclass(frozen=True)
class Pool:
    """The labelled patients of a task, and all that is recorded about them.

    Attributes:
        task: Whose patients these are.
        patients: [P] one row each, by id: subject_id, split, prediction_time (the last), class (of the label, as text:
            a patient is positive if any of its rows is; of a label of several classes the last row; null for numbers).
        events: [E] all columns of the sources; sorted by patient and time, facts without a time first.
        labels: Label file by its name, whatever the task, as it was.
        codes: The code tables, a row per code; None if no source has one.
        truth: Exact probabilities; None unless every source has them.
        site_columns: `site_id_columns` of the sources' dataset.json.
    """

    task: str
    patients: pl.DataFrame
    events: pl.DataFrame
    labels: dict[str, pl.DataFrame]
    codes: pl.DataFrame | None
    truth: pl.DataFrame | None
    site_columns: tuple[str, ...]


@dataclass(frozen=True)
class _Source:
    """One MEDS directory, read."""

    patients: pl.DataFrame
    events: pl.DataFrame
    labels: dict[str, pl.DataFrame]
    codes: pl.DataFrame | None
    truth: pl.DataFrame | None
    site_columns: tuple[str, ...]


def read_pool(sources: Sequence[Path], task: str) -> Pool:
    """Read the sources and put them together.

    Ids stay as they are if no two sources share one; else all patients are numbered anew, source after source.

    Raises:
        ConfigurationError: no source, or a task name that cannot be one.
        DataError: files, columns or splits that cannot be used, or another kind of label at another source.
    """
    if not sources:
        raise ConfigurationError("0 sources to partition; name at least one MEDS directory")
    read = [_read_source(source, task) for source in sources]
    ids = pl.concat([source.patients[SUBJECT_ID] for source in read])
    if ids.n_unique() < len(ids):
        start = 1
        for place, source in enumerate(read):
            read[place] = _renumbered(source, start)
            start += len(source.patients)
    tables = [source.codes for source in read if source.codes is not None]
    truths = [source.truth for source in read if source.truth is not None]
    names = sorted({name for source in read for name in source.labels})
    return Pool(
        task=task,
        patients=_stacked([source.patients for source in read]).sort(SUBJECT_ID),
        events=_stacked([source.events for source in read]).sort(
            SUBJECT_ID, TIME, nulls_last=False, maintain_order=True
        ),
        labels={
            name: _stacked([source.labels[name] for source in read if name in source.labels]).sort(
                SUBJECT_ID, PREDICTION_TIME, maintain_order=True
            )
            for name in names
        },
        codes=_stacked(tables).unique(CODE, keep="first", maintain_order=True) if tables else None,
        truth=_stacked(truths).sort(SUBJECT_ID) if len(truths) == len(read) else None,
        site_columns=tuple(dict.fromkeys(name for source in read for name in source.site_columns)),
    )


def _read_source(root: Path, task: str) -> _Source:
    directory = MedsDirectory(root)
    if task not in directory.tasks:
        raise DataError(
            f"{root / LABELS}: no label file for task {task}; found: {', '.join(directory.tasks) or 'none'}"
        )
    labels = {name: _read(root / LABELS / f"{name}.parquet") for name in directory.tasks}
    for name, rows in labels.items():
        _need(rows, {SUBJECT_ID: pl.Int64, PREDICTION_TIME: pl.Datetime}, root / LABELS / f"{name}.parquet")
    patients = _patients_of(labels[task], root / LABELS / f"{task}.parquet")
    patients = patients.join(directory.splits(patients[SUBJECT_ID], SPLIT_KEY), on=SUBJECT_ID, maintain_order="left")
    shards = []
    for shard in directory.shards:
        events = _read(shard)
        _need(events, {SUBJECT_ID: pl.Int64, TIME: pl.Datetime, CODE: pl.String}, shard)
        shards.append(events.join(patients, on=SUBJECT_ID, how="semi", maintain_order="left"))
    codes, truth = root / code_metadata_filepath, root / TRUTH
    return _Source(
        patients=patients,
        events=_stacked(shards),
        labels={
            name: rows.join(patients, on=SUBJECT_ID, how="semi", maintain_order="left") for name, rows in labels.items()
        },
        codes=_read(codes) if codes.is_file() else None,
        truth=_read(truth).join(patients, on=SUBJECT_ID, how="semi") if truth.is_file() else None,
        site_columns=_site_columns(root / dataset_metadata_filepath),
    )


def _patients_of(rows: pl.DataFrame, path: Path) -> pl.DataFrame:
    """subject_id, prediction_time and class of each labelled patient."""
    found = [name for name in LABEL_VALUES if name in rows.columns]
    if not found:
        raise DataError(f"{path}: none of the columns {', '.join(LABEL_VALUES)}; add the label")
    if rows.is_empty():
        raise DataError(f"{path}: no label rows; write at least one per patient of the study")
    value = pl.col(found[0])
    if found[0] == BOOLEAN_VALUE:
        label = value.any().cast(pl.String)
    elif found[0] == "float_value":
        label = pl.lit(None, pl.String)
    else:
        label = value.last().cast(pl.String)
    return (
        rows.sort(SUBJECT_ID, PREDICTION_TIME)
        .group_by(SUBJECT_ID, maintain_order=True)
        .agg(pl.col(PREDICTION_TIME).last(), label.alias(CLASS))
    )


def _renumbered(source: _Source, start: int) -> _Source:
    """The source with patients start, start + 1, ... in the order of their ids."""
    new = source.patients.select(
        SUBJECT_ID, pl.int_range(start, start + len(source.patients), dtype=pl.Int64).alias("new")
    )

    def rename(frame: pl.DataFrame) -> pl.DataFrame:
        joined = frame.join(new, on=SUBJECT_ID, maintain_order="left")
        return joined.with_columns(pl.col("new").alias(SUBJECT_ID)).drop("new")

    return _Source(
        patients=rename(source.patients),
        events=rename(source.events),
        labels={name: rename(rows) for name, rows in source.labels.items()},
        codes=source.codes,
        truth=None if source.truth is None else rename(source.truth),
        site_columns=source.site_columns,
    )


def _stacked(frames: list[pl.DataFrame]) -> pl.DataFrame:
    """Frames on top of each other; a column that one of them lacks is null there."""
    try:
        return pl.concat(frames, how="diagonal_relaxed")
    except pl.exceptions.PolarsError as error:
        raise DataError(
            f"the sources' tables do not fit together ({type(error).__name__}); give equal columns equal types"
        ) from None


def _site_columns(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        return ()
    try:
        return tuple(json.loads(path.read_text(encoding="utf-8")).get("site_id_columns") or ())
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({type(error).__name__}); write the file again") from None


def _read(path: Path) -> pl.DataFrame:
    try:
        return pl.read_parquet(path, glob=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path}: cannot be read as parquet ({type(error).__name__}); write the file again") from None


def _need(frame: pl.DataFrame, columns: dict[str, type[pl.DataType]], path: Path) -> None:
    for name, kind in columns.items():
        if name not in frame.columns:
            raise DataError(f"{path}: column `{name}` is missing; add it")
        if not isinstance(frame.schema[name], kind):
            raise DataError(f"{path}: column `{name}` is {frame.schema[name]}, expected {kind.__name__}; convert it")
    empty = frame[SUBJECT_ID].null_count()
    if empty:
        raise DataError(f"{path}: column `{SUBJECT_ID}` is null in {empty} of {len(frame)} rows; remove them")
