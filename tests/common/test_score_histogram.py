"""The histogram of scores: what one patient can do to it, and where its bins lie."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from common.score_histogram import SENSITIVITY, ScoreBins, histogram

ANY_SCORE = st.floats(allow_nan=True, allow_infinity=True)
RECORD = st.tuples(st.integers(0, 1), ANY_SCORE)
PATIENTS = st.lists(st.lists(RECORD, min_size=1, max_size=7), min_size=1, max_size=9)
BINS = ScoreBins(10, 0.2)


def of(patients: list[list[tuple[int, float]]], bins: ScoreBins = BINS) -> np.ndarray[Any, Any]:
    rows = [(owner, *record) for owner, records in enumerate(patients) for record in records]
    patient, label, logit = zip(*rows, strict=True) if rows else ((), (), ())
    return histogram(bins, np.array(patient, np.int64), np.array(label, np.float32), np.array(logit, np.float64))


@settings(deadline=None, max_examples=200)
@given(patients=PATIENTS, gone=st.integers(0, 8), bins=st.integers(4, 30))
def test_removing_any_patient_moves_it_by_at_most_the_bound(
    patients: list[list[tuple[int, float]]], gone: int, bins: int
) -> None:
    """Whatever the scores, NaN and infinities too, and however many records: at most 1 in L2, and to the last digit."""
    gone %= len(patients)
    where = ScoreBins(bins, 0.2)
    moved = of(patients, where) - of(patients[:gone] + patients[gone + 1 :], where)
    assert math.sqrt((moved**2).sum()) <= SENSITIVITY
    assert np.abs(moved).sum() <= SENSITIVITY
    assert (moved >= 0).all()


def test_the_bound_is_reached() -> None:
    """One record, or several in one cell, move one cell by 1: a smaller bound would be wrong."""
    others = [[(0, 0.1)], [(1, -3.0), (0, 2.0)]]
    for records in ([(1, 0.5)], [(1, 0.5)] * 4):
        moved = of([*others, list(records)]) - of(others)
        assert np.sqrt((moved**2).sum()) == SENSITIVITY


@settings(deadline=None, max_examples=30)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=400))
def test_sums_are_exact(sizes: list[int]) -> None:
    """A cell holds a whole number of 2^-24, patients' shares rounded down: no order of patients changes a bit of it."""
    patients = [[(1, 0.0)] * size for size in sizes]
    there, back = of(patients), of(patients[::-1])
    assert (there == back).all()
    assert there.sum() <= len(patients)
    assert there.sum() >= len(patients) - sum(sizes) * 2.0**-24
    assert (there * 2**24 == np.round(there * 2**24)).all()


def test_many_records_split_one_patient() -> None:
    """Two of four records in one cell are half a patient there, a quarter in each of the other two."""
    found = of([[(0, -9.0), (0, -9.0), (1, -9.0), (1, 9.0)]])
    assert found[0, 0] == 0.5
    assert found[1, 0] == found[1, -1] == 0.25


def test_bins_are_public_and_cover_every_number() -> None:
    """Edges follow from prevalence and number alone; -inf, inf and NaN have a bin like any score."""
    assert BINS.edges[0] == math.log(0.25) - 4
    assert np.allclose(np.diff(BINS.edges), 1.0)
    assert BINS.of(np.array([-np.inf, np.inf, np.nan])).tolist() == [0, 9, 9]
    assert (BINS.of(BINS.middles) == np.arange(10)).all()
    assert len(BINS.edges) == 9


def test_nobody_is_an_empty_histogram() -> None:
    """A site without held-out patients has a histogram of the same form."""
    assert (of([]) == np.zeros((2, 10))).all()
