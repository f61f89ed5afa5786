"""Events of a MEDS directory -> its label file of a task, by a template: labels/TASK.parquet, whole or not at all."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import polars as pl

from client.labels.stays import Labelled, Patient, label_rows
from client.labels.terms import LabelCodes, TaskFile
from client.readers.meds import LABELS, MedsDirectory
from common.errors import ConfigurationError, DataError
from common.schema import BOOLEAN_VALUE, CODE, PREDICTION_TIME, SUBJECT_ID, TIME, FeatureSchema

KINDS = ("admission", "discharge", "death")


@dataclass(frozen=True)
class Written:
    """What was written, for this hospital's eyes.

    Attributes:
        path: the label file.
        rows, patients, positives: counts of it.
        left_out: reason -> number of stays, or of events.
    """

    path: Path
    rows: int
    patients: int
    positives: int
    left_out: Counter[str]


def write_labels(directory: MedsDirectory, task: TaskFile, codes: LabelCodes, schema: FeatureSchema) -> Written:
    """Make the label file of `task`. Everybody gets labels; who opted out is left out whenever a study reads.

    Args:
        directory: the records.
        task: the consortium's half.
        codes: the site's half.
        schema: of the study, by which the events are checked.

    Raises:
        ConfigurationError: the label file exists.
        DataError: events that cannot be used, or no label at all.
    """
    path = directory.root / LABELS / f"{task.name}.parquet"
    if os.path.lexists(path):
        raise ConfigurationError(f"{path}: exists and is not overwritten; move it away first")
    directory.coverage(schema)  # refuses ids, codes and times that cannot be used
    left_out: Counter[str] = Counter()
    rows = [
        (subject, row)
        for subject, patient in _patients(directory.events(schema), codes, left_out)
        for row in label_rows(patient, task.label, codes.observed_until, left_out)
    ]
    if not rows:
        why = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "no admission was found"
        raise DataError(f"{path}: no label; {why}; compare `label_codes` of the site file with the records' codes")
    frame = _frame(rows)
    path.parent.mkdir(exist_ok=True)
    fresh = path.with_name(f".{path.name}.partial")
    frame.write_parquet(fresh)
    fresh.replace(path)
    return Written(path, len(frame), frame[SUBJECT_ID].n_unique(), int(frame[BOOLEAN_VALUE].sum()), left_out)


def _frame(rows: list[tuple[int, Labelled]]) -> pl.DataFrame:
    return pl.DataFrame(
        [(subject, row.at, row.positive) for subject, row in rows],
        schema={SUBJECT_ID: pl.Int64, PREDICTION_TIME: pl.Datetime("us"), BOOLEAN_VALUE: pl.Boolean},
        orient="row",
    ).sort(SUBJECT_ID, PREDICTION_TIME)


def _patients(events: pl.LazyFrame, codes: LabelCodes, left_out: Counter[str]) -> list[tuple[int, Patient]]:
    """Everybody with an admission, by id."""
    kinds = [_any_of(getattr(codes, kind)) for kind in KINDS]
    found = (
        events.filter(pl.any_horizontal(*kinds))
        .select(SUBJECT_ID, TIME, *[kind.alias(name) for kind, name in zip(kinds, KINDS, strict=True)])
        .collect()
    )
    if found.select(pl.sum_horizontal(*[pl.col(name).cast(pl.Int8) for name in KINDS]) > 1).to_series().any():
        raise ConfigurationError("label_codes: a code is in two of admission, discharge and death; keep it in one")
    untimed = found[TIME].null_count()
    if untimed:
        left_out["events without a time"] += untimed
    times = (
        found.drop_nulls(TIME)
        .sort(TIME)
        .group_by(SUBJECT_ID)
        .agg(*[pl.col(TIME).filter(pl.col(name)).alias(name) for name in KINDS])
        .sort(SUBJECT_ID)
    )
    return [
        (subject, Patient(_list(admissions), _list(discharges), _list(deaths)))
        for subject, admissions, discharges, deaths in times.iter_rows()
        if admissions
    ]


def _any_of(codes: tuple[str, ...]) -> pl.Expr:
    plain = [code for code in codes if not code.endswith("*")]
    beginnings = [pl.col(CODE).str.starts_with(code[:-1]) for code in codes if code.endswith("*")]
    return pl.any_horizontal(pl.col(CODE).is_in(pl.Series(plain, dtype=pl.String).implode()), *beginnings)


def _list(times: list[datetime] | None) -> list[datetime]:
    return times or []
