"""What predictions are judged by, as plain numbers: metrics with intervals, calibration in bins, net benefit.

Simulations and hospitals use the same functions, so that a hospital's own numbers mean what the study's report means.
A number that does not exist is None, never NaN: too few patients are no reason to stop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common import metrics
from common.errors import DataError
from common.metrics import FloatArray

MIN_EVENTS = 10  # below so many positives, or negatives, a group is not shown
BINS, LEAST_IN_BIN = 10, 20
WILSON_Z = 1.96


@dataclass(frozen=True)
class Estimate:
    """A metric on held-out patients with its 95 % interval over resampled patients.

    Attributes:
        value: None where it is undefined (labels of one class).
        low, high: None where the patients are too few for an interval.
    """

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Bin:
    """A calibration bin: equally many held-out sequences of neighbouring predicted risk.

    `low` and `high` are Wilson's 95 % interval of `observed`; `positives / sequences` is `observed`.
    """

    sequences: int
    predicted: float
    observed: float
    low: float
    high: float


@dataclass(frozen=True)
class CalibrationRow:
    """Calibration on all held-out patients; slope and intercept are None where they have no value (see metrics)."""

    bins: tuple[Bin, ...]
    slope: float | None
    intercept: float | None
    in_the_large: float | None


def estimate(
    metric: metrics.Metric,
    patient: npt.ArrayLike,
    label: npt.NDArray[np.floating],
    probability: FloatArray,
    resamples: int,
    weight: FloatArray | None = None,
) -> Estimate:
    """A metric with its interval, or as much of it as exists: a small site is no reason to stop.

    Args:
        metric: as for `metrics.bootstrap`.
        patient: patient of each sequence, [N].
        label: 0 or 1, [N].
        probability: predicted risk, [N].
        resamples: number of draws.
        weight: how much each sequence counts, [N]; None counts each once.
    """
    (found,) = estimate_all(lambda *rows: (metric(*rows),), 1, patient, label, probability, resamples, weight)
    return found


def estimate_all(
    several: metrics.Metrics,
    count: int,
    patient: npt.ArrayLike,
    label: npt.NDArray[np.floating],
    probability: FloatArray,
    resamples: int,
    weight: FloatArray | None = None,
) -> tuple[Estimate, ...]:
    """`estimate` of `count` numbers on the same draws."""
    try:
        found = metrics.bootstrap_all(several, patient, label, probability, weight=weight, resamples=resamples, seed=0)
        return tuple(Estimate(*one) for one in found)
    except DataError:
        once = np.ones(len(label)) if weight is None else weight
        try:
            return tuple(map(Estimate, several(label.astype(np.float64), probability, once)))
        except DataError:
            return (Estimate(None),) * count


def calibrate(label: npt.ArrayLike, probability: FloatArray) -> CalibrationRow:
    """Calibration of [N] predictions; equal ones share a bin, so that there may be fewer than BINS.

    Wilson's interval takes sequences as independent: too narrow where patients have several.
    """
    labels = np.asarray(label, dtype=np.float64)
    wanted = max(1, min(BINS, len(labels) // LEAST_IN_BIN))
    edges = np.quantile(probability, np.arange(1, wanted) / wanted)
    place = np.searchsorted(edges, probability, side="left")
    bins = tuple(_bin(labels[place == b], probability[place == b]) for b in np.unique(place))
    return CalibrationRow(bins, *_recalibrated(labels, probability))


def _recalibrated(label: FloatArray, probability: FloatArray) -> tuple[float | None, float | None, float | None]:
    """Slope, intercept and calibration in the large, as far as they exist."""
    try:
        large = metrics.in_the_large(label, probability)
    except DataError:
        return None, None, None
    try:
        return *metrics.calibration(label, probability), large
    except DataError:
        return None, None, large


def _bin(label: FloatArray, probability: FloatArray) -> Bin:
    n, observed = len(label), float(label.mean())
    spread = WILSON_Z**2 / n
    centre = (observed + spread / 2) / (1 + spread)
    half = math.sqrt(observed * (1 - observed) * spread + spread**2 / 4) / (1 + spread)
    return Bin(n, float(probability.mean()), observed, max(0.0, centre - half), min(1.0, centre + half))
