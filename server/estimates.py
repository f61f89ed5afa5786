"""What a sum of noised histograms says of the federation: AUROC, AUPRC, calibration, with intervals.

The estimates are those of `common/metrics.py` on the cells as they are, negative ones included. The AUROC's two parts
and the equations that calibration solves are sums over cells, in which noise of mean zero cancels. An interval is made
of redraws: to every cell a normal number is added, of variance noise + what sampling would give (Poisson: the cell's
own count), and the middle 95 % of the estimates are taken.

What an interval covers: both the noise of the sites and the chance of who became a patient, for patients like those
held out, each counting once, over all sites that answered, pooled by how many each has; and the score as the bins see
it. It does not cover the bins' own coarseness (a score within a bin, or beyond the outer edges, is its middle), a
population that changes, or sites that did not answer. Where patients have several sequences it is too wide, not too
narrow: a share vector has no more variance than one draw from it. `tests/statistical/test_noised_metrics.py` counts
how often intervals cover.

Decisions a reader would question:

- Cells below zero are kept. To put them to zero, or to project the histogram onto what is possible, counts noise as
  patients: in our trials intervals for the slope then covered 50 to 75 % in place of 95 %.
- A metric whose redraws are undefined more than once in ten (no positives left, no slope) is reported as missing.
- The redraws are seeded: the same histograms give the same page. They protect nothing; the noise is in the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.metrics import DEFINED_SHARE, Interval
from common.score_histogram import SENSITIVITY, ScoreBins

FloatArray = NDArray[np.float64]
REDRAWS, LEVEL, SEED = 1000, 0.95, 0
NEWTON_STEPS, SETTLED, STEEPEST = 25, 1e-4, 30.0
LIMITS = {"auroc": (0.0, 1.0), "auprc": (0.0, 1.0), "slope": (-np.inf, np.inf), "in_the_large": (-np.inf, np.inf)}


@dataclass(frozen=True)
class FederatedMetrics:
    """Metrics of the sites that answered, together; a metric that the noise leaves undefined is None.

    Attributes:
        sites: who answered.
        noise: standard deviation of the noise in each cell of the sum, in patients.
        auroc, auprc: of the binned score, each patient counting once.
        slope: of the logistic recalibration; 1 is ideal, below it risks are too extreme.
        in_the_large: shift of every logit that makes mean risk and prevalence equal; 0 is ideal.
        patients, positives: noised totals of the cells, with intervals of the noise alone.
        histogram: the sum [2, bins], noise included.
    """

    sites: tuple[str, ...]
    noise: float
    auroc: Interval | None
    auprc: Interval | None
    slope: Interval | None
    in_the_large: Interval | None
    patients: Interval
    positives: Interval
    histogram: list[list[float]]

    def as_dict(self) -> dict[str, Any]:
        """As plain data; an interval is a mapping."""
        plain = asdict(self)
        return {key: value._asdict() if isinstance(value, Interval) else value for key, value in plain.items()}


def estimate(
    histograms: Mapping[str, NDArray[np.floating[Any]]], noise_multiplier: float, bins: ScoreBins
) -> FederatedMetrics:
    """Metrics of all sites' patients together.

    Args:
        histograms: site -> noised [2, bins]; at least one.
        noise_multiplier: noise of each site's cells, in patients.
        bins: of the study.
    """
    cells = np.stack([histograms[site] for site in sorted(histograms)]).astype(np.float64).sum(0)
    noise = noise_multiplier * SENSITIVITY * len(histograms) ** 0.5
    random = np.random.default_rng(SEED)
    spread = np.sqrt(noise**2 + np.maximum(cells, 0))
    redrawn = cells + spread * random.standard_normal((REDRAWS, *cells.shape))
    measures: dict[str, Callable[[FloatArray], FloatArray]] = {
        "auroc": auroc,
        "auprc": auprc,
        "slope": lambda drawn: slope(drawn, bins.middles),
        "in_the_large": lambda drawn: in_the_large(drawn, bins.middles),
    }
    found = {name: _interval(measure, cells, redrawn, *LIMITS[name]) for name, measure in measures.items()}
    half = 1.96 * noise
    return FederatedMetrics(
        sites=tuple(sorted(histograms)),
        noise=noise,
        **found,
        patients=_around(cells.sum(), half * cells.size**0.5),
        positives=_around(cells[1].sum(), half * cells[1].size ** 0.5),
        histogram=cells.tolist(),
    )


def _around(value: float, half: float) -> Interval:
    return Interval(float(value), float(value - half), float(value + half))


def _interval(
    measure: Callable[[FloatArray], FloatArray], cells: FloatArray, redrawn: FloatArray, least: float, most: float
) -> Interval | None:
    """The estimate with the middle of its redraws, cut to what is possible; None where it is not defined."""
    value, drawn = float(measure(cells[None])[0]), measure(redrawn)
    defined = drawn[np.isfinite(drawn)]
    if not np.isfinite(value) or len(defined) < DEFINED_SHARE * len(drawn):
        return None
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(*(float(np.clip(number, least, most)) for number in (value, low, high)))


def auroc(cells: FloatArray) -> FloatArray:
    """AUROC [R] of histograms [R, 2, bins]; NaN where a class has no total above zero. See `common.metrics.auroc`."""
    negative, positive = cells[:, 0], cells[:, 1]
    below = np.cumsum(negative, axis=1) - negative / 2
    return _ratio((positive * below).sum(1), _total(negative) * _total(positive))


def auprc(cells: FloatArray) -> FloatArray:
    """Average precision [R] of histograms [R, 2, bins]; NaN without positives. See `common.metrics.auprc`.

    A precision that noise has put outside [0, 1] is taken at the bound.
    """
    negative, positive = cells[:, 0, ::-1], cells[:, 1, ::-1]
    found = np.cumsum(positive, axis=1)
    flagged = found + np.cumsum(negative, axis=1)
    precision = np.clip(np.divide(found, flagged, out=np.zeros_like(flagged), where=flagged > 0), 0, 1)
    return _ratio((positive * precision).sum(1), _total(positive))


def slope(cells: FloatArray, logit: FloatArray) -> FloatArray:
    """Slope [R] of the logistic recalibration of histograms [R, 2, bins]; NaN where there is none."""
    total, positive = cells.sum(1), cells[:, 1]
    centre = _ratio((np.maximum(total, 0) * logit).sum(1), np.maximum(total, 0).sum(1))[:, None]
    x = logit - centre
    level, steep = _logit_of(_ratio(positive.sum(1), total.sum(1))), np.ones(len(cells))
    moved = np.full(len(cells), np.inf)
    for _ in range(NEWTON_STEPS):
        risk = _sigmoid(level[:, None] + steep[:, None] * x)
        missing, weight = positive - total * risk, total * risk * (1 - risk)
        a, b, c = weight.sum(1), (weight * x).sum(1), (weight * x**2).sum(1)
        g, h = missing.sum(1), (missing * x).sum(1)
        curvature = np.where((a > 0) & (a * c > b * b), a * c - b * b, np.nan)  # NaN stays: no maximum near
        step = np.stack([c * g - b * h, a * h - b * g]) / curvature
        step /= np.maximum(1, np.abs(step).max(0))
        level, steep, moved = level + step[0], steep + step[1], np.abs(step).max(0)
        if not (moved >= SETTLED).any():
            break
    return np.where((moved < SETTLED) & (np.abs(steep) < STEEPEST), steep, np.nan)


def in_the_large(cells: FloatArray, logit: FloatArray) -> FloatArray:
    """Calibration-in-the-large [R] of histograms [R, 2, bins]; NaN where there is none."""
    total, positive = cells.sum(1), cells[:, 1].sum(1)
    shift, moved = np.zeros(len(cells)), np.full(len(cells), np.inf)
    for _ in range(NEWTON_STEPS):
        risk = _sigmoid(logit + shift[:, None])
        weight = (total * risk * (1 - risk)).sum(1)
        moved = np.clip(_ratio(positive - (total * risk).sum(1), weight), -1, 1)
        shift = shift + moved
        if not (np.abs(moved) >= SETTLED).any():
            break
    return np.where((np.abs(moved) < SETTLED) & (np.abs(shift) < STEEPEST), shift, np.nan)


def _total(counts: FloatArray) -> FloatArray:
    """Sum over the bins [R]; NaN where it is not above zero."""
    total = counts.sum(1)
    return np.where(total > 0, total, np.nan)


def _ratio(above: FloatArray, below: FloatArray) -> FloatArray:
    """NaN where the denominator is not above zero."""
    return above / np.where(below > 0, below, np.nan)


def _sigmoid(logit: FloatArray) -> FloatArray:
    return 0.5 * (1 + np.tanh(logit / 2))


def _logit_of(probability: FloatArray) -> FloatArray:
    inside = np.clip(probability, 1e-3, 1 - 1e-3)
    return np.log(inside / (1 - inside))
