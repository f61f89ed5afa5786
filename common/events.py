"""Tables of events and labels, checked before anything is computed from them.

Every refusal is one `DataError` that names the source (a file, where there is one), the column, a count and
the remedy. It never carries a patient's id or value, nor a code of the site's own: only codes of the schema.

Decisions a reader would question:

- Numbers that are not finite are refused, although MEDS allows them: the mark of a missing number is null, so
  a NaN is a fault of the extract that somebody should see, not a value to drop in silence.
- Any date-time without a zone is accepted and brought to microseconds. A zone is refused, not converted:
  whether "00:00" was meant in local time decides which events lie before the prediction time.
- Missing `numeric_value` is refused where the schema asks for numbers. MEDS lets a table omit the column, but
  a cohort in which nothing was ever measured trains to the end and predicts nothing.
- Codes are shortened (`FeatureSchema.shorten`) once per distinct code, not once per event. That is one more pass
  over one column, and takes a quarter of the time of string functions on every event.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import polars as pl

from common.errors import DataError
from common.schema import (
    BOOLEAN_VALUE,
    CODE,
    NUMERIC_VALUE,
    PREDICTION_TIME,
    SUBJECT_ID,
    TIME,
    FeatureSchema,
    LevelsFeature,
    NumericFeature,
)

VALUE, LISTED, STATIC = 0, 1, 2  # what a code of the schema is; column `group` of `features`

_MICROSECONDS = pl.Datetime("us")
_YEARS = (
    -62_135_596_800_000_000,
    253_402_300_799_999_999,
)  # 0001-01-01 to 9999-12-31 in us: no overflow below
_NO_ID = "the patient is the unit of privacy, so records without a patient id cannot be used"


@dataclass(frozen=True)
class Coverage:
    """What becomes of a site's events under a schema; each event has exactly one fate.

    For the site's own eyes (`wardround client check`): true counts of its cohort, never sent.
    """

    usable: int
    unknown_code: int
    without_time: int
    without_number: int
    out_of_range: int

    @property
    def events(self) -> int:
        """All events, whatever their fate."""
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def known(self) -> int:
        """Events that carry a code of the schema."""
        return self.events - self.unknown_code

    def __add__(self, other: Coverage) -> Coverage:
        return Coverage(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def features(schema: FeatureSchema) -> pl.DataFrame:
    """The schema as a table to join on `code`: group, column within the group, and [low, high] in float32.

    Bounds are float32 like the numbers they are compared with: as float64, a pH of 7.9 would exceed 7.9.
    """
    rows: list[tuple[str, int, int, float | None, float | None]] = []
    for column, (code, feature) in enumerate(schema.values.items()):
        rows.append((code, VALUE, column, feature.min, feature.max))
    rows += [(code, LISTED, column, None, None) for column, code in enumerate(schema.codes)]
    for column, (code, static) in enumerate(schema.statics.items()):
        if isinstance(static, NumericFeature):
            rows.append((code, STATIC, column, static.min, static.max))
        elif isinstance(static, LevelsFeature):
            rows.append((code, STATIC, column, min(static.levels), max(static.levels)))
        else:
            rows.append((code, STATIC, column, None, None))
    return pl.DataFrame(
        rows,
        schema={CODE: pl.String, "group": pl.Int8, "column": pl.Int32, "low": pl.Float32, "high": pl.Float32},
        orient="row",
    )


def known_codes(events: pl.LazyFrame, schema: FeatureSchema) -> pl.DataFrame:
    """`features`, and a row for each unlisted code of `events` that counts as a listed one (`shorten`)."""
    table = features(schema)
    if not schema.shorten:
        return table
    present = events.select(CODE).unique().drop_nulls().collect(engine="streaming")[CODE]
    counts_as = schema.counts_as(present.to_list())
    finer = pl.DataFrame(list(counts_as.items()), schema={CODE: pl.String, "parent": pl.String}, orient="row")
    return pl.concat([table, finer.join(table.rename({CODE: "parent"}), on="parent").select(table.columns)])


def fate(schema: FeatureSchema) -> pl.Expr:
    """Which field of `Coverage` an event counts in, by name; for events left-joined with `features`."""
    number = pl.col(NUMERIC_VALUE)
    outside = (number < pl.col("low")) | (number > pl.col("high"))
    for code, static in schema.statics.items():
        if isinstance(static, LevelsFeature):
            levels = pl.Series(np.array(static.levels, dtype=np.float32))
            outside |= (pl.col(CODE) == code) & ~number.is_in(levels.implode())
    return (
        pl.when(pl.col("group").is_null())
        .then(pl.lit("unknown_code"))
        .when((pl.col("group") != STATIC) & pl.col(TIME).is_null())
        .then(pl.lit("without_time"))
        .when(pl.col("low").is_not_null() & number.is_null())
        .then(pl.lit("without_number"))
        .when(outside.fill_null(False))
        .then(pl.lit("out_of_range"))
        .otherwise(pl.lit("usable"))
    )


def typed_events(events: pl.LazyFrame, schema: FeatureSchema, source: str) -> pl.LazyFrame:
    """The four columns that are used, in MEDS types (Int64, Datetime us, String, Float32).

    Raises DataError where a column is missing or has another type.
    """
    have = events.collect_schema()
    _need(have, SUBJECT_ID, source, f"{_NO_ID}; name the patient id column `{SUBJECT_ID}`")
    _need(have, TIME, source, f"add it (date-time, null for a fact without a time; columns: {len(have)})")
    _need(have, CODE, source, "add it (text)")
    _check_id(have, source)
    _check_time(have, TIME, source)
    code_type = have[CODE]
    if not (code_type == pl.String or isinstance(code_type, pl.Categorical | pl.Enum)):
        raise DataError(f"{source}: column `{CODE}` is {code_type}, expected text; write the codes as strings")
    if NUMERIC_VALUE in have:
        if not (have[NUMERIC_VALUE].is_numeric() or have[NUMERIC_VALUE] == pl.Null):
            raise DataError(
                f"{source}: column `{NUMERIC_VALUE}` is {have[NUMERIC_VALUE]}, expected float32; "
                "write numbers there and text in `text_value`"
            )
        number = pl.col(NUMERIC_VALUE).cast(pl.Float32)
    elif _reads_numbers(schema):
        _need(
            have,
            NUMERIC_VALUE,
            source,
            f"schema {schema.name} reads numbers from it; add it (float32)",
        )
    else:
        number = pl.lit(None, dtype=pl.Float32).alias(NUMERIC_VALUE)
    return events.select(pl.col(SUBJECT_ID), pl.col(TIME).cast(_MICROSECONDS), pl.col(CODE).cast(pl.String), number)


def survey(events: pl.LazyFrame, schema: FeatureSchema, source: str) -> Coverage:
    """Count the fate of every event in one streaming pass over `typed_events`.

    Raises DataError for null patient ids or codes, numbers that are not finite, times beyond years 1 to 9999.
    """
    number, year = pl.col(NUMERIC_VALUE), pl.col(TIME).to_physical()
    counted = (
        events.join(known_codes(events, schema).lazy(), on=CODE, how="left")
        .group_by(fate(schema).alias("fate"))
        .agg(
            pl.len().alias("events"),
            pl.col(SUBJECT_ID).null_count().alias("no_id"),
            pl.col(CODE).null_count().alias("no_code"),
            (~number.is_finite()).sum().alias("not_finite"),
            (~year.is_between(*_YEARS)).sum().alias("no_year"),
        )
        .collect(engine="streaming")
    )
    total = {name: int(counted[name].sum()) for name in counted.columns[1:]}
    of = f"of {total['events']} events"
    if total["no_id"]:
        raise DataError(f"{source}: column `{SUBJECT_ID}` is null in {total['no_id']} {of}; {_NO_ID}; remove them")
    if total["no_code"]:
        raise DataError(f"{source}: column `{CODE}` is null in {total['no_code']} {of}; remove or code them")
    if total["not_finite"]:
        raise DataError(
            f"{source}: column `{NUMERIC_VALUE}` is NaN, infinite or beyond float32 in {total['not_finite']} "
            f"{of}; write null where there is no number"
        )
    if total["no_year"]:
        raise DataError(
            f"{source}: column `{TIME}` lies outside years 1 to 9999 in {total['no_year']} {of}; "
            "write null for facts without a time, and correct the others"
        )
    fates = dict(counted.select("fate", "events").iter_rows())
    return Coverage(**{field.name: int(fates.get(field.name, 0)) for field in fields(Coverage)})


def require_known(coverage: Coverage, schema: FeatureSchema, source: str) -> None:
    """Raise DataError if no event of the whole data set carries a code of the schema: nothing fits."""
    if coverage.known == 0:
        listed = [*schema.values, *schema.codes, *schema.statics]
        first = ", ".join(f"`{code}`" for code in listed[:5])
        raise DataError(
            f"{source}: 0 of {coverage.events} events carry a code of schema {schema.name}; its first codes "
            f"are {first}; map the site's codes to these, or choose the schema that fits the data"
        )


def checked_labels(labels: pl.DataFrame, source: str) -> pl.DataFrame:
    """Label rows (subject_id Int64, prediction_time Datetime us, boolean_value) sorted by patient and time.

    Raises DataError for missing or wrong-typed columns, nulls, repeated (patient, prediction time), no rows.
    """
    have = labels.schema
    _need(have, SUBJECT_ID, source, f"{_NO_ID}; name the patient id column `{SUBJECT_ID}`")
    _need(have, PREDICTION_TIME, source, "add it (date-time: records up to and including it may be used)")
    _need(have, BOOLEAN_VALUE, source, "add it (true or false); other kinds of label are not supported")
    _check_id(have, source)
    _check_time(have, PREDICTION_TIME, source)
    if have[BOOLEAN_VALUE] != pl.Boolean:
        raise DataError(
            f"{source}: column `{BOOLEAN_VALUE}` is {have[BOOLEAN_VALUE]}, expected boolean; write true or false"
        )
    if labels.is_empty():
        raise DataError(f"{source}: no label rows; write at least one per patient of the study")
    rows = labels.select(SUBJECT_ID, pl.col(PREDICTION_TIME).cast(_MICROSECONDS), BOOLEAN_VALUE)
    for column in rows.columns:
        missing = rows[column].null_count()
        if missing:
            raise DataError(f"{source}: column `{column}` is null in {missing} of {len(rows)} rows; remove them")
    wild = int((~rows[PREDICTION_TIME].to_physical().is_between(*_YEARS)).sum())
    if wild:
        raise DataError(f"{source}: column `{PREDICTION_TIME}` lies outside years 1 to 9999 in {wild} rows; correct it")
    repeated = len(rows) - rows.select(SUBJECT_ID, PREDICTION_TIME).n_unique()
    if repeated:
        raise DataError(
            f"{source}: {repeated} of {len(rows)} rows repeat a patient and prediction time; keep one of each"
        )
    return rows.sort(SUBJECT_ID, PREDICTION_TIME)


def _reads_numbers(schema: FeatureSchema) -> bool:
    return bool(features(schema)["low"].is_not_null().any())


def _need(have: pl.Schema, column: str, source: str, remedy: str) -> None:
    if column not in have:
        raise DataError(f"{source}: column `{column}` is missing; {remedy}")


def _check_id(have: pl.Schema, source: str) -> None:
    if have[SUBJECT_ID] != pl.Int64:
        raise DataError(
            f"{source}: column `{SUBJECT_ID}` is {have[SUBJECT_ID]}, expected a 64-bit integer; "
            "number the patients and keep the table of names at the hospital"
        )


def _check_time(have: pl.Schema, column: str, source: str) -> None:
    kind = have[column]
    if not isinstance(kind, pl.Datetime):
        if column == TIME and kind == pl.Null:
            return
        raise DataError(
            f"{source}: column `{column}` is {kind}, expected a date-time in microseconds; "
            "a date alone would count as midnight and let later events of that day leak"
        )
    if kind.time_zone is not None:
        raise DataError(
            f"{source}: column `{column}` has the time zone {kind.time_zone}, expected none; "
            "write the hospital's local time without a zone, the same for events and labels"
        )
