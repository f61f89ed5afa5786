"""Patients who opted out: a CSV file with one column, `subject_id`, and a MEDS directory without them.

They are left out where rows are first seen: their events are in no count and no sequence, their label rows in no
split and no cohort size. A label file is checked as a whole first, so a broken row is reported whosever it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import polars as pl

from client.readers.meds import MedsDirectory
from common.errors import DataError
from common.events import Coverage, survey
from common.schema import SUBJECT_ID, FeatureSchema

_REMEDY = f"write one column `{SUBJECT_ID}` with one patient id a line"


def read_optouts(path: Path) -> pl.Series:
    """Ids of those who opted out [n], Int64, each once; a header and no line means nobody.

    Raises:
        DataError: no such file, other columns, or a line that is no id. Names line numbers, never an id.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; without it nobody knows who opted out, so nothing is read") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({type(error).__name__}); {_REMEDY}") from None
    if not lines or lines[0].strip().strip('"') != SUBJECT_ID:
        raise DataError(f"{path}: the first line must be `{SUBJECT_ID}`; {_REMEDY}")
    ids: set[int] = set()
    for number, line in enumerate(lines[1:], start=2):
        text = line.strip().strip('"')
        if not text:
            continue
        try:
            subject = int(text)
        except ValueError:
            raise DataError(f"{path}: line {number} is no whole number; {_REMEDY}") from None
        if not -(2**63) <= subject < 2**63:
            raise DataError(f"{path}: line {number} does not fit into 64 bits; {_REMEDY}")
        ids.add(subject)
    return pl.Series(SUBJECT_ID, sorted(ids), dtype=pl.Int64)


class WithoutOptouts(MedsDirectory):
    """A MEDS directory as if the patients of `excluded` had never been in it."""

    def __init__(self, root: Path, excluded: pl.Series, counts_as: Mapping[str, str] | None = None) -> None:
        super().__init__(root, counts_as)
        self._stays = ~pl.col(SUBJECT_ID).is_in(excluded.implode()).fill_null(False)  # a missing id is refused later

    def events(self, schema: FeatureSchema) -> pl.LazyFrame:
        """See `MedsDirectory.events`."""
        return super().events(schema).filter(self._stays)

    def labels(self, task: str) -> pl.DataFrame:
        """See `MedsDirectory.labels`. Raises DataError if nobody is left."""
        rows = super().labels(task).filter(self._stays)
        if rows.is_empty():
            raise DataError(f"{self.root}: everybody with a label of task {task} opted out; check the file of opt-outs")
        return rows

    def coverage(self, schema: FeatureSchema) -> Coverage:
        """See `MedsDirectory.coverage`."""
        try:
            return survey(self.events(schema), schema, str(self.data))
        except pl.exceptions.PolarsError as error:  # its text may quote the file's content
            raise DataError(
                f"{self.data}: a file cannot be read as parquet ({type(error).__name__}); write it again"
            ) from None
