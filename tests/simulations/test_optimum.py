"""The best possible scores: by hand, and as means over labels drawn again and again."""

from __future__ import annotations

import numpy as np
import pytest

from common.errors import DataError
from common.metrics import auprc, auroc, brier
from simulations.optimum import best_possible, best_possible_auprc, best_possible_brier, optimum


def test_the_optimum_is_the_mean_over_redrawn_labels() -> None:
    """All three analytic optima agree with the probability's own scores averaged over labels drawn from it."""
    rng = np.random.default_rng(0)
    p = np.round(rng.beta(1, 5, 400), 2)  # ties
    labels = rng.random((2000, 400)) < p
    best = optimum(p)
    for score, value in ((auroc, best.auroc), (auprc, best.auprc), (brier, best.brier)):
        drawn = [score(label, p) for label in labels]
        slack = 3e-3 if score is auprc else 5e-4  # ratio of means against mean of ratios
        assert abs(value - np.mean(drawn)) < 4 * np.std(drawn) / np.sqrt(2000) + slack


def test_best_possible_by_hand() -> None:
    """Two patients of probability .2 and .6: right order .6 x .8, wrong order .2 x .4."""
    assert best_possible([0.2, 0.6]) == pytest.approx(0.48 / (0.48 + 0.08))
    assert best_possible([0.3, 0.3, 0.3]) == pytest.approx(0.5)
    assert best_possible([0.0, 0.0, 1.0]) == pytest.approx(1.0)
    for impossible in ([], [0.4], [0.0, 0.0], [0.5, 1.5], [0.5, np.nan]):
        with pytest.raises(DataError):
            best_possible(impossible)


def test_best_possible_auprc_by_hand() -> None:
    """Patients of .6 and .2: the first adds .6 x 1, the second .2 x (1 + .6) / 2, over .8; ties share a threshold."""
    assert best_possible_auprc([0.2, 0.6]) == pytest.approx((0.6 + 0.2 * 1.6 / 2) / 0.8)
    assert best_possible_auprc([0.3, 0.3]) == pytest.approx((1 + 0.3) / 2)
    assert best_possible_auprc([0.0, 0.0, 1.0]) == pytest.approx(1.0)
    for impossible in ([], [0.0, 0.0], [1.0], [0.5, 1.5], [0.5, np.nan], [[0.5]]):
        with pytest.raises(DataError):
            best_possible_auprc(impossible)


def test_best_possible_brier_by_hand() -> None:
    """The mean of p (1 - p); a certain future has Brier score 0."""
    assert best_possible_brier([0.2, 0.6]) == pytest.approx((0.16 + 0.24) / 2)
    assert best_possible_brier([0.0, 1.0]) == 0
    for impossible in ([], [-0.1], [np.nan]):
        with pytest.raises(DataError):
            best_possible_brier(impossible)


def test_no_other_score_does_better() -> None:
    """On the same labels, noised probabilities score worse on average by every measure."""
    rng = np.random.default_rng(1)
    p = rng.beta(1, 4, 3000)
    other = np.clip(p + 0.1 * rng.standard_normal(3000), 0, 1)
    labels = rng.random((30, 3000)) < p
    assert np.mean([auroc(label, p) - auroc(label, other) for label in labels]) > 0
    assert np.mean([auprc(label, p) - auprc(label, other) for label in labels]) > 0
    assert np.mean([brier(label, p) - brier(label, other) for label in labels]) < 0
