"""One row per patient with a sequence of codes -> MEDS events: code k on day k, as only the order is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import polars as pl

from client.readers.columns import MICROSECONDS, Columns
from client.readers.formats import ORIGIN, CodeSequences
from client.readers.given import answers
from client.readers.reader import LABELS, TEXT_VALUE
from client.readers.tables import found, rows
from common.errors import DataError
from common.schema import BOOLEAN_VALUE, CODE, NUMERIC_VALUE, PREDICTION_TIME, SUBJECT_ID, TIME


class CodeSequencesReader:
    """See `formats.CodeSequences`."""

    def __init__(self, terms: CodeSequences, base: Path) -> None:
        self.left_out: Counter[str] = Counter()
        self._terms = terms
        self._columns = Columns(terms.timezone, terms.missing, terms.decimal)
        self._paths = found(terms, base)

    def events(self) -> Iterator[pl.DataFrame]:
        """See `Reader.events`. Raises DataError for a patient with two rows, as nobody knows which comes first."""
        seen: set[int] = set()
        for patients, visits, _ in self._rows():
            before = len(seen)
            seen.update(patients.to_list())
            twice = len(patients) - (len(seen) - before)
            if twice:
                raise DataError(
                    f"column `{self._terms.patient}`: {twice} rows are of a patient who has one already; a patient's "
                    "codes stand in one row, the oldest first, so put them together"
                )
            yield self._events(patients, visits)

    def labels(self) -> Iterator[tuple[str, pl.DataFrame]]:
        """The given label, with the time of the last code as prediction time, where `label` names a column."""
        for patients, visits, label in self._rows() if self._terms.label is not None else ():
            last = visits.list.len().cast(pl.Int64) - 1
            rows = {SUBJECT_ID: patients, PREDICTION_TIME: _day(last), BOOLEAN_VALUE: label}
            yield self._terms.task, pl.DataFrame(rows).filter(last >= 0).cast(LABELS)

    def _rows(self) -> Iterator[tuple[pl.Series, pl.Series, pl.Series]]:
        """Patients [n], their visits [n] as lists of text, labels [n] (empty without a label column)."""
        terms = self._terms
        used = [name for name in (terms.patient, terms.codes, terms.label) if name is not None]
        for path in self._paths:
            for block in rows(path, used, terms):
                patients = self._columns.ids(block[terms.patient], f"{path}, column `{terms.patient}`")
                text = self._columns.codes(block[terms.codes], f"{path}, column `{terms.codes}`").fill_null("")
                visit = pl.element().str.strip_chars()
                visits = text.str.split(terms.between).list.eval(visit.filter(visit != ""))
                if terms.label is None:
                    yield patients, visits, pl.Series(dtype=pl.Boolean)
                else:
                    yield patients, visits, answers(block[terms.label], f"{path}, column `{terms.label}`")

    def _events(self, patients: pl.Series, visits: pl.Series) -> pl.DataFrame:
        empty = int((visits.list.len() == 0).sum())
        self.left_out["patients without a code"] += empty
        frame = pl.DataFrame({SUBJECT_ID: patients, CODE: visits}).filter(pl.col(CODE).list.len() > 0)
        frame = frame.with_columns(step=pl.int_ranges(pl.col(CODE).list.len())).explode(CODE, "step")
        if self._terms.together is not None:
            frame = frame.with_columns(pl.col(CODE).str.split(self._terms.together)).explode(CODE)
        frame = frame.with_columns(pl.col(CODE).str.strip_chars()).filter(pl.col(CODE) != "")
        return pl.DataFrame(
            {SUBJECT_ID: frame[SUBJECT_ID], TIME: _day(frame["step"]), CODE: self._terms.prefix + frame[CODE]}
        ).select(
            SUBJECT_ID,
            TIME,
            CODE,
            pl.lit(None, pl.Float32).alias(NUMERIC_VALUE),
            pl.lit(None, pl.String).alias(TEXT_VALUE),
        )


def _day(steps: pl.Series) -> pl.Series:
    """Day k after 2000-01-01."""
    start = pl.Series([ORIGIN], dtype=MICROSECONDS).new_from_index(0, len(steps))
    return start + (steps.cast(pl.Int64) * 86_400_000_000).cast(pl.Duration("us"))
