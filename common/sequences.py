"""Records and label rows -> ragged sequences grouped by patient: what a model sees, and whose it is.

`build` makes one sequence per label row. It may use events up to and including the row's prediction time.

- An event is *usable* if its code is in the schema, or counts as one that is (`shorten`), and its number, where
  one is asked for, is within the schema's limits. Everything else is as if it had not been recorded: it neither
  fills nor makes a step.
- A step is one distinct time of usable events or, with `bin_hours` = w, one non-empty bin counted backward
  from the prediction time p: bin k holds p - (k+1)w < time <= p - kw.
- A value at a step is the mean of the step's numbers, scaled. A value not measured at a step is carried
  forward from the last step that has it, through the whole history, before the cut to `max_steps`.

Decisions a reader would question:

- Bins count backward, so that the last bin is full. Counted from admission, the bin before the prediction
  would be cut short by a different amount for every patient, at the most telling place of the record.
- The time of a binned step is that of its latest event, not an edge of the bin: gaps then tell when something
  was last recorded, and small bins turn into event times without a jump.
- The gap of a sequence's first step counts from the step before it where the cut removed one: the cut is
  ours, not the patient's. A record's very first step has gap 0 hours.
- A label row whose patient has events but no usable one in time becomes one empty step. Dropping or refusing
  it would let one patient's record decide whether training happens at all.
- Facts need not lack a time: many extracts stamp sex at birth or age at admission. Of a static recorded
  several times up to the prediction time the latest counts (untimed = earliest). Several at the same time:
  numbers are averaged, the largest level wins, so that the order of rows does not matter.
- Every sequence is computed from its own patient's events alone, in blocks that bound memory. One table of
  steps per patient, shared by its label rows, would be faster for event times but is not possible for bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from common.assembly import (
    MICROSECONDS_PER_HOUR,
    Block,
    Floats,
    Ints,
    Table,
    assemble,
    offsets,
    parts,
    ranges,
)
from common.errors import ConfigurationError, DataError
from common.events import (
    STATIC,
    VALUE,
    Coverage,
    checked_labels,
    fate,
    known_codes,
    require_known,
    survey,
    typed_events,
)
from common.schema import (
    BOOLEAN_VALUE,
    CODE,
    NUMERIC_VALUE,
    PREDICTION_TIME,
    SUBJECT_ID,
    TIME,
    FeatureSchema,
)

_ALWAYS = np.iinfo(np.int64).min  # the time of a fact without a time: before everything


@dataclass(frozen=True, eq=False, repr=False)
class Sequences:
    """S sequences of P patients with N steps in all, of V values, K static columns and M code occurrences.

    Attributes:
        patient_id: [P] int64, ascending. Never leaves the site.
        patient: [S] int64 in [0, P), non-decreasing: owner of each sequence. Every patient has a sequence.
        start: [S+1] int64: the steps of sequence s are rows start[s]:start[s+1], oldest first, at least one.
        values: [N, V] float32, scaled to [-4, 4], carried forward; never measured so far = 0.
        measured: [N, V] bool: measured at this very step.
        gap: [N] float32: scaled log time since the step before.
        codes: [M] int64 in [0, n_codes), ascending within a step, each at most once per step.
        code_start: [N+1] int64: the codes of row r are codes[code_start[r]:code_start[r+1]].
        statics: [S, K] float32.
        label: [S] float32, 0 or 1.
        prediction_time: [S] datetime64[us], ascending within a patient.

    """

    patient_id: Ints
    patient: Ints
    start: Ints
    values: Floats
    measured: NDArray[np.bool_]
    gap: Floats
    codes: Ints
    code_start: Ints
    statics: Floats
    label: Floats
    prediction_time: NDArray[np.datetime64]

    def __post_init__(self) -> None:
        sequences, steps = len(self.patient), len(self.gap)
        expected: dict[str, tuple[int, ...]] = {
            "start": (sequences + 1,),
            "values": (steps, *self.values.shape[1:]),
            "measured": self.values.shape,
            "code_start": (steps + 1,),
            "statics": (sequences, *self.statics.shape[1:]),
            "label": (sequences,),
            "prediction_time": (sequences,),
        }
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise DataError(f"sequences: `{name}` has shape {getattr(self, name).shape}, expected {shape}")

    def __repr__(self) -> str:
        return "Sequences(records of patients, not printed)"

    @property
    def n_patients(self) -> int:
        """P. A private number at a real site."""
        return len(self.patient_id)

    @property
    def n_sequences(self) -> int:
        """S: label rows."""
        return len(self.patient)

    @property
    def n_steps(self) -> int:
        """N: steps of all sequences together."""
        return len(self.gap)

    def select(self, patients: ArrayLike) -> Sequences:
        """The records of some patients, by index [n] in [0, P); they are renumbered in ascending order.

        An index given twice counts once; none at all gives empty Sequences. Raises DataError out of range.
        """
        wanted = np.asarray(patients)
        if wanted.size and not np.issubdtype(wanted.dtype, np.integer):
            raise DataError(f"select: patient indices are {wanted.dtype}, expected integers (positions, no mask)")
        chosen: Ints = np.unique(wanted).astype(np.int64)
        if chosen.size and not (chosen[0] >= 0 and chosen[-1] < self.n_patients):
            raise DataError("select: a patient index is out of range; take indices from 0 to n_patients - 1")
        first = np.searchsorted(self.patient, chosen)
        owned = np.searchsorted(self.patient, chosen, side="right") - first
        sequences = ranges(first, owned)
        length = np.diff(self.start)[sequences]
        rows = ranges(self.start[sequences], length)
        n_codes = np.diff(self.code_start)[rows]
        return Sequences(
            patient_id=self.patient_id[chosen],
            patient=np.repeat(np.arange(len(chosen)), owned),
            start=offsets(length),
            values=self.values[rows],
            measured=self.measured[rows],
            gap=self.gap[rows],
            codes=self.codes[ranges(self.code_start[rows], n_codes)],
            code_start=offsets(n_codes),
            statics=self.statics[sequences],
            label=self.label[sequences],
            prediction_time=self.prediction_time[sequences],
        )


def check_trainable(sequences: Sequences, source: str = "training split") -> None:
    """Raise DataError if nothing could be learned: no patients, one class only, or nothing ever recorded.

    It depends on the records, so it belongs before enrolment (`wardround client check`, a simulation's start)
    and never inside a study, where a refusal would tell the server about the patients.
    """
    if sequences.n_patients == 0:
        raise DataError(f"{source}: 0 patients; check the task's label file and the split")
    if len(np.unique(sequences.label)) < 2:
        raise DataError(
            f"{source}: all {sequences.n_sequences} labels are the same, training needs both classes; "
            "check how the task's label is defined"
        )
    if not sequences.measured.any() and not sequences.codes.size:
        raise DataError(
            f"{source}: no step of {sequences.n_sequences} sequences holds a value or code of the schema; "
            "compare codes, units and event times with it"
        )


def build(
    events: pl.LazyFrame,
    labels: pl.DataFrame,
    schema: FeatureSchema,
    *,
    max_steps: int,
    bin_hours: float | None,
    source: str = "events",
    label_source: str = "labels",
    coverage: Coverage | None = None,
) -> Sequences:
    """One sequence per label row; see the module docstring for what a step is.

    Args:
        events: subject_id Int64, time Datetime (null = a fact), code String, numeric_value; any row order.
        labels: subject_id Int64, prediction_time Datetime, boolean_value Boolean; each (patient, time) once.
        schema: the study's inputs.
        max_steps: the latest steps that are kept of a sequence.
        bin_hours: width of a bin; None = one step per distinct event time.
        source: what to call the events in an error, such as their folder.
        label_source: what to call the label rows in an error, such as their file.
        coverage: what `common.events.survey` said of these events, if it was asked before; saves one pass.

    Raises:
        DataError: unusable columns or rows, label rows of patients without events or before their first one,
            or no event at all with a code of the schema.
        ConfigurationError: max_steps or bin_hours that cannot be.

    """
    width = _bin_width(max_steps, bin_hours)
    rows = checked_labels(labels, label_source)
    typed = typed_events(events, schema, source)
    require_known(survey(typed, schema, source) if coverage is None else coverage, schema, source)
    patients = (
        rows.group_by(SUBJECT_ID)
        .agg(pl.col(PREDICTION_TIME).max().alias("until"))
        .sort(SUBJECT_ID)
        .with_columns(pl.int_range(pl.len(), dtype=pl.Int64).alias("patient"))
    )
    _require_records(typed, rows, source, label_source)
    timed, facts = _usable(typed, patients, schema)

    owner = rows.join(patients, on=SUBJECT_ID, how="left", maintain_order="left")["patient"].to_numpy()
    prediction = rows[PREDICTION_TIME].to_numpy()
    moment = prediction.astype(np.int64)
    blocks = [
        assemble(timed, facts, owner[part], moment[part], schema, max_steps, width)
        for part in parts(timed, facts, owner, schema.n_values, max_steps)
    ]
    joined = {f.name: np.concatenate([getattr(block, f.name) for block in blocks]) for f in fields(Block)}
    return Sequences(
        patient_id=patients[SUBJECT_ID].to_numpy().copy(),
        patient=owner.astype(np.int64),
        start=offsets(joined["length"]),
        values=joined["values"],
        measured=joined["measured"],
        gap=joined["gap"],
        codes=joined["codes"],
        code_start=offsets(joined["n_codes"]),
        statics=joined["statics"],
        label=rows[BOOLEAN_VALUE].to_numpy().astype(np.float32),
        prediction_time=prediction.astype("datetime64[us]"),
    )


def _bin_width(max_steps: int, bin_hours: float | None) -> int | None:
    """Width of a bin in microseconds."""
    if max_steps < 1:
        raise ConfigurationError(f"max_steps = {max_steps} must be at least 1")
    if bin_hours is None:
        return None
    if not (math.isfinite(bin_hours) and 1 / MICROSECONDS_PER_HOUR <= bin_hours <= 1e6):
        raise ConfigurationError(f"bin_hours = {bin_hours} must lie between a microsecond and 1e6 hours, or null")
    return round(bin_hours * MICROSECONDS_PER_HOUR)


def _require_records(events: pl.LazyFrame, rows: pl.DataFrame, source: str, label_source: str) -> None:
    """Every labelled patient has events, and none is predicted before the first of them."""
    begins = (
        events.join(rows.lazy().select(SUBJECT_ID), on=SUBJECT_ID, how="semi")
        .group_by(SUBJECT_ID)
        .agg(pl.col(TIME).min(), pl.len().alias("events"))
        .collect(engine="streaming")
    )
    known = rows.join(begins, on=SUBJECT_ID, how="left")
    absent = known["events"].null_count()
    if absent:
        raise DataError(
            f"{label_source}: {absent} of {len(rows)} label rows belong to patients without any event in "
            f"{source}; add their events or remove the rows"
        )
    early = int((known[PREDICTION_TIME] < known[TIME]).sum())
    if early:
        raise DataError(
            f"{label_source}: column `{PREDICTION_TIME}` is before the patient's first event in {early} of "
            f"{len(rows)} label rows; correct the times or remove the rows"
        )


def _usable(events: pl.LazyFrame, patients: pl.DataFrame, schema: FeatureSchema) -> tuple[Table, Table]:
    """Usable events of the patients up to their last prediction: those that make steps, and static facts.

    Columns of the first table: values 0..V-1, then listed codes V..V+n_codes-1; of the second: statics.
    """
    found = (
        events.join(known_codes(events, schema).lazy(), on=CODE, how="inner", maintain_order="left")
        .filter(fate(schema) == "usable")
        .join(patients.lazy(), on=SUBJECT_ID, how="inner", maintain_order="left")
        .filter(pl.col(TIME).is_null() | (pl.col(TIME) <= pl.col("until")))
        .select(
            "patient",
            pl.col(TIME).to_physical().fill_null(_ALWAYS),
            pl.col("group") == STATIC,
            pl.col("column") + pl.when(pl.col("group").is_in([VALUE, STATIC])).then(0).otherwise(schema.n_values),
            pl.col(NUMERIC_VALUE).cast(pl.Float64),
        )
        .collect()
    )
    static = found["group"]
    return _table(found.filter(~static), len(patients)), _table(found.filter(static), len(patients))


def _table(found: pl.DataFrame, n_patients: int) -> Table:
    patient, time = found["patient"].to_numpy(), found[TIME].to_numpy()
    column, number = found["column"].to_numpy().astype(np.int64), found[NUMERIC_VALUE].to_numpy()
    rising = (patient[1:] > patient[:-1]) | ((patient[1:] == patient[:-1]) & (time[1:] >= time[:-1]))
    if not rising.all():  # MEDS tables are sorted; others are sorted here, keeping the order of equal times
        order = np.lexsort((time, patient))
        patient, time, column, number = patient[order], time[order], column[order], number[order]
    return Table(np.searchsorted(patient, np.arange(n_patients + 1)), time, column, number)
