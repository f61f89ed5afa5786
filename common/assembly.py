"""Sorted usable events -> the arrays of ragged sequences, vectorised; `common.sequences` says what they mean.

Each sequence is computed from its own patient's rows only: every grouping key below begins with the sequence.
Dense cells exist only for the steps that are kept; what a long history contributes beyond the cut is one
number per sequence and value (the one to carry forward), so the cells do not grow with the length of records.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.schema import FeatureSchema, LevelsFeature, NumericFeature, Scaling

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

MICROSECONDS_PER_HOUR = 3_600_000_000
BLOCK = 2_000_000  # events + cells worked on at once, about 150 MB; results do not depend on it (tested)


@dataclass(frozen=True, eq=False)
class Table:
    """Usable events sorted by patient, then time: those of patient p are rows start[p]:start[p+1].

    `time` is in microseconds; `column` is the feature; `number` is NaN for a code without one.
    """

    start: Ints
    time: Ints
    column: Ints
    number: Doubles


@dataclass(frozen=True, eq=False)
class Block:
    """The arrays of some consecutive sequences, with lengths and counts in place of offsets."""

    length: Ints
    values: Floats
    measured: NDArray[np.bool_]
    gap: Floats
    codes: Ints
    n_codes: Ints
    statics: Floats


def parts(timed: Table, facts: Table, owner: Ints, n_values: int, max_steps: int) -> Iterator[slice]:
    """Runs of sequences (`owner` [S]) whose events and cells together stay near BLOCK, each at least one."""
    events = np.diff(timed.start)[owner]
    work = events + np.diff(facts.start)[owner] + np.clip(events, 1, max_steps) * (n_values + 1)
    cuts = np.flatnonzero(np.diff(np.cumsum(work) // BLOCK)) + 1
    for begin, end in zip([0, *cuts], [*cuts, len(owner)], strict=True):
        yield slice(int(begin), int(end))


def assemble(
    timed: Table,
    facts: Table,
    owner: Ints,
    prediction: Ints,
    schema: FeatureSchema,
    max_steps: int,
    bin_width: int | None,
) -> Block:
    """The sequences of B label rows.

    Args:
        timed: events that make steps; columns 0..V-1 are values, V.. are listed codes.
        facts: events of static codes; columns in the order of `schema.statics`.
        owner: [B] whose sequence each is, an index into the tables.
        prediction: [B] prediction times in microseconds.
        schema: the study's inputs.
        max_steps: the latest steps that are kept.
        bin_width: width of a bin in microseconds, or None for one step per distinct time.

    """
    event, sequence = _visible(timed, owner, prediction)
    time, column, number = timed.time[event], timed.column[event], timed.number[event]

    # Steps. Events are sorted by time within a sequence, so a step is a run of equal times (or bins).
    place = time if bin_width is None else -((prediction[sequence] - time) // bin_width)
    begins = np.ones(len(event), np.bool_)
    begins[1:] = (sequence[1:] != sequence[:-1]) | (place[1:] != place[:-1])
    ends = np.append(begins[1:], True)[: len(event)]
    step = np.cumsum(begins) - 1
    step_sequence, step_time = sequence[begins], time[ends]
    hours = np.diff(step_time, prepend=step_time[:1]) / MICROSECONDS_PER_HOUR
    hours[np.diff(step_sequence, prepend=-1) != 0] = 0.0

    # Rows. The latest `max_steps` steps of each sequence, or one empty row. Negative `position` = cut off.
    steps = np.bincount(step_sequence, minlength=len(owner))
    kept = np.minimum(steps, max_steps)
    length = np.maximum(kept, 1)
    first_row = offsets(length)[:-1]
    position = np.arange(len(step_sequence)) - (offsets(steps)[1:] - kept)[step_sequence]
    row = first_row[step_sequence] + position
    n_rows = int(length.sum())

    gap = np.zeros(n_rows)
    gap[row[position >= 0]] = hours[position >= 0]

    shown, is_value = (position >= 0)[step], column < schema.n_values
    now, past, coded = is_value & shown, is_value & ~shown, ~is_value & shown
    scaling = Scaling.of(list(schema.values.values()))
    values, measured = _measured_values(row[step[now]], column[now], number[now], n_rows, scaling)
    _seed(values, measured, first_row, sequence[past], step[past], column[past], number[past], scaling)
    code_row, codes = _distinct(row[step[coded]], column[coded] - schema.n_values, schema.n_codes)
    return Block(
        length=length,
        values=_carried_forward(values, measured, first_row),
        measured=measured,
        gap=schema.time_gap.scaled(gap),
        codes=codes,
        n_codes=np.bincount(code_row, minlength=n_rows),
        statics=_statics(facts, owner, prediction, schema),
    )


def ranges(start: Ints, count: Ints) -> Ints:
    """start[0], start[0]+1 .. (count[0] numbers), start[1], ..: the ranges one after another."""
    return np.arange(int(count.sum())) + np.repeat(start - offsets(count)[:-1], count)


def offsets(count: Ints) -> Ints:
    """[n+1] where each of n runs of `count` [n] elements begins, and where the last one ends."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(count, dtype=np.int64)])


def _visible(table: Table, owner: Ints, prediction: Ints) -> tuple[Ints, Ints]:
    """Events up to and including the prediction, by sequence then time: rows of `table`, and sequence."""
    count = (table.start[1:] - table.start[:-1])[owner]
    event = ranges(table.start[owner], count)
    sequence = np.repeat(np.arange(len(owner)), count)
    seen = table.time[event] <= prediction[sequence]
    return event[seen], sequence[seen]


def _means(cell: Ints, number: Doubles, n_cells: int) -> tuple[Ints, Doubles]:
    """The cells that hold numbers, ascending, and the mean of the numbers in each."""
    count = np.bincount(cell, minlength=n_cells)
    filled = np.flatnonzero(count)
    return filled, np.bincount(cell, weights=number, minlength=n_cells)[filled] / count[filled]


def _measured_values(
    row: Ints, column: Ints, number: Doubles, n_rows: int, scaling: Scaling
) -> tuple[Floats, NDArray[np.bool_]]:
    """Scaled step means [N, V], 0 where nothing was measured, and where something was [N, V]."""
    n_values = len(scaling.centre)
    filled, mean = _means(row * n_values + column, number, n_rows * n_values)
    values = np.zeros(n_rows * n_values, np.float32)
    measured = np.zeros(n_rows * n_values, np.bool_)
    values[filled] = scaling.scaled(mean, filled % max(n_values, 1))
    measured[filled] = True
    return values.reshape(n_rows, n_values), measured.reshape(n_rows, n_values)


def _seed(
    values: Floats,
    measured: NDArray[np.bool_],
    first_row: Ints,
    sequence: Ints,
    step: Ints,
    column: Ints,
    number: Doubles,
    scaling: Scaling,
) -> None:
    """Write what was last measured before the cut into the first kept row, where it has no own value."""
    n_values = len(scaling.centre)
    cell = sequence * n_values + column
    last = np.full(len(first_row) * n_values, -1, np.int64)
    last[cell] = step  # steps ascend within a sequence; of repeated indices numpy keeps the last assignment
    latest = step == last[cell]
    filled, mean = _means(cell[latest], number[latest], len(last))
    carried = scaling.scaled(mean, filled % max(n_values, 1))
    row, at = first_row[filled // max(n_values, 1)], filled % max(n_values, 1)
    free = ~measured[row, at]
    values[row[free], at[free]] = carried[free]


def _carried_forward(values: Floats, measured: NDArray[np.bool_], first_row: Ints) -> Floats:
    """Each cell takes the value of the latest measured row of its sequence, or of its first row."""
    origin = np.where(measured, np.arange(len(values))[:, None], 0)
    origin[first_row] = first_row[:, None]
    np.maximum.accumulate(origin, axis=0, out=origin)
    return np.take_along_axis(values, origin, axis=0)


def _distinct(row: Ints, code: Ints, n_codes: int) -> tuple[Ints, Ints]:
    """Distinct (row, code) pairs in ascending order."""
    pairs = np.unique(row * max(n_codes, 1) + code)
    return pairs // max(n_codes, 1), pairs % max(n_codes, 1)


def _statics(facts: Table, owner: Ints, prediction: Ints, schema: FeatureSchema) -> Floats:
    """Static columns [B, K]: of each fact the latest up to the prediction time; never recorded = 0."""
    event, sequence = _visible(facts, owner, prediction)
    time, column, number = facts.time[event], facts.column[event], facts.number[event]
    cell = sequence * max(len(schema.statics), 1) + column
    last = np.zeros(len(owner) * max(len(schema.statics), 1), np.int64)
    last[cell] = time  # times ascend within a sequence; of repeated indices numpy keeps the last assignment
    latest = time == last[cell]

    columns: list[Floats] = [np.empty((len(owner), 0), np.float32)]
    for index, static in enumerate(schema.statics.values()):
        mine = latest & (column == index)
        whose, what = sequence[mine], number[mine]
        if isinstance(static, NumericFeature):
            filled, mean = _means(whose, what, len(owner))
            fact = np.zeros((len(owner), 1), np.float32)
            fact[filled, 0] = Scaling.of([static]).scaled(mean, np.zeros_like(filled))
        elif isinstance(static, LevelsFeature):
            largest = np.full(len(owner), -np.inf)
            np.maximum.at(largest, whose, what)
            fact = (largest[:, None] == np.array(static.levels, np.float32)).astype(np.float32)
        else:
            fact = np.zeros((len(owner), 1), np.float32)
            fact[whose, 0] = 1.0
        columns.append(fact)
    return np.concatenate(columns, axis=1)
