"""Estimates from noised histograms: without noise they are the metrics of the scores, and with it they say so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from common import metrics
from common.score_histogram import ScoreBins, histogram
from server import evaluation
from server.estimates import auprc, auroc, estimate, in_the_large, slope
from server.participation import Replies
from tests.small import small_study

BINS = ScoreBins(12, 0.2)
RANDOM = np.random.default_rng(3)


def rows(patients: int, steep: float = 1.3, shift: float = 0.4) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Labels and the middles of bins that a score fell into."""
    risk = RANDOM.normal(-1.2, 1.2, patients)
    label = (RANDOM.random(patients) < 1 / (1 + np.exp(-risk))).astype(np.float32)
    return label, BINS.middles[BINS.of(risk * steep + shift)]


def cells_of(label: NDArray[np.float32], logit: NDArray[np.float64]) -> NDArray[np.float64]:
    return histogram(BINS, np.arange(len(label)), label, logit)


def test_without_noise_they_are_the_metrics_of_the_binned_scores() -> None:
    """AUROC, AUPRC and both calibrations of a plain histogram are those of common/metrics.py, row by row."""
    label, logit = rows(3000)
    cells, risk = cells_of(label, logit)[None], 1 / (1 + np.exp(-logit))
    assert auroc(cells)[0] == pytest.approx(metrics.auroc(label, risk), abs=1e-12)
    assert auprc(cells)[0] == pytest.approx(metrics.auprc(label, risk), abs=1e-12)
    assert slope(cells, BINS.middles)[0] == pytest.approx(metrics.calibration(label, risk).slope, abs=1e-6)
    assert in_the_large(cells, BINS.middles)[0] == pytest.approx(metrics.in_the_large(label, risk), abs=1e-6)


def test_the_sum_of_sites_is_what_is_estimated() -> None:
    """Three sites' histograms count as one; the noise of the sum is that of a site times the root of three."""
    label, logit = rows(900)
    parts = [slice(0, 200), slice(200, 500), slice(500, 900)]
    told = {name: cells_of(label[part], logit[part]) for name, part in zip("cab", parts, strict=True)}
    found = estimate(told, 0.5, BINS)
    assert found.sites == ("a", "b", "c")
    assert found.noise == pytest.approx(0.5 * 3**0.5)
    assert np.allclose(found.histogram, cells_of(label, logit))
    assert found.patients.value == pytest.approx(900)
    assert found.positives.value == pytest.approx(label.sum())


def test_more_noise_makes_wider_intervals() -> None:
    """Each interval holds its estimate and grows with the noise that it is told of."""
    label, logit = rows(4000)
    cells = {"a": cells_of(label, logit)}
    little, much = estimate(cells, 0.25, BINS), estimate(cells, 12.0, BINS)
    for name in ("auroc", "auprc", "slope", "in_the_large", "patients", "positives"):
        narrow, wide = getattr(little, name), getattr(much, name)
        assert narrow.value == wide.value
        assert narrow.low < narrow.value < narrow.high
        assert wide.high - wide.low > narrow.high - narrow.low


def test_cells_below_zero_are_kept() -> None:
    """A negative cell is not counted as none: the totals are the plain sums."""
    cells = np.zeros((2, 12))
    cells[0, 3], cells[1, 8], cells[0, 11] = 200.0, 60.0, -7.0
    found = estimate({"a": cells}, 3.0, BINS)
    assert found.patients.value == 253.0
    assert found.histogram[0][11] == -7.0


def test_noise_alone_tells_nothing() -> None:
    """Without a patient in it no metric is made up: where too few redraws are defined, there is none."""
    found = estimate({"a": np.random.default_rng(2).normal(0, 4, (2, 12))}, 4.0, BINS)
    assert found.slope is None
    assert found.in_the_large is None
    for interval in (found.auroc, found.auprc):
        assert interval is None or interval.high - interval.low > 0.5


def test_the_same_histograms_give_the_same_page() -> None:
    """Redraws are seeded: nothing but the histograms decides what is written."""
    label, logit = rows(800)
    told: dict[str, Any] = {"a": cells_of(label, logit)}
    assert estimate(told, 2.0, BINS) == estimate(told, 2.0, BINS)


def test_what_is_written_says_who_did_not_answer() -> None:
    """Estimates, what the intervals cover, and a word for every site without; nobody at all is said, too."""
    study = small_study(metrics={"noise_multiplier": 2.0, "bins": 12})
    label, logit = rows(800)
    told = {"north": {"histogram": cells_of(label, logit).astype(np.float32)}}
    found = evaluation.evaluation(study, Replies(told, {"east": "POLICY"}))
    said = "\n".join(evaluation.lines(found))
    assert "metrics of north, noise 2 patients a cell" in said
    assert "east told no metrics (POLICY)" in said
    assert evaluation.COVERS in said
    empty = evaluation.evaluation(study, Replies({}, {"east": "POLICY", "north": "no reply"}))
    assert empty["metrics"] is None
    assert evaluation.lines(empty)[0] == "metrics: no hospital told any"
