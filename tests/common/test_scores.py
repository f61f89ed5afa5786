"""Estimates that exist as far as they can, on the draws of the bootstrap; net benefit and recalibration by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigurationError, DataError
from common.metrics import (
    Calibration,
    auroc,
    bootstrap,
    bootstrap_all,
    brier,
    calibration,
    net_benefit,
    recalibrate,
)
from common.scores import Estimate, calibrate, estimate, estimate_all

RANDOM = np.random.default_rng(0)
PATIENT = np.repeat(np.arange(60), 2)
RISK = RANDOM.random(120)
LABEL = (RANDOM.random(120) < RISK).astype(np.float64)

rows = st.lists(st.tuples(st.booleans(), st.floats(0, 1), st.integers(0, 3)), min_size=1, max_size=30).filter(
    lambda found: any(weight for *_, weight in found)
)


@given(rows=rows, threshold=st.floats(0.01, 0.99))
@settings(deadline=None, max_examples=100)
def test_net_benefit_is_counted(rows: list[tuple[bool, float, int]], threshold: float) -> None:
    """True positives a head less false positives a head at the threshold's odds, each row as often as its weight."""
    total = sum(weight for *_, weight in rows)
    right = sum(weight for positive, risk, weight in rows if positive and risk >= threshold)
    wrong = sum(weight for positive, risk, weight in rows if not positive and risk >= threshold)
    expected = right / total - wrong / total * threshold / (1 - threshold)
    assert net_benefit(
        *map(list, zip(*((y, p) for y, p, _ in rows), strict=True)), threshold, [w for *_, w in rows]
    ) == (pytest.approx(expected, abs=1e-9))


def test_acting_on_everybody_pays_below_the_prevalence() -> None:
    """Net benefit of everybody is zero exactly at the prevalence, above zero below it."""
    label = np.arange(10) < 3
    assert net_benefit(label, np.ones(10), 0.3) == pytest.approx(0.0, abs=1e-12)
    assert net_benefit(label, np.ones(10), 0.2) > 0 > net_benefit(label, np.ones(10), 0.4)


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.1, float("nan")])
def test_a_threshold_without_odds_is_refused(threshold: float) -> None:
    """0, 1 and what is no probability have no odds."""
    with pytest.raises(ConfigurationError, match="must lie between 0 and 1"):
        net_benefit([0, 1], [0.1, 0.9], threshold)


@given(slope=st.floats(0.5, 3), intercept=st.floats(-2, 2))  # nothing comes near 1e-7, where a logit is cut
@settings(deadline=None, max_examples=50)
def test_a_recalibration_undoes_what_calibration_finds(slope: float, intercept: float) -> None:
    """Risks that were bent by (slope, intercept) come back; the order stays; 0 and 1 do not overflow."""
    risk = np.linspace(0.05, 0.95, 40)
    bent = recalibrate(risk, Calibration(1 / slope, -intercept / slope))
    assert recalibrate(bent, Calibration(slope, intercept)) == pytest.approx(risk, abs=1e-6)
    assert np.all(np.diff(bent) > 0)
    assert np.isfinite(recalibrate([0.0, 1.0], Calibration(slope, intercept))).all()


def test_numbers_on_the_same_draws_are_those_of_their_own() -> None:
    """`bootstrap_all` of two metrics is `bootstrap` of each; so is `estimate_all` of `estimate`."""
    both = bootstrap_all(lambda *a: (auroc(*a), brier(*a)), PATIENT, LABEL, RISK, seed=3, resamples=50)
    assert both == tuple(bootstrap(one, PATIENT, LABEL, RISK, seed=3, resamples=50) for one in (auroc, brier))
    slope, intercept = estimate_all(calibration, 2, PATIENT, LABEL, RISK, 50)
    assert slope == estimate(lambda *a: calibration(*a).slope, PATIENT, LABEL, RISK, 50)
    assert intercept.low is not None


def test_a_weight_per_row_goes_into_every_draw() -> None:
    """Weights of one change nothing; weight zero is as if a row were not there."""
    plain = bootstrap(auroc, PATIENT, LABEL, RISK, seed=1, resamples=50)
    assert bootstrap(auroc, PATIENT, LABEL, RISK, seed=1, resamples=50, weight=np.ones(120)) == plain
    half = np.where(PATIENT < 30, 1.0, 0.0)
    weighted = bootstrap(auroc, PATIENT, LABEL, RISK, seed=1, resamples=50, weight=half)
    assert weighted.value == pytest.approx(auroc(LABEL[:60], RISK[:60]))


def test_what_does_not_exist_is_none() -> None:
    """No AUROC of one class; a value without an interval where draws of one class are common; neither raises."""
    assert estimate(auroc, PATIENT, np.zeros(120), RISK, 10) == Estimate(None)
    assert estimate_all(calibration, 2, PATIENT, np.zeros(120), RISK, 10) == (Estimate(None),) * 2
    one = np.zeros(120)
    one[0] = 1
    found = estimate(auroc, PATIENT, one, RISK, 100)
    assert found.value is not None
    assert found.low is found.high is None
    assert calibrate(np.zeros(120), RISK).slope is None


def test_a_probability_beyond_its_bounds_is_refused() -> None:
    """Logits passed for probabilities are noticed."""
    with pytest.raises(DataError, match="apply the sigmoid"):
        net_benefit([0, 1], [0.1, 1.9], 0.5)
    with pytest.raises(DataError, match="apply the sigmoid"):
        recalibrate([-3.0], Calibration(1.0, 0.0))
