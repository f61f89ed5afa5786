"""Wide tables, one row per patient and time -> MEDS events: every filled cell of a named column is one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import polars as pl

from client.readers.columns import MICROSECONDS, Columns
from client.readers.formats import WideTables
from client.readers.reader import EVENTS, TEXT_VALUE
from client.readers.tables import found, rows
from common.errors import DataError
from common.schema import CODE, NUMERIC_VALUE, SUBJECT_ID, TIME


class WideTablesReader:
    """See `formats.WideTables`."""

    def __init__(self, terms: WideTables, base: Path) -> None:
        self.left_out: Counter[str] = Counter()
        self._terms = terms
        self._columns = Columns(terms.timezone, terms.missing, terms.decimal)
        self._paths = found(terms, base)

    def events(self) -> Iterator[pl.DataFrame]:
        """See `Reader.events`."""
        terms, when = self._terms, self._terms.time
        named = (*terms.values, *terms.codes, *terms.statics, *terms.static_codes)
        used = [c for c in (terms.patient, when.column, when.origin_column, *named) if c is not None]
        for path in self._paths:
            for block in rows(path, used, terms):
                patients = self._columns.ids(block[terms.patient], f"{path}, column `{terms.patient}`")
                times = self._columns.times(block, when, str(path))
                lost = times.null_count()
                if lost:
                    raise DataError(
                        f"{path}, column `{when.column}`: is missing in {lost} of {len(block)} rows looked at; "
                        "correct or remove them"
                    )
                numbers = numbers_of(block, patients, times, terms.values, self._columns, str(path))
                codes = self._codes(block, patients, times, terms.codes, str(path))
                facts = numbers_of(block, patients, None, terms.statics, self._columns, str(path))
                coded_facts = self._codes(block, patients, None, terms.static_codes, str(path))
                yield pl.concat(
                    [facts.unique(maintain_order=True), coded_facts.unique(maintain_order=True), numbers, codes]
                )

    def labels(self) -> Iterator[tuple[str, pl.DataFrame]]:
        """None of its own."""
        return iter(())

    def _codes(
        self, block: pl.DataFrame, patients: pl.Series, times: pl.Series | None, prefixes: dict[str, str], source: str
    ) -> pl.DataFrame:
        """One event for each filled cell of the columns in `prefixes`: the prefix and the cell."""
        parts = [EVENTS.to_frame()]
        for column, prefix in prefixes.items():
            cells = self._columns.codes(block[column], f"{source}, column `{column}`")
            filled = cells.is_not_null() & ~cells.is_in(self._terms.missing).fill_null(False)
            codes = cells.to_frame(CODE).select((pl.lit(prefix) + pl.col(CODE)).alias(CODE))[CODE]
            parts.append(_cells(patients, times, codes, None, filled))
        return pl.concat(parts)


def numbers_of(
    block: pl.DataFrame,
    patients: pl.Series,
    times: pl.Series | None,
    codes: dict[str, str],
    columns: Columns,
    source: str,
) -> pl.DataFrame:
    """One event for each number in the columns of `codes` (column -> code), column after column.

    Args:
        block: the cells.
        patients: [n] of its rows.
        times: [n] of its rows; None for facts.
        codes: which columns are read, and as what.
        columns: how cells are read.
        source: what to call the block in an error.

    Returns:
        A frame of schema EVENTS.
    """
    parts = [EVENTS.to_frame()]
    for column, code in codes.items():
        number = columns.numbers(block[column], f"{source}, column `{column}`")
        every = pl.Series([code], dtype=pl.String).new_from_index(0, len(block))
        parts.append(_cells(patients, times, every, number, number.is_not_null()))
    return pl.concat(parts)


def _cells(
    patients: pl.Series, times: pl.Series | None, codes: pl.Series, numbers: pl.Series | None, filled: pl.Series
) -> pl.DataFrame:
    """The events of one column, for the rows that are `filled`."""
    frame = pl.DataFrame({SUBJECT_ID: patients, CODE: codes}).with_columns(
        pl.lit(None, MICROSECONDS).alias(TIME) if times is None else times.alias(TIME),
        pl.lit(None, pl.Float64).alias(NUMERIC_VALUE) if numbers is None else numbers.alias(NUMERIC_VALUE),
        pl.lit(None, pl.String).alias(TEXT_VALUE),
    )
    return frame.filter(filled).select(EVENTS.names()).cast(EVENTS)
