"""Who goes where: exact shares, ranges that keep ties together, hospitals read from records; and the shift by hand."""

from __future__ import annotations

from datetime import datetime

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DataError
from simulations.dealing import (
    by_quantile,
    by_shares,
    first_number,
    home_by_code,
    home_by_column,
    log_normal_shares,
)
from simulations.shift import chance_shift, code_counts, total_variation


@settings(deadline=None, max_examples=60)
@given(
    strata=st.lists(st.integers(0, 2), max_size=60),
    weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_each_stratum_is_dealt_by_its_shares(strata: list[int], weights: list[float], seed: int) -> None:
    """Every site gets its share of each stratum to within one patient, and everybody is dealt out."""
    share = np.array(weights) / sum(weights)
    place = by_shares(np.array(strata, np.int64), np.tile(share, (3, 1)), np.random.default_rng(seed))
    assert len(place) == len(strata)
    for stratum in range(3):
        members = place[np.array(strata, np.int64) == stratum]
        assert (np.abs(np.bincount(members, minlength=len(share)) - share * len(members)) <= 1).all()


def test_the_order_within_a_stratum_is_random() -> None:
    """Each patient of a stratum is at each site equally often over many deals."""
    random = np.random.default_rng(0)
    deals = np.array([by_shares(np.zeros(6, np.int64), np.array([[1 / 3, 2 / 3]]), random) for _ in range(3000)])
    assert np.abs(deals.mean(axis=0) - 2 / 3).max() < 4 * np.sqrt(2 / 9 / 3000)


def test_log_normal_shares_have_their_law() -> None:
    """Shares sum to 1; the difference of two logarithms is normal with variance 2 sigma squared."""
    random = np.random.default_rng(0)
    shares = np.array([log_normal_shares(3, 0.8, random) for _ in range(4000)])
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    difference = np.log(shares[:, 0] / shares[:, 1])
    assert abs(difference.var() / (2 * 0.8**2) - 1) < 4 * np.sqrt(2 / 4000)


@settings(deadline=None, max_examples=60)
@given(values=st.lists(st.integers(0, 8), min_size=1, max_size=80), sites=st.integers(1, 5))
def test_quantiles_keep_order_and_ties(values: list[int], sites: int) -> None:
    """A larger value is never at an earlier site, and equal values are at the same one."""
    number = np.array(values, float)
    place = by_quantile(number, sites, np.random.default_rng(0))
    assert place.min() >= 0
    assert place.max() < sites
    assert (np.diff(place[np.argsort(number, kind="stable")]) >= 0).all()
    assert all(len(set(place[number == value])) == 1 for value in set(values))


def test_quantiles_of_distinct_values_are_equal_parts() -> None:
    """Without ties every site gets its equal part; who has no value is dealt out evenly."""
    value = np.random.default_rng(0).permutation(40).astype(float)
    assert np.bincount(by_quantile(value, 4, np.random.default_rng(0))).tolist() == [10, 10, 10, 10]
    missing = np.concatenate([value, np.full(20, np.nan)])
    place = by_quantile(missing, 4, np.random.default_rng(0))
    assert np.bincount(place[40:]).tolist() == [5, 5, 5, 5]
    assert by_quantile(np.array([0, 0, 0, 1, 1.0]), 2, np.random.default_rng(0)).tolist() == [0, 0, 0, 1, 1]


def _events(rows: list[tuple[int, str, float | None, str | None]]) -> pl.DataFrame:
    schema = {"subject_id": pl.Int64, "code": pl.String, "numeric_value": pl.Float32, "text_value": pl.String}
    return pl.DataFrame(rows, schema=schema, orient="row").with_columns(
        pl.lit(datetime(2020, 1, 1)).alias("time"), pl.col("text_value").alias("hospital")
    )


PATIENTS = pl.Series("subject_id", [1, 2, 3])


def test_a_patient_of_two_hospitals_goes_to_one() -> None:
    """By column to the hospital of most events, of equally many to the first by name; by code to the first named."""
    rows = [(1, "b"), (1, "a"), (1, "a"), (2, "b"), (2, "a"), (3, None), (3, "c")]
    events = _events([(subject, "A", None, hospital) for subject, hospital in rows])
    assert home_by_column(events, PATIENTS, "hospital").to_list() == ["a", "a", "c"]
    assert home_by_code(events, PATIENTS, "A").to_list() == ["b", "b", "c"]


def test_a_code_names_a_hospital_by_suffix_text_or_number() -> None:
    """`SITE//x` is x; an event SITE is its text, or else its number; a longer code of that beginning is no SITE."""
    events = _events(
        [(1, "SITE//x//2", None, "no"), (2, "SITE", 3.0, "y"), (3, "SITED", 1.0, "no"), (3, "SITE", 2.5, None)]
    )
    assert home_by_code(events, PATIENTS, "SITE").to_list() == ["x//2", "y", "2.5"]
    with pytest.raises(DataError, match="2 of 3 patients have not an event `SITED`"):
        home_by_code(events, PATIENTS, "SITED")
    with pytest.raises(DataError, match=r"no column `place`; their columns are subject_id"):
        home_by_column(events, PATIENTS, "place")


def test_the_first_number_is_taken() -> None:
    """Of several numbers the first counts; without a finite one a patient has none."""
    events = _events(
        [(1, "AGE", None, None), (1, "AGE", 50.0, None), (1, "AGE", 60.0, None), (3, "AGE", float("nan"), None)]
    )
    np.testing.assert_array_equal(first_number(events, PATIENTS, "AGE"), [50.0, np.nan, np.nan])
    with pytest.raises(DataError, match="0 patients have a number under code `BMI`"):
        first_number(events, PATIENTS, "BMI")


def test_total_variation_by_hand() -> None:
    """Two sites with code shares (3/4, 1/4) and (0, 1) against pooled (3/6, 3/6) are 1/4 and 1/2 away."""
    events = _events([(1, "A", None, None)] * 3 + [(2, "B", None, None)] + [(3, "B", None, None)] * 2)
    counts = code_counts(events, PATIENTS)
    assert counts.tolist() == [[0, 0, 3], [1, 1, 1], [2, 1, 2]]
    np.testing.assert_allclose(total_variation(counts, np.array([0, 0, 1]), 2), [0.25, 0.5])
    np.testing.assert_allclose(total_variation(counts, np.array([0, 0, 0]), 1), [0.0])


def test_chance_shift_is_that_of_random_groups() -> None:
    """Sites dealt at random have on average the shift that chance gives groups of their sizes."""
    random = np.random.default_rng(0)
    counts = np.stack([np.arange(600), random.integers(0, 10, 600), np.ones(600, np.int64)], axis=1)
    sizes = np.repeat([0, 1, 2], [400, 150, 50])
    seen = np.mean([total_variation(counts, random.permutation(sizes), 3) for _ in range(400)], axis=0)
    expected = np.mean([chance_shift(counts, sizes, 3, random) for _ in range(20)], axis=0)
    np.testing.assert_allclose(seen, expected, rtol=0.05)
    assert seen[0] < seen[1] < seen[2]
