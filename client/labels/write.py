"""Events of a MEDS directory -> the label files of a task, by a template: each labels/NAME.parquet whole or not at all.

Admissions, discharges and deaths are found by the site's own codes, the code sets of the task by the study's codes, as
which a site's codes count by its code map (`client.mapping`).
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import polars as pl

from client.labels.rules import Labelled, label_rows
from client.labels.stays import Patient
from client.labels.terms import LabelCodes, TaskFile
from client.mapping import CodeMap, renamed
from client.readers.meds import LABELS, MedsDirectory
from common.errors import ConfigurationError, DataError
from common.schema import BOOLEAN_VALUE, CODE, PREDICTION_TIME, SUBJECT_ID, TIME, FeatureSchema

KINDS = ("admission", "discharge", "death")
ALWAYS = datetime.min  # when a code without a time was had: before everything


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


def write_labels(
    directory: MedsDirectory, task: TaskFile, codes: LabelCodes, schema: FeatureSchema, code_map: CodeMap | None = None
) -> list[Written]:
    """Make the label files of `task`. Everybody gets labels; who opted out is left out whenever a study reads.

    Args:
        directory: the records, with the site's own codes.
        task: the consortium's half.
        codes: the site's half.
        schema: of the study, by which the events are checked.
        code_map: by which the site's codes count as those of the task's code sets.

    Raises:
        ConfigurationError: a label file exists.
        DataError: events that cannot be used, or no label at all.
    """
    files = {directory.root / LABELS / f"{name}.parquet": among for name, among in task.files().items()}
    for path in files:
        for there in (path, path.with_suffix("")):
            if os.path.lexists(there):
                raise ConfigurationError(f"{there}: exists and is not overwritten; move it away first")
    directory.coverage(schema)  # refuses ids, codes and times that cannot be used
    events = directory.events(schema)
    frames = {}
    for path, among in files.items():
        left_out: Counter[str] = Counter()
        rows = [
            (subject, row)
            for subject, patient in _patients(events, codes, among, code_map or CodeMap(version=1), left_out)
            for row in label_rows(patient, task.label, codes.observed_until, left_out)
        ]
        if not rows:
            why = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "no admission was found"
            raise DataError(f"{path}: no label; {why}; compare `label_codes` of the site file with the records' codes")
        frames[path] = (_frame(rows), left_out)
    return [_written(path, frame, left_out) for path, (frame, left_out) in frames.items()]


def _written(path: Path, frame: pl.DataFrame, left_out: Counter[str]) -> Written:
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


def _patients(
    events: pl.LazyFrame, codes: LabelCodes, among: tuple[str, ...], code_map: CodeMap, left_out: Counter[str]
) -> list[tuple[int, Patient]]:
    """Everybody with an admission, by id; `among` is the code set that is asked about."""
    kinds = [_any_of(pl.col(CODE), getattr(codes, kind)) for kind in KINDS]
    asked = _any_of(renamed(pl.col(CODE), code_map.of_labels), among)
    found = (
        events.filter(pl.any_horizontal(*kinds, asked))
        .select(SUBJECT_ID, TIME, *[kind.alias(name) for kind, name in zip(kinds, KINDS, strict=True)], asked=asked)
        .collect()
    )
    if found.select(pl.sum_horizontal(*[pl.col(name).cast(pl.Int8) for name in KINDS]) > 1).to_series().any():
        raise ConfigurationError("label_codes: a code is in two of admission, discharge and death; keep it in one")
    untimed = int(found.select(pl.col(TIME).is_null() & pl.any_horizontal(*KINDS)).to_series().sum())
    if untimed:
        left_out["events without a time"] += untimed
    timed = pl.col(TIME).is_not_null()
    times = (
        found.sort(TIME, nulls_last=False)
        .group_by(SUBJECT_ID, maintain_order=True)
        .agg(
            *[pl.col(TIME).filter(pl.col(name) & timed).alias(name) for name in KINDS],
            pl.col(TIME).fill_null(ALWAYS).filter("asked").alias("asked"),
        )
        .sort(SUBJECT_ID)
    )
    return [
        (subject, Patient(_list(admissions), _list(discharges), _list(deaths), _list(seen)))
        for subject, admissions, discharges, deaths, seen in times.iter_rows()
        if admissions
    ]


def _any_of(code: pl.Expr, codes: tuple[str, ...]) -> pl.Expr:
    plain = [one for one in codes if not one.endswith("*")]
    beginnings = [code.str.starts_with(one[:-1]) for one in codes if one.endswith("*")]
    return pl.any_horizontal(code.is_in(pl.Series(plain, dtype=pl.String).implode()), *beginnings)


def _list(times: list[datetime] | None) -> list[datetime]:
    return times or []
