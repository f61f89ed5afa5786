"""How good the predictions are on this hospital's own held-out patients, as plain numbers.

Exact statistics of patients, which no epsilon covers: for this hospital alone. Intervals are percentile ones over
resampled patients (`common.metrics.bootstrap`).

A group with fewer than LEAST_PATIENTS patients, or fewer than MIN_EVENTS labels of one kind, gets no number at all:
what is not in an Evaluation cannot be shown by mistake.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common import metrics
from common.groups import Grouping, members
from common.metrics import FloatArray
from common.scores import MIN_EVENTS, CalibrationRow, Estimate, calibrate, estimate, estimate_all

if TYPE_CHECKING:
    from client.prediction.asked import Asked
    from common.schema import FeatureSchema

LEAST_PATIENTS = 50
THRESHOLDS = 20  # the decision curve has one fewer points


@dataclass(frozen=True)
class Scores:
    """All metrics of some held-out patients.

    Attributes:
        patients, predictions: how many; a patient may have several predictions.
        positives: predictions whose label is true; `prevalence` is their share.
        mean_risk: mean predicted risk.
        flagged_positives: share of the positives that `predicted_boolean_value` flags (sensitivity); None without any.
        flagged_negatives: share of the negatives that it flags (false alarms); None without any.
    """

    patients: int
    predictions: int
    positives: int
    prevalence: float
    mean_risk: float
    flagged_positives: float | None
    flagged_negatives: float | None
    auroc: Estimate
    auprc: Estimate
    brier: Estimate
    slope: Estimate
    intercept: Estimate
    in_the_large: Estimate


@dataclass(frozen=True)
class GroupScores:
    """One group; `scores` is None where it is too small to be shown."""

    attribute: str
    group: str
    scores: Scores | None


@dataclass(frozen=True)
class Benefit:
    """Net benefit at one threshold: of the model, and of treating everybody. Nobody treated has 0."""

    threshold: float
    model: Estimate
    everybody: float


@dataclass(frozen=True)
class Evaluation:
    """Everything about the held-out patients.

    Attributes:
        overall: every prediction counts once.
        each_patient_once: as `overall` with the predictions of a patient weighing one together; None where no patient
            has several.
        enough: whether there are as many patients and labels as a group needs to be shown.
        threshold: from which risk on a patient is flagged.
    """

    overall: Scores
    each_patient_once: Scores | None
    enough: bool
    threshold: float
    calibration: CalibrationRow
    decisions: tuple[Benefit, ...]
    groups: tuple[GroupScores, ...]


def evaluate(
    schema: FeatureSchema,
    groupings: Mapping[str, Grouping],
    asked: Asked,
    probability: FloatArray,
    *,
    threshold: float,
    resamples: int,
) -> Evaluation:
    """Judge the predictions of the held-out patients.

    Args:
        schema: by which groups are told apart.
        groupings: attribute -> its groups.
        asked: S sequences, at least one of them held out.
        probability: [S].
        threshold: from which risk on a patient is flagged.
        resamples: draws behind each interval.
    """
    mine = asked.held_out
    patient, risk = asked.sequences.patient[mine], probability[mine]
    label = asked.sequences.label[mine].astype(np.float64)
    several = len(np.unique(patient)) < len(patient)
    weight = 1.0 / np.bincount(patient)[patient]
    groups = []
    for attribute, grouping in groupings.items():
        for group, of_it in members(schema, grouping, [asked.sequences]).items():
            chosen = of_it[mine]
            part = patient[chosen], label[chosen], risk[chosen]
            shown = _scores(*part, threshold, resamples) if enough(*part[:2]) else None
            groups.append(GroupScores(attribute, group, shown))
    return Evaluation(
        overall=_scores(patient, label, risk, threshold, resamples),
        each_patient_once=_scores(patient, label, risk, threshold, resamples, weight) if several else None,
        enough=enough(patient, label),
        threshold=threshold,
        calibration=calibrate(label, risk),
        decisions=_decisions(patient, label, risk, resamples),
        groups=tuple(groups),
    )


def enough(patient: ArrayLike, label: NDArray[np.floating]) -> bool:
    """Whether a group of sequences ([n] patients and labels) is large enough to be shown."""
    positives = int(label.sum())
    return len(np.unique(patient)) >= LEAST_PATIENTS and min(positives, len(label) - positives) >= MIN_EVENTS


def _scores(
    patient: NDArray[np.int64],
    label: FloatArray,
    risk: FloatArray,
    threshold: float,
    resamples: int,
    weight: FloatArray | None = None,
) -> Scores:
    def flagged(value: int) -> float | None:
        mine = label == value
        shares = None if weight is None else weight[mine]
        return float(np.average(risk[mine] >= threshold, weights=shares)) if mine.any() else None

    def of(metric: metrics.Metric) -> Estimate:
        return estimate(metric, patient, label, risk, resamples, weight)

    slope, intercept = estimate_all(metrics.calibration, 2, patient, label, risk, resamples, weight)
    return Scores(
        patients=len(np.unique(patient)),
        predictions=len(label),
        positives=int(label.sum()),
        prevalence=float(np.average(label, weights=weight)),
        mean_risk=float(np.average(risk, weights=weight)),
        flagged_positives=flagged(1),
        flagged_negatives=flagged(0),
        auroc=of(metrics.auroc),
        auprc=of(metrics.auprc),
        brier=of(metrics.brier),
        slope=slope,
        intercept=intercept,
        in_the_large=of(metrics.in_the_large),
    )


def _decisions(patient: NDArray[np.int64], label: FloatArray, risk: FloatArray, resamples: int) -> tuple[Benefit, ...]:
    """The decision curve, up to a risk that is at least three times the usual one."""
    top = next(top for top in (0.1, 0.2, 0.5, 1.0) if top >= min(1.0, 3 * label.mean()))
    thresholds = [round(top * step / THRESHOLDS, 4) for step in range(1, THRESHOLDS)]

    def benefits(y: FloatArray, p: FloatArray, w: FloatArray) -> list[float]:
        return [metrics.net_benefit(y, p, threshold, w) for threshold in thresholds]

    model = estimate_all(benefits, len(thresholds), patient, label, risk, resamples)
    everybody = benefits(label, np.ones(len(label)), np.ones(len(label)))
    return tuple(map(Benefit, thresholds, model, everybody))
