"""OMOP CDM 5.3 and 5.4 -> MEDS events.

    person               MEDS_BIRTH; GENDER//, RACE//, ETHNICITY// as facts
    visit_occurrence     VISIT_START// and VISIT_END//, DISCHARGED_TO// at the end
    eight more tables    DOMAINS: a prefix and the concept id, its number and unit
    death                MEDS_DEATH

Field names: OHDSI/CommonDataModel, `OMOP_CDMv5.4_Field_Level.csv` and 5.3. The eras are derived from what is read here,
and are not read again.

Decisions a reader would question:

- **A billing diagnosis counts from the end of its visit**, whatever its stamp: it is coded at discharge, and many
  extracts stamp it with the admission, where it would tell the model the outcome. So every diagnosis with a visit
  waits for that visit's end, except for the types that the site names as charted at their own time; rows of other
  tables wait if their type says billing. Where the visit's end is unknown, they are left out and counted. A row without
  a visit has nothing to wait for and keeps its own time.
- A time of exactly 00:00:00 is a date that was cast, and counts as 23:59:59; also where it was a true midnight, which
  costs a day of one event and gives nothing away.
- Concept 0 means "not mapped": the source value takes its place, as in `DRUG//SOURCE//00002751001`.
- A unit is part of the code (`MEASUREMENT//3004249//8876`): mmol/l and mg/dl under one code would be one number.
- Births keep 00:00 and the first day of what is known: nothing is predicted from the hour of birth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from meds.schema import birth_code, death_code

from client.readers.columns import MICROSECONDS, Columns
from client.readers.formats import Omop, When
from client.readers.omop_source import DatabaseSource, FolderSource, Source
from client.readers.reader import EVENTS, TEXT_VALUE
from common.errors import DataError
from common.schema import CODE, NUMERIC_VALUE, SUBJECT_ID, TIME

PERSON, VISIT, VISIT_ID, PERSON_ID = "person", "visit_occurrence", "visit_occurrence_id", "person_id"
FACTS = {"GENDER": "gender", "RACE": "race", "ETHNICITY": "ethnicity"}


@dataclass(frozen=True)
class Domain:
    """A table whose rows are events.

    Attributes:
        table: its name.
        prefix: of the codes.
        stem: its columns are STEM_concept_id, STEM_source_value, STEM_type_concept_id.
        time: its time is in TIME_datetime, or else TIME_date.
        number: column of the number.
        unit: has a unit, and a concept in place of a number.
        text: column of text.
        waits: rows with a visit count from that visit's end, unless their type is one that was charted.
        unmapped: the source value stands in for a concept 0. Not for visits, whose source value is a visit's number.
    """

    table: str
    prefix: str
    stem: str
    time: str
    number: str | None = None
    unit: bool = False
    text: str | None = None
    waits: bool = False
    unmapped: bool = True


DOMAINS = (
    Domain("condition_occurrence", "CONDITION", "condition", "condition_start", waits=True),
    Domain("procedure_occurrence", "PROCEDURE", "procedure", "procedure"),
    Domain("drug_exposure", "DRUG", "drug", "drug_exposure_start", number="quantity"),
    Domain("device_exposure", "DEVICE", "device", "device_exposure_start"),
    Domain("measurement", "MEASUREMENT", "measurement", "measurement", number="value_as_number", unit=True),
    Domain(
        "observation", "OBSERVATION", "observation", "observation", "value_as_number", unit=True, text="value_as_string"
    ),
    Domain("specimen", "SPECIMEN", "specimen", "specimen"),
    Domain("visit_detail", "VISIT_DETAIL", "visit_detail", "visit_detail_start", unmapped=False),
)


class OmopReader:
    """See `formats.Omop`."""

    def __init__(self, terms: Omop, base: Path) -> None:
        self.left_out: Counter[str] = Counter()
        self._terms = terms
        self._columns = Columns(terms.timezone, terms.missing, terms.decimal)
        self._source: Source = (
            DatabaseSource(terms, base)
            if terms.folder is None
            else FolderSource(base / Path(terms.folder).expanduser(), terms)
        )
        if not self._source.columns(PERSON):
            raise DataError("the CDM has no table person; check format.folder, or format.database_schema")

    def events(self) -> Iterator[pl.DataFrame]:
        """See `Reader.events`."""
        yield from self._persons()
        ends = self._ends()
        yield from self._visits()
        for domain in DOMAINS:
            if self._source.columns(domain.table):
                yield from self._rows(domain, ends)
        yield from self._deaths()

    def labels(self) -> Iterator[tuple[str, pl.DataFrame]]:
        """None of its own."""
        return iter(())

    def _persons(self) -> Iterator[pl.DataFrame]:
        parts = ("year_of_birth", "month_of_birth", "day_of_birth")
        optional = ["birth_datetime", *parts]
        for stem in FACTS.values():
            optional += [f"{stem}_concept_id", f"{stem}_source_value"]
        for rows in self._blocks(PERSON, [PERSON_ID], optional):
            patients = self._patients(rows, PERSON)
            year, month, day = (self._whole(rows, PERSON, part) for part in parts)
            date = pl.DataFrame({"y": year, "m": month.fill_null(1), "d": day.fill_null(1)}).select(
                pl.format("{}-{}-{}", "y", "m", "d")
                .str.to_datetime("%Y-%m-%d", strict=False, time_unit="us")
                .alias(TIME)
            )[TIME]
            born = self._columns.times(rows, When(column="birth_datetime"), PERSON)
            yield self._known(patients, born.fill_null(date), _every(birth_code, len(rows)), "births")
            for prefix, stem in FACTS.items():
                codes = self._codes(rows, PERSON, prefix, f"{stem}_concept_id", f"{stem}_source_value")
                facts = pl.Series([None], dtype=MICROSECONDS).new_from_index(0, len(rows))
                yield _events(patients, facts, codes).filter(pl.col(CODE).is_not_null())

    def _ends(self) -> pl.DataFrame:
        """When each visit ended: columns `visit` and `end`. The one table that is held in memory."""
        parts = [pl.DataFrame(schema={"visit": pl.Int64, "end": MICROSECONDS})]
        optional = ["visit_end_datetime", "visit_end_date"]
        for rows in self._blocks(VISIT, [VISIT_ID], optional):
            visit, end = self._whole(rows, VISIT, VISIT_ID), self._times(rows, VISIT, "visit_end")
            parts.append(pl.DataFrame({"visit": visit, "end": end}))
        ends = pl.concat(parts)
        twice = int(ends["visit"].is_duplicated().sum())
        if twice:
            raise DataError(f"table {VISIT}: {twice} rows share their {VISIT_ID} with another; keep one of each")
        return ends

    def _visits(self) -> Iterator[pl.DataFrame]:
        to = [f"discharge{d}_to_{kind}" for d in ("d", "") for kind in ("concept_id", "source_value")]  # 5.4, 5.3
        times = [f"visit_{side}_{kind}" for side in ("start", "end") for kind in ("datetime", "date")]
        for rows in self._blocks(VISIT, [PERSON_ID, "visit_concept_id"], [*times, *to]):
            patients = self._patients(rows, VISIT)
            start, end = self._times(rows, VISIT, "visit_start"), self._times(rows, VISIT, "visit_end")
            codes = self._codes(rows, VISIT, "", "visit_concept_id", None)
            yield self._known(patients, start, "VISIT_START//" + codes, "visits' starts")
            yield self._known(patients, end, "VISIT_END//" + codes, "visits' ends")
            new, old = (self._codes(rows, VISIT, "DISCHARGED_TO", to[i], to[i + 1]) for i in (0, 2))
            to_codes = new.zip_with(new.is_not_null(), old)
            there = to_codes.is_not_null()
            yield self._known(patients.filter(there), end.filter(there), to_codes.filter(there), "discharges")

    def _rows(self, domain: Domain, ends: pl.DataFrame) -> Iterator[pl.DataFrame]:
        table, concept, source = domain.table, f"{domain.stem}_concept_id", f"{domain.stem}_source_value"
        kind = f"{domain.stem}_type_concept_id"
        optional = [
            f"{domain.time}_datetime",
            f"{domain.time}_date",
            kind,
            VISIT_ID,
            *([source] if domain.unmapped else []),
        ]
        optional += ["unit_concept_id", "unit_source_value", "value_as_concept_id"] if domain.unit else []
        optional += [name for name in (domain.number, domain.text) if name is not None]
        for rows in self._blocks(table, [PERSON_ID, concept], optional):
            codes = self._codes(rows, table, domain.prefix, concept, source if domain.unmapped else None)
            number = (
                None if domain.number is None else self._columns.numbers(rows[domain.number], _at(table, domain.number))
            )
            if domain.unit:
                assert number is not None
                codes = self._with_unit(codes, rows, table, number)
            text = None if domain.text is None else self._columns.codes(rows[domain.text], _at(table, domain.text))
            time, unknown = self._when_known(rows, domain, kind, ends)
            self.left_out[f"rows of {table} that wait for the end of a visit, which is unknown"] += int(unknown.sum())
            kept = ~unknown
            fields = [None if field is None else field.filter(kept) for field in (number, text)]
            yield self._known(
                self._patients(rows, table).filter(kept), time.filter(kept), codes.filter(kept), table, *fields
            )

    def _when_known(
        self, rows: pl.DataFrame, domain: Domain, kind: str, ends: pl.DataFrame
    ) -> tuple[pl.Series, pl.Series]:
        """(when each row was known, which rows wait for an end that is unknown).

        Guarantee: a row that waits is never placed before the end of its visit, nor before its own time.
        """
        own = self._times(rows, domain.table, domain.time)
        visit, type_ = self._whole(rows, domain.table, VISIT_ID), self._whole(rows, domain.table, kind).fill_null(0)
        billed = type_.is_in(self._terms.billing_types)
        waits = (billed | ~type_.is_in(self._terms.charted_types) if domain.waits else billed) & visit.is_not_null()
        end = pl.DataFrame({"visit": visit}).join(ends, on="visit", how="left", maintain_order="left")["end"]
        later = pl.DataFrame({"own": own, "end": end}).select(pl.max_horizontal("own", "end"))["own"]
        return later.zip_with(waits, own), waits & end.is_null()

    def _deaths(self) -> Iterator[pl.DataFrame]:
        for rows in self._blocks("death", [PERSON_ID], ["death_datetime", "death_date"]):
            time = self._times(rows, "death", "death")
            yield self._known(self._patients(rows, "death"), time, _every(death_code, len(rows)), "deaths")

    def _with_unit(self, codes: pl.Series, rows: pl.DataFrame, table: str, number: pl.Series) -> pl.Series:
        """The code with its unit, and with the concept that stands in place of a number."""
        unit, value = self._whole(rows, table, "unit_concept_id"), self._whole(rows, table, "value_as_concept_id")
        name = self._columns.codes(rows["unit_source_value"], _at(table, "unit_source_value"))
        frame = pl.DataFrame({"code": codes, "unit": unit, "name": name, "value": value, "number": number})
        has_unit, has_value = pl.col("unit").fill_null(0) != 0, pl.col("value").fill_null(0) != 0
        modifier = pl.when(has_unit).then(pl.col("unit").cast(pl.String)).otherwise(pl.col("name"))
        answer = pl.when(pl.col("number").is_null() & has_value).then(pl.format("VALUE//{}", "value"))
        joined = pl.concat_str("code", modifier, answer, separator="//", ignore_nulls=True)
        return frame.select(pl.when(pl.col("code").is_not_null()).then(joined).alias("code"))["code"]

    def _codes(self, rows: pl.DataFrame, table: str, prefix: str, concept: str, source: str | None) -> pl.Series:
        """PREFIX//concept, PREFIX//SOURCE//value where the concept is 0, null where there is neither."""
        number = self._whole(rows, table, concept)
        nothing = pl.Series([None], dtype=pl.String).new_from_index(0, len(rows))
        text = nothing if source is None else self._columns.codes(rows[source], _at(table, source))
        frame = pl.DataFrame({"number": number, "text": text})
        mapped = pl.col("number").fill_null(0) != 0
        start = f"{prefix}//" if prefix else ""
        code = (
            pl.when(mapped)
            .then(pl.format(f"{start}{{}}", "number"))
            .when(pl.col("text").is_not_null())
            .then(pl.format(f"{start}SOURCE//{{}}", "text"))
        )
        return frame.select(code.alias(CODE))[CODE]

    def _known(
        self,
        patients: pl.Series,
        times: pl.Series,
        codes: pl.Series,
        what: str,
        numbers: pl.Series | None = None,
        texts: pl.Series | None = None,
    ) -> pl.DataFrame:
        """Events that have a code and a time; others are counted."""
        self.left_out[f"{what} whose concept is 0 and that have no source value"] += codes.null_count()
        self.left_out[f"{what} without a time"] += int((times.is_null() & codes.is_not_null()).sum())
        events = _events(patients, times, codes, numbers, texts)
        return events.filter(pl.col(CODE).is_not_null() & pl.col(TIME).is_not_null())

    def _blocks(self, table: str, needed: list[str], optional: list[str]) -> Iterator[pl.DataFrame]:
        """Blocks of a table; optional columns that it lacks are empty. Nothing if there is no such table."""
        have = self._source.columns(table)
        for column in needed if have else []:
            if column not in have:
                raise DataError(f"table {table}: has no column `{column}`; is it a CDM 5.3 or 5.4?")
        absent = [column for column in optional if column not in have]
        columns = [column for column in (*needed, *optional) if column in have]
        for block in self._source.blocks(table, columns) if have else ():
            yield block.with_columns(pl.lit(None).alias(column) for column in absent)

    def _patients(self, rows: pl.DataFrame, table: str) -> pl.Series:
        return self._columns.ids(rows[PERSON_ID], _at(table, PERSON_ID))

    def _whole(self, rows: pl.DataFrame, table: str, column: str) -> pl.Series:
        """Whole numbers, also where a missing one made them `8507.0`; missing is null."""
        return self._columns.whole(rows[column], _at(table, column))

    def _times(self, rows: pl.DataFrame, table: str, stem: str) -> pl.Series:
        """`STEM_datetime`, or where that is missing the end of `STEM_date`."""
        exact = self._columns.times(rows, When(column=f"{stem}_datetime", midnight="end_of_day"), f"table {table}")
        if not exact.null_count():
            return exact
        return exact.fill_null(
            self._columns.times(rows, When(column=f"{stem}_date", midnight="end_of_day"), f"table {table}")
        )


def _events(
    patients: pl.Series,
    times: pl.Series,
    codes: pl.Series,
    numbers: pl.Series | None = None,
    texts: pl.Series | None = None,
) -> pl.DataFrame:
    return (
        pl.DataFrame({SUBJECT_ID: patients, TIME: times, CODE: codes})
        .select(
            SUBJECT_ID,
            TIME,
            CODE,
            (pl.lit(None, pl.Float32) if numbers is None else numbers).alias(NUMERIC_VALUE),
            (pl.lit(None, pl.String) if texts is None else texts).alias(TEXT_VALUE),
        )
        .cast(EVENTS)
    )


def _every(code: str, rows: int) -> pl.Series:
    return pl.Series([code], dtype=pl.String).new_from_index(0, rows)


def _at(table: str, column: str) -> str:
    return f"table {table}, column `{column}`"
