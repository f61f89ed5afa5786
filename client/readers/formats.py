"""What a raw extract looks like: the `format:` of a site file, or a file of its own (`Extract`).

Pure terms: no polars here, so that whoever only opens a site file stays small. client/readers/open.py has the reader
of each kind; docs/readers.md shows one example of each.

Decisions a reader would question:

- Patients are whole numbers of 64 bits, as in MEDS. Names, numbers with letters or hashes are refused instead of being
  numbered here: the list of opt-outs and the labels must use the same numbers, so the hospital must own the table.
- A time that is a date alone counts as the last second of its day, 23:59:59, everywhere: at 00:00 a diagnosis of the
  evening would be known in the morning.
- Times are local. With zones, every time of the extract has one and is converted to `timezone`; a mixture is refused,
  because nobody can say what the others meant. Different offsets are no mixture: each is a moment of its own.
"""

from __future__ import annotations

import re
import zoneinfo
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    field_validator,
    model_validator,
)

from common.terms import Terms

ORIGIN = datetime(2000, 1, 1)
BILLING_TYPES = (32810, 32821)  # OMOP "Claim" and "EHR billing record": written at discharge, whatever their stamp

_YEAR = re.compile(r"%[-_0]?[YyFD]")
_DAY = re.compile(r"%[-_0]?[dejFD]")
Column = Annotated[str, StringConstraints(min_length=1, max_length=256)]
TaskName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=64)]


def _listed(value: Any) -> Any:
    """One name stands for a list of one."""
    return [value] if isinstance(value, str) else value


def _some(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """At least one. Not `min_length`: it would blame the list for the fault of a member."""
    if not values:
        raise ValueError("is empty; list at least one")
    return values


Names = Annotated[tuple[Column, ...], BeforeValidator(_listed), AfterValidator(_some)]


class When(Terms):
    """The column that holds a time, and how to read it. `time: charttime` is short for `time: {column: charttime}`.

    Attributes:
        column: its name.
        format: in the letters of strptime, such as `%d.%m.%Y %H:%M`; left out: ISO 8601.
        unit: the column is a number that counts these since `origin`, or since the moment in `origin_column`.
        each: so many units per step of the number.
        origin: a fixed moment, for data whose own dates are gone.
        origin_column: a column with the moment from which the number counts, such as the admission.
        midnight: `end_of_day` if a time of exactly 00:00:00 means that only the date is known.
    """

    column: Column
    format: Annotated[str, StringConstraints(min_length=2, max_length=64)] | None = None
    unit: Literal["seconds", "minutes", "hours", "days"] | None = None
    each: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    origin: datetime = ORIGIN
    origin_column: Column | None = None
    midnight: Literal["exact", "end_of_day"] = "exact"

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.unit is not None and self.format is not None:
            raise ValueError("unit and format exclude each other: a number is counted, a text is read; remove one")
        if self.format is not None and not (_YEAR.search(self.format) and _DAY.search(self.format)):
            raise ValueError("format names no year or no day, such as %Y and %d: without them the time is too early")
        given = {"each", "origin", "origin_column"} & self.model_fields_set
        if self.unit is None and given:
            raise ValueError(f"{sorted(given)[0]} goes with `unit`; add unit, or remove it")
        if self.origin.tzinfo is not None:
            raise ValueError("origin has a time zone; write local time without one")
        return self


def _when(value: Any) -> Any:
    return {"column": value} if isinstance(value, str) else value


Time = Annotated[When, BeforeValidator(_when)]


class Csv(Terms):
    """How CSV is written; does not matter for Parquet.

    Attributes:
        separator: between two columns.
        quote: `none` if `"` is an ordinary character.
        multiline: a quoted field may hold line breaks. Off by default: a stray `"` would swallow the rows after it.
        encoding: of the text.
        decimal: the decimal mark.
        missing: what stands for a missing number, time or id, besides nothing at all. Never applied to codes: NA is
            also sodium.
    """

    separator: Literal[",", ";", "\t", "|"] = ","
    quote: Literal["double", "none"] = "double"
    multiline: bool = False
    encoding: Literal["utf-8", "latin-1", "cp1252"] = "utf-8"
    decimal: Literal[".", ","] = "."
    missing: tuple[str, ...] = ("NA", "N/A", "NaN", "nan", "NULL", "null", "None")


class Files(Csv):
    """Tables on disk: CSV, CSV.gz or Parquet.

    Attributes:
        files: paths or patterns (`labs/*.csv.gz`); those that are not absolute count from the folder of this YAML.
        only: column -> the value that a row must have to be read, such as one hospital of several.
    """

    files: Names
    only: dict[Column, str] = Field(default_factory=dict)


class LabelFiles(Files):
    """Labels of one task, carried over as they are: a MEDS label file, or any table with these three columns."""

    patient: Column = "subject_id"
    time: Time = When(column="prediction_time")
    label: Column = "boolean_value"


class SplitFiles(Files):
    """The split of each patient: train, tuning or held_out."""

    patient: Column = "subject_id"
    split: Column = "split"


class Extracted(Terms):
    """What every kind of extract has.

    Attributes:
        timezone: the hospital's, such as `Europe/Berlin`; needed only where times carry a zone.
        labels: task -> its label files.
        splits: where patients already have a split.
    """

    timezone: str | None = None
    labels: dict[TaskName, LabelFiles] = Field(default_factory=dict)
    splits: SplitFiles | None = None

    @field_validator("timezone")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None and name not in zoneinfo.available_timezones():
            raise ValueError("is no time zone of the tz database; write one such as Europe/Berlin")
        return name


class EventTable(Files):
    """One row per event.

    Attributes:
        patient: column of the patient's number.
        time: when it was known; left out: facts without a time.
        code: the column of the code, or several that are joined by `//`; those that are empty are left out, but not
            the first.
        prefix: put before every code, such as `LAB//`.
        value: column of the number.
        text: column of free text.
        not_numbers: `text`: what is no number in `value` (such as `<0.1`) is kept as text, for people; a model that
            reads the code's number does not see it.
    """

    patient: Column
    time: Time | None = None
    code: Names
    prefix: str = ""
    value: Column | None = None
    text: Column | None = None
    not_numbers: Literal["refuse", "text"] = "refuse"

    @model_validator(mode="after")
    def _one_text(self) -> Self:
        if self.text is not None and self.not_numbers == "text":
            raise ValueError("text and `not_numbers: text` would both fill the text; remove one")
        return self


class EventTables(Extracted):
    """Any number of long tables, one row per event: what one SELECT per domain of a warehouse gives."""

    kind: Literal["events"]
    tables: Annotated[tuple[EventTable, ...], AfterValidator(_some)]


class WideTables(Extracted, Files):
    """One row per patient and time, such as an hourly grid.

    Attributes:
        patient: column of the patient's number.
        time: of the row.
        values: column -> code of the number in it.
        codes: column -> prefix; the code is the prefix and what stands in the column.
        statics: column -> code of a number that is a fact about the patient, repeated in each row.
        static_codes: column -> prefix, likewise.
    """

    kind: Literal["wide"]
    patient: Column
    time: Time
    values: dict[Column, str] = Field(default_factory=dict)
    codes: dict[Column, str] = Field(default_factory=dict)
    statics: dict[Column, str] = Field(default_factory=dict)
    static_codes: dict[Column, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not (self.values or self.codes):
            raise ValueError("neither values nor codes name a column, so nothing would be read; list at least one")
        return self


class CodeSequences(Extracted, Files):
    """One row per patient with a sequence of codes, such as `I10;E11;N18`, the oldest first.

    Only the order is known, so code k is placed k days after 2000-01-01: gaps carry no information.

    Attributes:
        patient: column of the patient's number.
        codes: column of the sequence.
        between: what stands between two codes.
        together: what stands between codes of one visit, if visits are grouped, as in `I10,E11;N18`.
        prefix: put before every code, such as `DX//`.
        label: column of a given label, carried over with the time of the last code as prediction time.
        task: the name of that label.
    """

    kind: Literal["code_sequences"]
    patient: Column
    codes: Column
    between: Annotated[str, StringConstraints(min_length=1, max_length=8)] = ";"
    together: Annotated[str, StringConstraints(min_length=1, max_length=8)] | None = None
    prefix: str = ""
    label: Column | None = None
    task: TaskName = "diagnosis"


class PhysioNet2012(Extracted):
    """Folders of the PhysioNet / CinC Challenge 2012, one `.txt` per ICU stay with `Time,Parameter,Value`.

    Attributes:
        folders: such as `set-a`.
        outcomes: the challenge's outcome files; carried over as task `in_hospital_death`, predicted after 48 hours.
    """

    kind: Literal["physionet2012"]
    folders: Names
    outcomes: Annotated[tuple[Column, ...], BeforeValidator(_listed)] = ()


class PhysioNet2019(Extracted):
    """Folders of the PhysioNet / CinC Challenge 2019, one `.psv` per ICU stay, one line per hour.

    Attributes:
        folders: such as `training_setA`.
        carry_label: carry the column SepsisLabel over as task `sepsis`, one label an hour.
    """

    kind: Literal["physionet2019"]
    folders: Names
    carry_label: bool = False


class Omop(Extracted, Csv):
    """An OMOP CDM 5.3 or 5.4: a folder with a CSV or Parquet file per table, or a database that DuckDB attaches.

    Attributes:
        folder: with `person.csv`, `visit_occurrence.csv.gz`, `measurement.parquet`, ...
        database: what DuckDB's ATTACH takes, such as a path of a DuckDB file.
        database_type: `postgres` and `sqlite` are extensions of DuckDB, which must be installed beforehand: nothing is
            downloaded here.
        database_schema: where the tables are.
        billing_types: `*_type_concept_id`s of rows that were written at the end of a visit, whatever their stamp.
        charted_types: `condition_type_concept_id`s of diagnoses that were charted at the time of their stamp. All
            other diagnoses with a visit count from that visit's end.
    """

    kind: Literal["omop"]
    multiline: bool = True
    folder: str | None = None
    database: str | None = None
    database_type: Literal["duckdb", "postgres", "sqlite"] = "duckdb"
    database_schema: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=64)] = "main"
    billing_types: tuple[int, ...] = BILLING_TYPES
    charted_types: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.folder is None) == (self.database is None):
            raise ValueError("give one of `folder` and `database`")
        both = sorted(set(self.billing_types) & set(self.charted_types))
        if both:
            raise ValueError(f"type {both[0]} is in both billing_types and charted_types; keep it in one")
        return self


def _kind(value: Any) -> str | None:
    """Which kind of extract a mapping (or terms already built) describes."""
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return kind if isinstance(kind, str) else None


Format = Annotated[
    Annotated[EventTables, Tag("events")]
    | Annotated[WideTables, Tag("wide")]
    | Annotated[CodeSequences, Tag("code_sequences")]
    | Annotated[PhysioNet2012, Tag("physionet2012")]
    | Annotated[PhysioNet2019, Tag("physionet2019")]
    | Annotated[Omop, Tag("omop")],
    Discriminator(
        _kind,
        custom_error_type="unknown_kind",
        custom_error_message=(
            "key `kind` must be one of events, wide, code_sequences, physionet2012, physionet2019, omop"
        ),
    ),
]


class Extract(Terms):
    """A file of its own for `wardround client convert`, where there is no site file (yet)."""

    version: Literal[1]
    format: Format
