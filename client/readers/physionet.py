"""The open ICU records of the PhysioNet / CinC Challenges 2012 and 2019, in the challenges' own text files.

    2012: `Time,Parameter,Value` lines, one `.txt` per stay   https://physionet.org/content/challenge-2012/1.0.0/
    2019: one line per hour, columns by `|`, one `.psv` per stay   https://physionet.org/content/challenge-2019/1.0.0/

Codes are the challenges' names. A stay is taken as the patient (the sources do not say who comes twice), and begins
at 2000-01-01 00:00, as the files only count from admission.

Decisions a reader would question:

- Files are named after patients, so an error names a file by its position in the folder.
- 2012: -1 for Age, Gender, Height and Weight is the challenge's mark of "missing" and is left out.
- 2019: the line of hour `ICULOS` k is placed at k hours, the end of that hour: what it holds is known then.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import timedelta
from itertools import chain
from pathlib import Path

import polars as pl

from client.readers.columns import MICROSECONDS, Columns
from client.readers.formats import ORIGIN, Files, PhysioNet2012, PhysioNet2019, When
from client.readers.given import answers
from client.readers.reader import EVENTS, LABELS, TEXT_VALUE
from client.readers.tables import blocks, parse
from client.readers.wide_tables import numbers_of
from common.errors import DataError
from common.schema import BOOLEAN_VALUE, CODE, NUMERIC_VALUE, PREDICTION_TIME, SUBJECT_ID, TIME

FACTS_2012 = ("Age", "Gender", "Height", "ICUType")
MISSING_2012 = (*FACTS_2012, "Weight")  # whose -1 means missing
FACTS_2019 = ("Age", "Gender", "Unit1", "Unit2", "HospAdmTime")
HOUR_2019, LABEL_2019 = "ICULOS", "SepsisLabel"
DEATH_TASK, SEPSIS_TASK = "in_hospital_death", "sepsis"
_TOGETHER_BYTES = 1 << 22  # small files are parsed together: one by one takes twenty times as long


class PhysioNet2012Reader:
    """See `formats.PhysioNet2012`."""

    def __init__(self, terms: PhysioNet2012, base: Path) -> None:
        self.left_out: Counter[str] = Counter()
        self._stays = [_Stays(base / Path(name).expanduser(), ".txt") for name in terms.folders]
        self._outcomes = [base / Path(name).expanduser() for name in terms.outcomes]
        self._columns = Columns(missing=("NaN",))

    def events(self) -> Iterator[pl.DataFrame]:
        """See `Reader.events`."""
        for stays in self._stays:
            for lines in stays.lines(["Time", "Parameter", "Value"], ","):
                yield self._events(lines, str(stays.folder))

    def _events(self, lines: pl.DataFrame, source: str) -> pl.DataFrame:
        clock = lines["Time"].str.strip_chars().str.extract_groups(r"^(\d{1,3}):([0-5]\d)$").struct.unnest()
        minutes = clock["1"].cast(pl.Int64) * 60 + clock["2"].cast(pl.Int64)
        _require(minutes.is_not_null(), f"{source}, column `Time`: is not hours:minutes")
        name = self._columns.codes(lines["Parameter"], f"{source}, column `Parameter`")
        value = self._columns.numbers(lines["Value"], f"{source}, column `Value`")
        same = (name != "RecordID") | (value == lines[SUBJECT_ID].cast(pl.Float64))
        _require(same.fill_null(True), f"{source}: RecordID is not the name of the file")
        event = pl.DataFrame(
            {
                SUBJECT_ID: lines[SUBJECT_ID],
                TIME: pl.Series([ORIGIN], dtype=MICROSECONDS).new_from_index(0, len(lines))
                + (minutes * 60_000_000).cast(pl.Duration("us")),
                CODE: name,
                NUMERIC_VALUE: value,
            }
        ).filter(pl.col(CODE).fill_null("") != "RecordID")
        code, number = pl.col(CODE), pl.col(NUMERIC_VALUE)
        reasons = (
            ("lines without a parameter", code.is_null()),
            ("lines without a number", number.is_null()),
            ("numbers that mean missing (-1)", code.is_in(MISSING_2012) & (number == -1)),
        )
        for reason, lost in reasons:
            kept = event.filter(~lost.fill_null(False))
            self.left_out[reason] += len(event) - len(kept)
            event = kept
        return event.select(
            SUBJECT_ID,
            pl.when(code.is_in(FACTS_2012)).then(None).otherwise(pl.col(TIME)).alias(TIME),
            code,
            number,
            pl.lit(None, pl.String).alias(TEXT_VALUE),
        ).cast(EVENTS)

    def labels(self) -> Iterator[tuple[str, pl.DataFrame]]:
        """In-hospital death, predicted 48 hours after admission, of the stays that are there."""
        known = pl.Series([stay for stays in self._stays for stay in stays.ids], dtype=pl.Int64)
        for path in self._outcomes:
            died = "In-hospital_death"
            for block in blocks(path, ["RecordID", died], Files(files=(str(path),))):
                rows = pl.DataFrame(
                    {
                        SUBJECT_ID: self._columns.ids(block["RecordID"], f"{path}, column `RecordID`"),
                        BOOLEAN_VALUE: answers(block[died], f"{path}, column `{died}`"),
                    }
                ).with_columns(pl.lit(ORIGIN + timedelta(hours=48), MICROSECONDS).alias(PREDICTION_TIME))
                yield DEATH_TASK, rows.filter(pl.col(SUBJECT_ID).is_in(known.implode())).select(LABELS.names())


class PhysioNet2019Reader:
    """See `formats.PhysioNet2019`."""

    def __init__(self, terms: PhysioNet2019, base: Path) -> None:
        self.left_out: Counter[str] = Counter()
        self._stays = [_Stays(base / Path(name).expanduser(), ".psv") for name in terms.folders]
        self._carry = terms.carry_label
        self._columns = Columns(missing=("NaN",))

    def events(self) -> Iterator[pl.DataFrame]:
        """See `Reader.events`."""
        for stays in self._stays:
            source = str(stays.folder)
            for lines in stays.lines([HOUR_2019], "|"):
                series = [name for name in lines.columns if name not in (SUBJECT_ID, HOUR_2019, LABEL_2019)]
                facts = {name: name for name in series if name in FACTS_2019}
                values = {name: name for name in series if name not in FACTS_2019}
                stay, time = lines[SUBJECT_ID], self._times(lines, source)
                yield numbers_of(lines, stay, None, facts, self._columns, source).unique(maintain_order=True)
                yield numbers_of(lines, stay, time, values, self._columns, source)

    def labels(self) -> Iterator[tuple[str, pl.DataFrame]]:
        """SepsisLabel of every hour, where it is to be carried over."""
        for stays in self._stays if self._carry else []:
            for lines in stays.lines([HOUR_2019, LABEL_2019], "|"):
                where = f"{stays.folder}, column `{LABEL_2019}`"
                rows = {
                    SUBJECT_ID: lines[SUBJECT_ID],
                    PREDICTION_TIME: self._times(lines, str(stays.folder)),
                    BOOLEAN_VALUE: answers(lines[LABEL_2019], where),
                }
                yield SEPSIS_TASK, pl.DataFrame(rows).cast(LABELS)

    def _times(self, lines: pl.DataFrame, source: str) -> pl.Series:
        times = self._columns.times(lines, When(column=HOUR_2019, unit="hours"), source)
        _require(times.is_not_null(), f"{source}, column `{HOUR_2019}`: is missing")
        return times


class _Stays:
    """A folder with one file per stay, named after it (`132539.txt`, `p000001.psv`)."""

    def __init__(self, folder: Path, suffix: str) -> None:
        self.folder = folder
        self._paths = sorted(path for path in folder.glob(f"*{suffix}") if path.is_file())
        if not self._paths:
            raise DataError(f"{folder}: no *{suffix} file; name the folder that holds one for each stay")
        numbers = [path.stem.removeprefix("p") for path in self._paths]
        odd = sum(not (number.isascii() and number.isdigit() and len(number) < 19) for number in numbers)
        if odd:
            raise DataError(
                f"{folder}: {odd} of {len(numbers)} *{suffix} files are not named by a number; move them away"
            )
        self.ids = [int(number) for number in numbers]
        if len(set(self.ids)) < len(self.ids):
            raise DataError(f"{folder}: several *{suffix} files are named by the same number; keep one of each")

    def lines(self, needed: list[str], separator: str) -> Iterator[pl.DataFrame]:
        """The lines of all files, some files at a time: column subject_id, then those of the header, as text.

        Raises:
            DataError: a file that is not like the first, named by its position.
        """
        terms = Files(files=("*",), separator="|" if separator == "|" else ",")
        header = _first_line(self._read(0), self._place(0))
        names = [name.strip() for name in header.decode("ascii").split(separator)]
        for name in needed:
            if names.count(name) != 1:
                raise DataError(
                    f"{self._place(0)}: its first line must name column `{name}` once; is it another challenge's?"
                )
        for group in self._groups():
            try:
                yield self._parsed(group, header, names, terms)
            except DataError:
                for index in group:  # which one was it?
                    self._parsed([index], header, names, terms)
                raise

    def _groups(self) -> Iterator[Sequence[int]]:
        group: list[int] = []
        size = 0
        for index, path in enumerate(self._paths):
            group.append(index)
            size += path.stat().st_size
            if size > _TOGETHER_BYTES:
                yield group
                group, size = [], 0
        if group:
            yield group

    def _parsed(self, group: Sequence[int], header: bytes, names: list[str], terms: Files) -> pl.DataFrame:
        bodies, counts = [header + b"\n"], []
        for index in group:
            content = self._read(index)
            if _first_line(content, self._place(index)) != header:
                raise DataError(f"{self._place(index)}: its first line is not that of the first file; correct it")
            body = content.partition(b"\n")[2].rstrip(b"\r\n")
            bodies.append(body + b"\n" if body else b"")
            counts.append(body.count(b"\n") + 1 if body else 0)
        source = self._place(group[0]) if len(group) == 1 else str(self.folder)
        parts = list(parse(io.BytesIO(b"".join(bodies)), source, names, names, terms)) if any(counts) else []
        lines = pl.concat([pl.DataFrame(schema=dict.fromkeys(names, pl.String)), *parts])
        if len(lines) != sum(counts):
            raise DataError(f"{source}: has an empty line, or line breaks in a field; correct it")
        owner = chain.from_iterable([self.ids[index]] * count for index, count in zip(group, counts, strict=True))
        return lines.insert_column(0, pl.Series(SUBJECT_ID, list(owner), dtype=pl.Int64))

    def _read(self, index: int) -> bytes:
        try:
            return self._paths[index].read_bytes().removeprefix(b"\xef\xbb\xbf")
        except OSError as error:
            raise DataError(f"{self._place(index)}: cannot be read ({error.strerror}); check its rights") from None

    def _place(self, index: int) -> str:
        """A file, without its name."""
        return f"{self.folder}, file {index + 1} of {len(self._paths)} in the order of their names"


def _first_line(content: bytes, place: str) -> bytes:
    line = content.partition(b"\n")[0].rstrip(b"\r").strip()
    if not line or not line.isascii():
        raise DataError(f"{place}: is empty or no text; it must begin with a line that names the columns")
    return line


def _require(good: pl.Series, what: str) -> None:
    bad = int((~good).sum())
    if bad:
        raise DataError(f"{what} in {bad} of {len(good)} lines looked at; correct them")
