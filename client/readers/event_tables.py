"""Long tables, one row per event -> MEDS events: columns are named in the YAML, the rest of a table is not read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import polars as pl

from client.readers.columns import MICROSECONDS, Columns
from client.readers.formats import EventTable, EventTables
from client.readers.reader import EVENTS, TEXT_VALUE
from client.readers.tables import found, rows
from common.errors import DataError
from common.schema import CODE, NUMERIC_VALUE, SUBJECT_ID, TIME


class EventTablesReader:
    """See `formats.EventTables`."""

    def __init__(self, terms: EventTables, base: Path) -> None:
        self.left_out: Counter[str] = Counter()
        self._columns = Columns(terms.timezone)
        self._tables = [(table, path) for table in terms.tables for path in found(table, base)]

    def events(self) -> Iterator[pl.DataFrame]:
        """See `Reader.events`."""
        for table, path in self._tables:
            for block in rows(path, _used(table), table):
                yield self._events(block, table, str(path))

    def labels(self) -> Iterator[tuple[str, pl.DataFrame]]:
        """None of its own."""
        return iter(())

    def _events(self, block: pl.DataFrame, table: EventTable, source: str) -> pl.DataFrame:
        columns = self._columns.with_terms(table.missing, table.decimal)
        numbers, texts = self._values(block, table, columns, source)
        if table.time is None:
            times = pl.Series([None], dtype=MICROSECONDS).new_from_index(0, len(block))
        else:
            times = columns.times(block, table.time, source)
            lost = times.null_count()
            if lost:
                raise DataError(
                    f"{source}, column `{table.time.column}`: is missing in {lost} of {len(block)} rows looked at; "
                    "correct or remove them, or read facts without a time as a table without `time`"
                )
        return pl.DataFrame(
            {
                SUBJECT_ID: columns.ids(block[table.patient], f"{source}, column `{table.patient}`"),
                TIME: times,
                CODE: _codes(block, table, columns, source),
                NUMERIC_VALUE: numbers,
                TEXT_VALUE: texts,
            }
        ).cast(EVENTS)

    def _values(
        self, block: pl.DataFrame, table: EventTable, columns: Columns, source: str
    ) -> tuple[pl.Series, pl.Series]:
        """Numbers and texts."""
        nothing = pl.Series([None], dtype=pl.String).new_from_index(0, len(block))
        text = nothing if table.text is None else columns.codes(block[table.text], f"{source}, column `{table.text}`")
        if table.value is None:
            return nothing.cast(pl.Float64), text
        where, keep = f"{source}, column `{table.value}`", table.not_numbers == "text"
        cells = block[table.value]
        number = columns.numbers(cells, where, refuse=not keep)
        if keep and cells.dtype == pl.String:
            given = columns.codes(cells, where)
            text = given.set(number.is_not_null() | given.is_in(table.missing), None)
        return number, text


def _used(table: EventTable) -> list[str]:
    when = () if table.time is None else (table.time.column, table.time.origin_column)
    return [c for c in (table.patient, *when, *table.code, table.value, table.text) if c is not None]


def _codes(block: pl.DataFrame, table: EventTable, columns: Columns, source: str) -> pl.Series:
    parts = [columns.codes(block[name], f"{source}, column `{name}`") for name in table.code]
    lost = parts[0].null_count()
    if lost:
        raise DataError(
            f"{source}, column `{table.code[0]}`: has no code in {lost} of {len(block)} rows looked at; "
            "remove or code them"
        )
    frame = pl.DataFrame({str(i): part for i, part in enumerate(parts)})
    joined = pl.concat_str(*(pl.col(name) for name in frame.columns), separator="//", ignore_nulls=True)
    return frame.select((pl.lit(table.prefix) + joined).alias(CODE))[CODE]
