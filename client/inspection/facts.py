"""What a site's records are like under a study: exact counts, for the eyes of this hospital alone.

Nothing here leaves: `pages.shareable` never sees these numbers, unless a person names one (`disclosures`).

Decisions a reader would question:

- Codes are named only if at least `LEAST_PATIENTS` patients have them, also on the local page: a page is printed and
  carried about, and a rare code can be a person. Rarer ones are counted together.
- The prediction-time rule is shown, not claimed (`same_without_later_events`): each patient's earliest prediction is
  read twice, from all events and from a copy that holds nothing later, and the two must agree to the last bit. The
  earliest has the most events after it. It costs two more readings of the records.
- `Outcome` is about what the model reads: known codes, at or before the prediction. A number that tells the outcome
  (a score that was filled in afterwards) is not found by it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from client.readers.meds import MedsDirectory
from client.readers.optouts import read_optouts
from client.readers.own import open_records
from client.site_file import SiteFile
from common.errors import DataError
from common.events import VALUE, Coverage, fate, known_codes
from common.schema import (
    BOOLEAN_VALUE,
    CODE,
    NUMERIC_VALUE,
    PREDICTION_TIME,
    SPLIT,
    SPLITS,
    SUBJECT_ID,
    TIME,
    FeatureSchema,
)
from common.sequences import Sequences, build

if TYPE_CHECKING:
    from common.study import Study

LEAST_PATIENTS = 10  # a count of fewer people is not named
UNKNOWN_SHOWN = 20
DATE_ONLY = 0.9  # a code of which so many events are stamped 00:00:00 is written by date


@dataclass(frozen=True)
class Measured:
    """One number of the schema as it is recorded here.

    Attributes:
        code, unit, low, high: as the schema has them.
        events, patients: how often, and of how many people; 0 if never.
        without_number, outside: events without a number, and outside of [low, high]; both are dropped.
        median: of the numbers inside; None without any.
    """

    code: str
    unit: str
    low: float
    high: float
    events: int
    patients: int
    without_number: int
    outside: int
    median: float | None


@dataclass(frozen=True)
class Unknown:
    """Events whose code the study does not read.

    Attributes:
        codes: how many different ones.
        frequent: (code, events, patients) of the most frequent that enough patients have.
        rare: codes that fewer than LEAST_PATIENTS patients have.
    """

    codes: int
    frequent: tuple[tuple[str, int, int], ...]
    rare: int


@dataclass(frozen=True)
class Events:
    """All events of this site, without those who opted out.

    Attributes:
        patients: with an event.
        first, last: of the times; None if every event is a fact.
        fates: what becomes of each.
        measured: the schema's numbers, in its order.
        listed_seen: how many of the schema's listed codes occur, also as a finer code.
        unknown: what is not read.
        at_midnight, at_day_end: events at exactly 00:00:00 and within 23:59:59, known or not.
        timed: events with a time.
    """

    patients: int
    first: datetime | None
    last: datetime | None
    fates: Coverage
    measured: tuple[Measured, ...]
    listed_seen: int
    unknown: Unknown
    timed: int
    at_midnight: int
    at_day_end: int


@dataclass(frozen=True)
class Held:
    """A code at or before predictions: of how many label rows and patients, and how many of the rows are positive."""

    code: str
    rows: int
    patients: int
    positives: int


@dataclass(frozen=True)
class Outcome:
    """Codes against the label, by row of the splits that train.

    Attributes:
        rows, positives: of all labels.
        held: codes that at least LEAST_PATIENTS patients have, at or before a prediction.
        same_day: (code, rows): codes written by date that stand at 00:00:00 of the very day of a prediction.
    """

    rows: int
    positives: int
    held: tuple[Held, ...]
    same_day: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Lengths:
    """Sequences of the splits that train.

    Attributes:
        patients, sequences, positives: counts.
        quantiles: steps at 0, 10, 50, 90 and 100 % of the sequences.
        full: sequences that have `max_steps` steps: older steps may have been cut off.
        empty: sequences without any usable event in time.
    """

    patients: int
    sequences: int
    positives: int
    quantiles: tuple[int, int, int, int, int]
    full: int
    empty: int


@dataclass(frozen=True)
class OptedOut:
    """Who opted out: `listed` in the file, `here` those of them that have events."""

    listed: int
    here: int


def opened(site: SiteFile, schema: FeatureSchema) -> tuple[MedsDirectory, OptedOut | None]:
    """The records as training reads them. Raises DataError."""
    directory = open_records(site, schema)
    if site.exclude is None:
        return directory, None
    return directory, _opted_out(directory, read_optouts(Path(site.exclude)))


def _opted_out(directory: MedsDirectory, excluded: pl.Series) -> OptedOut:
    shards = [pl.scan_parquet(shard, glob=False).select(SUBJECT_ID) for shard in directory.shards]
    try:
        here = pl.concat(shards).filter(pl.col(SUBJECT_ID).is_in(excluded.implode()))
        return OptedOut(len(excluded), int(here.select(pl.col(SUBJECT_ID).n_unique()).collect().item()))
    except pl.exceptions.PolarsError as error:  # its text may quote the file's content
        raise DataError(f"{directory.data}: cannot be read ({type(error).__name__}); write the files again") from None


def events_of(directory: MedsDirectory, schema: FeatureSchema) -> Events:
    """Count all events. Raises DataError where ids, codes, numbers or times cannot be used."""
    coverage = directory.coverage(schema)  # first: it refuses what would fail below
    events = directory.events(schema)
    known = known_codes(events, schema)
    midnight, day_end = pl.col(TIME).dt.time() == pl.time(), pl.col(TIME).dt.truncate("1s").dt.time() == _LAST_SECOND
    by_code = (
        events.join(known.lazy(), on=CODE, how="left")
        .with_columns(fate(schema).alias("fate"))
        .group_by(CODE, "group", "column")
        .agg(
            pl.len().alias("events"),
            pl.col(SUBJECT_ID).n_unique().alias("patients"),
            pl.col(TIME).min().alias("first"),
            pl.col(TIME).max().alias("last"),
            pl.col(TIME).count().alias("timed"),
            midnight.sum().alias("midnight"),
            day_end.sum().alias("day_end"),
            (pl.col("fate") == "without_number").sum().alias("without_number"),
            (pl.col("fate") == "out_of_range").sum().alias("outside"),
            pl.col(NUMERIC_VALUE).filter(pl.col("fate") == "usable").median().alias("median"),
        )
        .collect()
    )
    unknown = by_code.filter(pl.col("group").is_null())
    enough = unknown.filter(pl.col("patients") >= LEAST_PATIENTS).sort("events", CODE, descending=[True, False])
    return Events(
        patients=int(events.select(pl.col(SUBJECT_ID).n_unique()).collect().item()),
        first=_time(by_code["first"].min()),
        last=_time(by_code["last"].max()),
        fates=coverage,
        measured=_measured(by_code, schema),
        listed_seen=by_code.filter(pl.col("group") == 1)["column"].n_unique(),
        unknown=Unknown(
            len(unknown),
            tuple(enough.select(CODE, "events", "patients").head(UNKNOWN_SHOWN).iter_rows()),
            len(unknown) - len(enough),
        ),
        timed=int(by_code["timed"].sum()),
        at_midnight=int(by_code["midnight"].sum()),
        at_day_end=int(by_code["day_end"].sum()),
    )


_LAST_SECOND = pl.time(23, 59, 59)


def _time(value: object) -> datetime | None:
    return value if isinstance(value, datetime) else None


def _measured(by_code: pl.DataFrame, schema: FeatureSchema) -> tuple[Measured, ...]:
    found = {row[CODE]: row for row in by_code.filter(pl.col("group") == VALUE).iter_rows(named=True)}
    counts = ("events", "patients", "without_number", "outside")
    rows = []
    for code, feature in schema.values.items():
        row = found.get(code, {})
        events, patients, without, outside = (int(row.get(name, 0)) for name in counts)
        rows.append(
            Measured(
                code, feature.unit, feature.min, feature.max, events, patients, without, outside, row.get("median")
            )
        )
    return tuple(rows)


def split_sizes(directory: MedsDirectory, task: str, key: bytes) -> dict[str, int]:
    """Labelled patients by split, 0 where there are none. Raises DataError: also for a patient in two splits."""
    subjects = directory.labels(task)[SUBJECT_ID].unique(maintain_order=True)
    found = dict(directory.splits(subjects, key)[SPLIT].value_counts().iter_rows())
    return {split: int(found.get(split, 0)) for split in SPLITS}


def trained_rows(directory: MedsDirectory, site: SiteFile, task: str, key: bytes) -> pl.DataFrame:
    """The label rows of the splits that train: subject_id, prediction_time, boolean_value. Raises DataError."""
    rows = directory.labels(task)
    subjects = rows[SUBJECT_ID].unique(maintain_order=True)
    chosen = directory.splits(subjects, key).filter(pl.col(SPLIT).is_in(site.splits))
    return rows.join(chosen, on=SUBJECT_ID, how="semi", maintain_order="left")


def outcome_of(directory: MedsDirectory, rows: pl.DataFrame, schema: FeatureSchema) -> Outcome:
    """Which codes stand at or before predictions, and with which label.

    Args:
        directory: the records.
        rows: of `trained_rows`.
        schema: the study's inputs.
    """
    events = directory.events(schema)
    numbered = rows.lazy().with_row_index("row")
    midnight = pl.col(TIME).dt.time() == pl.time()
    seen = (
        events.join(known_codes(events, schema).lazy(), on=CODE, how="inner")
        .filter(fate(schema) == "usable")
        .join(numbered, on=SUBJECT_ID, how="inner")
        .filter(pl.col(TIME).is_null() | (pl.col(TIME) <= pl.col(PREDICTION_TIME)))
    )
    on_its_day = midnight & (pl.col(TIME).dt.date() == pl.col(PREDICTION_TIME).dt.date())
    held = (
        seen.group_by(CODE, "row")
        .agg(
            pl.col(SUBJECT_ID).first(),
            pl.col(BOOLEAN_VALUE).first(),
            pl.col(TIME).count().alias("timed"),
            midnight.sum().alias("midnight"),
            on_its_day.any().alias("on_its_day"),
        )
        .group_by(CODE)
        .agg(
            pl.len().alias("rows"),
            pl.col(SUBJECT_ID).n_unique().alias("patients"),
            pl.col(BOOLEAN_VALUE).sum().alias("positives"),
            pl.col("timed").sum(),
            pl.col("midnight").sum(),
            pl.col("on_its_day").sum(),
        )
        .filter(pl.col("patients") >= LEAST_PATIENTS)
        .sort(CODE)
        .collect()
    )
    by_date = held.filter((pl.col("midnight") >= DATE_ONLY * pl.col("timed")) & (pl.col("on_its_day") > 0))
    return Outcome(
        rows=len(rows),
        positives=int(rows[BOOLEAN_VALUE].sum()),
        held=tuple(Held(*row) for row in held.select(CODE, "rows", "patients", "positives").iter_rows()),
        same_day=tuple(by_date.select(CODE, "on_its_day").iter_rows()),
    )


def lengths_of(sequences: Sequences, max_steps: int) -> Lengths:
    """Counts of sequences that were built."""
    steps = np.diff(sequences.start)
    recorded = sequences.measured.any(axis=1) | (np.diff(sequences.code_start) > 0)
    filled = np.add.reduceat(recorded.astype(np.int64), sequences.start[:-1]) if len(steps) else steps
    least, low, middle, high, most = (int(q) for q in np.quantile(steps, [0, 0.1, 0.5, 0.9, 1], method="inverted_cdf"))
    return Lengths(
        patients=sequences.n_patients,
        sequences=sequences.n_sequences,
        positives=int(sequences.label.sum()),
        quantiles=(least, low, middle, high, most),
        full=int((steps >= max_steps).sum()),
        empty=int((filled == 0).sum()),
    )


def same_without_later_events(directory: MedsDirectory, rows: pl.DataFrame, study: Study) -> bool:
    """Whether each patient's earliest prediction reads the same from records that hold nothing later.

    Args:
        directory: the records.
        rows: of `trained_rows`.
        study: for its inputs and steps.
    """
    first = rows.group_by(SUBJECT_ID, maintain_order=True).first()
    events = directory.events(study.features)
    earlier = (
        events.join(first.lazy(), on=SUBJECT_ID, how="inner", maintain_order="left")
        .filter(pl.col(TIME).is_null() | (pl.col(TIME) <= pl.col(PREDICTION_TIME)))
        .select(SUBJECT_ID, TIME, CODE, NUMERIC_VALUE)
    )
    whole, cut = (
        build(some, first, study.features, max_steps=study.records.max_steps, bin_hours=study.records.bin_hours)
        for some in (events, earlier)
    )
    return all(np.array_equal(getattr(whole, f.name), getattr(cut, f.name)) for f in fields(Sequences))
