"""Labels and splits that a site already has, in any table: carried over, not computed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import polars as pl

from client.readers.columns import Columns
from client.readers.formats import LabelFiles, SplitFiles
from client.readers.reader import LABELS
from client.readers.tables import found, rows
from common.errors import DataError
from common.schema import BOOLEAN_VALUE, PREDICTION_TIME, SPLIT, SPLITS, SUBJECT_ID

_ANSWERS = {"1": True, "true": True, "yes": True, "1.0": True, "0": False, "false": False, "no": False, "0.0": False}


def given_labels(terms: LabelFiles, base: Path, timezone: str | None) -> Iterator[pl.DataFrame]:
    """Label rows of schema LABELS. Raises DataError for a cell that is no number, time or answer."""
    columns = Columns(timezone, terms.missing, terms.decimal)
    when = (terms.time.column, terms.time.origin_column)
    used = [name for name in (terms.patient, *when, terms.label) if name is not None]
    for path in found(terms, base):
        for block in rows(path, used, terms):
            yield pl.DataFrame(
                {
                    SUBJECT_ID: columns.ids(block[terms.patient], f"{path}, column `{terms.patient}`"),
                    PREDICTION_TIME: columns.times(block, terms.time, str(path)),
                    BOOLEAN_VALUE: answers(block[terms.label], f"{path}, column `{terms.label}`"),
                }
            ).cast(LABELS)


def given_splits(terms: SplitFiles, base: Path) -> pl.DataFrame:
    """Columns subject_id and split, each patient once. Raises DataError for other splits, or two of one patient."""
    columns = Columns(None, terms.missing, terms.decimal)
    parts = [
        pl.DataFrame(
            {
                SUBJECT_ID: columns.ids(block[terms.patient], f"{path}, column `{terms.patient}`"),
                SPLIT: columns.codes(block[terms.split], f"{path}, column `{terms.split}`"),
            }
        )
        for path in found(terms, base)
        for block in rows(path, [terms.patient, terms.split], terms)
    ]
    splits = pl.concat([pl.DataFrame(schema={SUBJECT_ID: pl.Int64, SPLIT: pl.String}), *parts]).unique()
    other = int((~splits[SPLIT].is_in(SPLITS).fill_null(False)).sum())
    if other:
        raise DataError(f"column `{terms.split}`: {other} rows are none of {', '.join(SPLITS)}; rename them")
    twice = int(splits[SUBJECT_ID].is_duplicated().sum())
    if twice:
        raise DataError(f"column `{terms.split}`: {twice} rows give a patient more than one split; keep each in one")
    return splits.sort(SUBJECT_ID)


def answers(cells: pl.Series, where: str) -> pl.Series:
    """Labels: 1, 0, true, false, yes or no. Raises DataError for anything else."""
    if cells.dtype == pl.Boolean:
        return cells
    if not (cells.dtype.is_numeric() or cells.dtype.base_type() in (pl.String, pl.Categorical, pl.Enum, pl.Null)):
        raise DataError(f"{where}: is {cells.dtype}, expected 1, 0, true, false, yes or no; name another column")
    said = cells.cast(pl.String).str.strip_chars().str.to_lowercase()
    found = said.replace_strict(_ANSWERS, default=None, return_dtype=pl.Boolean)
    lost = found.null_count()
    if lost:
        raise DataError(f"{where}: is none of 1, 0, true, false, yes, no in {lost} of {len(cells)} rows; correct them")
    return found
