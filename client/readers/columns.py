"""Cells -> MEDS types: patient numbers, numbers, codes, times. What cannot be converted is counted, never quoted.

A column is text (from CSV) or typed (from Parquet or a database); both give the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import polars as pl

from client.readers.formats import When
from common.errors import DataError

MICROSECONDS: pl.DataType = pl.Datetime("us")
_UNIT = {"seconds": 1_000_000, "minutes": 60_000_000, "hours": 3_600_000_000, "days": 86_400_000_000}
_FARTHEST = 9_000 * 366 * _UNIT["days"]  # beyond any year that is allowed; keeps the sum from overflowing
_END_OF_DAY = pl.duration(hours=23, minutes=59, seconds=59)
_ZONE = r":\d\d(\.\d+)?\s*(Z|z|[+-]\d\d(:?\d\d)?)$"
_DATE = r"^\d{4}-\d\d-\d\d$"
_CLOCK = re.compile(r"%[-_0^#]*[HIkMSTRrXcsDfl]")  # the letters of a format that tell the time of day


@dataclass
class Columns:
    """How the cells of one extract are read; remembers whether its times carry a zone.

    Attributes:
        timezone: into which zoned times are converted.
        missing: what stands for nothing in numbers, times and ids.
        decimal: the decimal mark of numbers.
    """

    timezone: str | None = None
    missing: tuple[str, ...] = ()
    decimal: str = "."
    _zoned: list[bool] = field(default_factory=list)  # empty until the first time was seen; shared by `with_terms`

    def with_terms(self, missing: tuple[str, ...], decimal: str) -> Columns:
        """The same extract, a file with other marks."""
        return Columns(self.timezone, missing, decimal, self._zoned)

    def ids(self, cells: pl.Series, where: str) -> pl.Series:
        """Patient numbers, Int64. Raises DataError where one is missing or is no whole number of 64 bits."""
        found = self._text(cells) if cells.dtype == pl.String else cells
        if found.dtype != pl.String and not found.dtype.is_integer() and found.dtype != pl.Null:
            raise DataError(f"{where}: is {found.dtype}, expected whole numbers; number the patients")
        _refuse(
            where,
            found.null_count(),
            len(found),
            "has no patient; the patient is the unit of privacy, so rows without one cannot be used; remove them",
        )
        number = found.cast(pl.Int64, strict=False)
        _refuse(
            where,
            number.null_count(),
            len(found),
            "is no whole number of 64 bits; number the patients and keep the table of names at the hospital",
        )
        return number

    def whole(self, cells: pl.Series, where: str) -> pl.Series:
        """Whole numbers, Int64, also written `8507.0`; missing ones are null. Raises DataError for what is none."""
        if cells.dtype == pl.String:
            text = self._text(cells).str.replace(r"\.0*$", "")
            number = text.cast(pl.Int64, strict=False)
            lost = number.null_count() - text.null_count()
        elif not (cells.dtype.is_numeric() or cells.dtype in (pl.Null, pl.Boolean)):
            raise DataError(f"{where}: is {cells.dtype}, expected whole numbers; name another column")
        else:
            found = cells.fill_nan(None) if cells.dtype.is_float() else cells
            number = found.cast(pl.Int64, strict=False)
            lost = int(((number.cast(found.dtype, strict=False) != found) & found.is_not_null()).fill_null(True).sum())
        _refuse(where, lost, len(cells), "is no whole number of 64 bits; correct it")
        return number

    def numbers(self, cells: pl.Series, where: str, *, refuse: bool = True) -> pl.Series:
        """Numbers, Float64; missing ones and NaN are null. Raises DataError for what is none, or infinite.

        With `refuse=False` what is no number is null.
        """
        if cells.dtype == pl.Null:
            return cells.cast(pl.Float64)
        if cells.dtype == pl.String:
            text = self._text(cells)
            plain = text.str.replace(",", ".", literal=True) if self.decimal == "," else text
            if self.decimal == ",":
                plain = plain.set(text.str.contains(".", literal=True), None)  # 1.234,5 and 1.234: nobody knows
            number = plain.cast(pl.Float64, strict=False)
            if refuse:
                _refuse(
                    where,
                    number.null_count() - text.null_count(),
                    len(text),
                    "is no number; set `decimal` or `missing`, or keep it as text with `not_numbers: text`",
                )
        elif cells.dtype.is_numeric() or cells.dtype == pl.Boolean:
            number = cells.cast(pl.Float64)
        else:
            raise DataError(f"{where}: is {cells.dtype}, expected numbers; name another column")
        number = number.fill_nan(None)
        infinite = number.cast(pl.Float32).is_infinite()
        _refuse(where, int(infinite.sum()), len(number), "is infinite or beyond float32; correct it")
        return number

    def codes(self, cells: pl.Series, where: str) -> pl.Series:
        """Text without blanks at its ends; empty is null."""
        kind = cells.dtype
        texts = (pl.String, pl.Categorical, pl.Enum, pl.Boolean, pl.Null)
        if not (kind.base_type() in texts or kind.is_integer()):
            raise DataError(f"{where}: is {kind}, expected text; write text (as numbers, 1.0 and 1 would be two codes)")
        text = cells.cast(pl.String).str.strip_chars()
        return text.set(text == "", None)

    def times(self, block: pl.DataFrame, when: When, where: str) -> pl.Series:
        """Local times, Datetime us; missing ones are null. See `When` and the decisions in formats.py.

        Raises:
            DataError: what is no time, a zone without `timezone`, or zones in some times and not in others.
        """
        if when.unit is not None:
            return self._counted(block, when, where)
        cells = block[when.column]
        at = f"{where}, column `{when.column}`"
        if cells.dtype == pl.Null:
            return cells.cast(MICROSECONDS)
        if cells.dtype == pl.Date:
            return _end_of_day(cells.cast(MICROSECONDS))
        if isinstance(cells.dtype, pl.Datetime):
            stamped = cells.cast(pl.Datetime("us", cells.dtype.time_zone))
            local = self._local(stamped, at) if cells.dtype.time_zone else self._as_written(stamped, at)
        elif cells.dtype == pl.String:
            text = self._text(cells)
            local = self._iso(text, at) if when.format is None else self._formatted(text, when.format, at)
            _refuse(
                at,
                local.null_count() - text.null_count(),
                len(text),
                "is no time in ISO 8601; set `format`" if when.format is None else "does not fit `format`",
            )
        else:
            raise DataError(f"{at}: is {cells.dtype}, expected times; set `unit` if it counts them")
        return _midnight(local) if when.midnight == "end_of_day" else local

    def _counted(self, block: pl.DataFrame, when: When, where: str) -> pl.Series:
        assert when.unit is not None
        at = f"{where}, column `{when.column}`"
        count = self.numbers(block[when.column], at)
        passed = (count * (when.each * _UNIT[when.unit])).round()
        _refuse(at, int((passed.abs() > _FARTHEST).sum()), len(count), "lies thousands of years off; check `unit`")
        if when.origin_column is None:
            start = pl.Series([when.origin], dtype=MICROSECONDS).new_from_index(0, len(count))
        else:
            start = self.times(block, When(column=when.origin_column), where)
            lost = int((start.is_null() & count.is_not_null()).sum())
            _refuse(f"{where}, column `{when.origin_column}`", lost, len(count), "is missing; it is where time begins")
        return start + passed.cast(pl.Int64).cast(pl.Duration("us"))

    def _iso(self, text: pl.Series, at: str) -> pl.Series:
        """`2024-03-01 08:15[:30[.25]][+01:00]`, `T` instead of the blank, or the date alone."""
        plain = text.str.replace("T", " ", literal=True)
        zoned = plain.str.contains(_ZONE)
        dates = plain.str.contains(_DATE)
        if zoned.any():
            self._notice(True, at)
            stamps = plain.str.replace(r"[Zz]$", "+00:00").str.replace(r"\s+([+-])", "${1}")
            if not (zoned | dates).fill_null(True).all():
                self._notice(False, at)
            moments = stamps.set(~zoned, None).str.to_datetime(
                "%Y-%m-%d %H:%M:%S%.f%#z", strict=False, time_unit="us", time_zone="UTC"
            )
            local = self._local(moments, at)
        else:
            local = plain.str.to_datetime("%Y-%m-%d %H:%M:%S%.f", strict=False, time_unit="us")
            if local.null_count() > plain.null_count():
                without_seconds = plain.str.to_datetime("%Y-%m-%d %H:%M", strict=False, time_unit="us")
                local = local.fill_null(without_seconds)
            if local.null_count() < len(local):
                self._notice(False, at)
        if dates.any():
            days = plain.set(~dates, None).str.to_datetime("%Y-%m-%d", strict=False, time_unit="us")
            local = local.fill_null(_end_of_day(days))
        return local

    def _formatted(self, text: pl.Series, format_: str, at: str) -> pl.Series:
        if "%z" in format_ or "%#z" in format_:
            moments = text.str.to_datetime(format_, strict=False, time_unit="us", time_zone="UTC")
            return self._local(moments, at)
        if _CLOCK.search(format_):
            return self._as_written(text.str.to_datetime(format_, strict=False, time_unit="us"), at)
        return _end_of_day(text.str.to_date(format_, strict=False).cast(MICROSECONDS))

    def _local(self, moments: pl.Series, at: str) -> pl.Series:
        """Zoned times -> the hospital's."""
        if moments.null_count() == len(moments):
            return moments.dt.replace_time_zone(None)
        self._notice(True, at)
        if self.timezone is None:
            raise DataError(f"{at}: times carry a zone; set `timezone` to the hospital's, such as Europe/Berlin")
        return moments.dt.convert_time_zone(self.timezone).dt.replace_time_zone(None)

    def _as_written(self, local: pl.Series, at: str) -> pl.Series:
        if local.null_count() < len(local):
            self._notice(False, at)
        return local

    def _notice(self, zoned: bool, at: str) -> None:
        """Remember that a time with, or without, a zone was seen. Dates alone are neither."""
        if zoned not in self._zoned:
            self._zoned.append(zoned)
        if len(self._zoned) == 2:
            raise DataError(
                f"{at}: some times of this extract carry a zone and others do not; write all of them with a zone, or "
                "all in the hospital's local time"
            )

    def _text(self, cells: pl.Series) -> pl.Series:
        """Without blanks at the ends; what counts as missing is null."""
        text = cells.str.strip_chars()
        return text.set(text.is_in(["", *self.missing]), None)


def _end_of_day(midnights: pl.Series) -> pl.Series:
    return midnights.to_frame("t").select(pl.col("t") + _END_OF_DAY)["t"]


def _midnight(local: pl.Series) -> pl.Series:
    """Exact midnights count as their day's end."""
    time = pl.col("t")
    at_midnight = time == time.dt.truncate("1d")
    return local.to_frame("t").select(pl.when(at_midnight).then(time + _END_OF_DAY).otherwise(time))["t"]


def _refuse(where: str, count: int, of: int, what: str) -> None:
    if count:
        raise DataError(f"{where}: in {count} of {of} rows looked at, a cell {what}")
