"""Discrimination, calibration and their intervals, for sequences grouped by patient.

Decisions a reader may question:

- AUROC and AUPRC are written here instead of taken from scikit-learn (which is their oracle in the tests):
  one resample of the bootstrap is then a weight per row and two cumulative sums, about 1 ms for 17,600 rows,
  and the point estimate and its interval come from the same lines.
- AUPRC is average precision (step-wise sum), not the trapezoid under the curve: linear interpolation between
  points of a precision-recall curve is too optimistic (Davis and Goadrich, ICML 2006).
- The interval is the percentile one of the patient-level bootstrap, the convention of the clinical
  benchmarks. Resampling rows would be narrower and wrong wherever a patient has several sequences.
- Metrics are computed where the patients are. They are not covered by epsilon; whether a number may leave a
  site is the site policy's decision, not this file's. Messages therefore never carry counts of labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from common.errors import ConfigurationError, DataError

FloatArray = npt.NDArray[np.float64]
Metric = Callable[[FloatArray, FloatArray, FloatArray], float]
"""A metric that `bootstrap` can resample: (label [N], score [N], weight [N]) -> number."""
Metrics = Callable[[FloatArray, FloatArray, FloatArray], Sequence[float]]
"""Several numbers of the same rows at once, such as `calibration`, for `bootstrap_all`."""

PROBABILITY_FLOOR = 1e-7  # a float32 sigmoid saturates at 0 or 1; its logit is then taken at this distance
DEFINED_SHARE = 0.9  # an interval from fewer defined resamples than this would describe another population
NEWTON_STEPS = 100
LONGEST_STEP = 4.0
CONVERGED = 1e-13  # log-likelihood per row still to gain; the last step brings parameters far below 1e-6


class Interval(NamedTuple):
    """A metric with its bootstrap interval."""

    value: float
    low: float
    high: float


class Calibration(NamedTuple):
    """Logistic recalibration `logit P(label) = intercept + slope * logit(probability)`; ideal is (1, 0)."""

    slope: float
    intercept: float


def auroc(label: npt.ArrayLike, score: npt.ArrayLike, weight: npt.ArrayLike | None = None) -> float:
    """Area under the ROC curve: P(score of a positive > score of a negative), ties count one half.

    Args:
        label: 0/1 or boolean, [N].
        score: Any finite number that grows with risk, [N].
        weight: How often each row counts, [N], >= 0; None counts each once.

    Raises:
        DataError: labels of one class, non-finite scores, or arrays that do not fit together.

    Source: Hanley and McNeil, Radiology 143 (1982): the Mann-Whitney form.
    """
    positive, negative = _by_distinct_score(*_checked(label, score, weight), name="AUROC")
    below = np.cumsum(negative) - negative
    return float(positive @ (below + negative / 2) / (positive.sum() * negative.sum()))


def auprc(label: npt.ArrayLike, score: npt.ArrayLike, weight: npt.ArrayLike | None = None) -> float:
    """Average precision: precision at each distinct threshold, weighted by the recall gained there.

    Arguments and errors as `auroc`. A score without information gets the prevalence.
    """
    positive, negative = _by_distinct_score(*_checked(label, score, weight), name="AUPRC")
    positive, negative = positive[::-1], negative[::-1]  # thresholds from the highest score down
    true_positives = np.cumsum(positive)
    flagged = true_positives + np.cumsum(negative)
    precision = np.divide(true_positives, flagged, out=np.zeros_like(flagged), where=flagged > 0)
    return float(positive @ precision / true_positives[-1])


def brier(label: npt.ArrayLike, probability: npt.ArrayLike, weight: npt.ArrayLike | None = None) -> float:
    """Mean squared distance between label [N] and probability [N] (Brier 1950): 0 is perfect.

    Labels of one class are allowed; arguments as `calibration`.

    Raises:
        DataError: probabilities outside [0, 1], or arrays that do not fit together.
    """
    label, probability, weight = _checked(label, probability, weight)
    _check_probability(probability)
    return float(weight @ (label - probability) ** 2 / weight.sum())


def calibration(label: npt.ArrayLike, probability: npt.ArrayLike, weight: npt.ArrayLike | None = None) -> Calibration:
    """Slope and intercept of the logistic recalibration, both free (Cox, Biometrika 45, 1958).

    Slope < 1: the risks are too extreme (over-fitted); intercept < 0 at slope 1: they are too high.
    Probabilities closer to 0 or 1 than 1e-7 are taken at that distance. Fitted without a penalty by Newton
    steps.

    Args:
        label: 0/1 or boolean, [N].
        probability: Predicted P(label = 1), [N], in [0, 1].
        weight: How often each row counts, [N], >= 0; None counts each once.

    Raises:
        DataError: labels of one class, one distinct probability, labels that the probability separates
            without error (the slope has no bound), probabilities outside [0, 1], or arrays that do not fit
            together.
    """
    label, probability, weight = _checked(label, probability, weight)
    logit = _logit(probability)
    _check_both_classes(label, weight, "calibration slope")
    counted = logit[weight > 0]
    if counted.max() == counted.min():
        raise DataError("one distinct probability; the calibration slope needs at least two: report in_the_large")
    if _separated(label[weight > 0], counted):
        raise DataError("the probability separates the labels; the calibration slope has no bound: use more patients")
    center = float(weight @ logit / weight.sum())
    spread = float(np.sqrt(weight @ (logit - center) ** 2 / weight.sum()))
    design = np.stack([np.ones_like(logit), (logit - center) / spread])
    level, steepness = _fit_logistic(design, label, weight, offset=np.zeros_like(logit))
    slope = float(steepness / spread)
    return Calibration(slope=slope, intercept=float(level) - slope * center)


def in_the_large(label: npt.ArrayLike, probability: npt.ArrayLike, weight: npt.ArrayLike | None = None) -> float:
    """Calibration-in-the-large: the shift of every logit that makes the mean risk equal the prevalence.

    Positive: more patients have the label than was predicted. Arguments and errors as `calibration`, except
    that one distinct probability and separated labels are allowed.
    """
    label, probability, weight = _checked(label, probability, weight)
    logit = _logit(probability)
    _check_both_classes(label, weight, "calibration-in-the-large")
    (shift,) = _fit_logistic(np.ones((1, len(label))), label, weight, offset=logit)
    return float(shift)


def recalibrate(probability: npt.ArrayLike, by: Calibration) -> FloatArray:
    """Probabilities [N] after the logistic recalibration `by`; a positive slope keeps their order.

    Raises:
        DataError: probabilities outside [0, 1].
    """
    logit = by.intercept + by.slope * _logit(np.asarray(probability, dtype=np.float64))
    recalibrated: FloatArray = 0.5 * (1 + np.tanh(logit / 2))
    return recalibrated


def net_benefit(
    label: npt.ArrayLike, probability: npt.ArrayLike, threshold: float, weight: npt.ArrayLike | None = None
) -> float:
    """Net benefit of treating whoever has a risk of `threshold` or more: true positives less weighted false ones.

    Whoever treats at a risk of 10 % accepts nine treated in vain for one in need, so a false positive costs 1/9 of a
    true one: TP/n - FP/n * threshold / (1 - threshold). Treating nobody has net benefit 0. Labels of one class are
    allowed.

    Args:
        label: 0/1 or boolean, [N].
        probability: predicted P(label = 1), [N]; all ones is the net benefit of treating everybody.
        threshold: in (0, 1).
        weight: How often each row counts, [N], >= 0; None counts each once.

    Raises:
        DataError: probabilities outside [0, 1], or arrays that do not fit together.
        ConfigurationError: a threshold that cannot be.

    Source: Vickers and Elkin, Medical Decision Making 26 (2006), decision curve analysis.
    """
    if not 0 < threshold < 1:
        raise ConfigurationError(f"threshold={threshold} must lie between 0 and 1")
    label, probability, weight = _checked(label, probability, weight)
    _check_probability(probability)
    gained = np.where(label == 1, 1.0, -threshold / (1 - threshold))
    return float(weight @ (gained * (probability >= threshold)) / weight.sum())


def bootstrap(
    metric: Metric,
    patient: npt.ArrayLike,
    label: npt.ArrayLike,
    score: npt.ArrayLike,
    *,
    seed: int,
    weight: npt.ArrayLike | None = None,
    resamples: int = 1000,
    level: float = 0.95,
) -> Interval:
    """A metric with its percentile interval over resampled patients (cluster bootstrap).

    Patients are drawn with replacement and all sequences of a drawn patient come along together, so sequences
    of one patient are never treated as independent. A draw is a weight per row (how often its patient was
    drawn), not a copy of rows; rows are sorted by score once, which makes the sort inside `auroc` and `auprc`
    linear.

    Draws for which the metric is undefined (labels of one class) are left out; the interval is refused when
    more than one in ten are, because it would then describe only the draws that happened to work.

    Args:
        metric: `auroc`, `auprc`, `brier`, `in_the_large`, or any function of (label, score, weight).
        patient: Patient of each row, any sortable identifiers, [N].
        label: 0/1 or boolean, [N].
        score: Score or probability, as the metric wants it, [N].
        seed: Makes the interval reproducible; it protects nothing, a metric is not a private release.
        weight: How much each row counts, [N], >= 0, such as one over the number of its patient's rows, which makes
            every patient count once; None counts each row once.
        resamples: Number of draws.
        level: Coverage, in (0, 1).

    Raises:
        DataError: the metric is undefined on the data itself or on more than one draw in ten, or the arrays
            do not fit together.
        ConfigurationError: `resamples` or `level` out of range.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), ch. 13 (percentile interval);
    Field and Welsh, J. R. Stat. Soc. B 69 (2007) (clusters).
    """
    (found,) = bootstrap_all(
        lambda *rows: (metric(*rows),),
        patient,
        label,
        score,
        seed=seed,
        weight=weight,
        resamples=resamples,
        level=level,
    )
    return found


def bootstrap_all(
    metrics: Metrics,
    patient: npt.ArrayLike,
    label: npt.ArrayLike,
    score: npt.ArrayLike,
    *,
    seed: int,
    weight: npt.ArrayLike | None = None,
    resamples: int = 1000,
    level: float = 0.95,
) -> tuple[Interval, ...]:
    """`bootstrap` of several numbers on the same draws; a draw counts if all of them are defined on it."""
    if resamples < 1:
        raise ConfigurationError(f"resamples={resamples} must be at least 1; 1000 is customary")
    if not 0 < level < 1:
        raise ConfigurationError(f"level={level} must lie between 0 and 1; 0.95 is customary")
    label, score, weight = _checked(label, score, weight)
    identifiers = np.asarray(patient)
    if identifiers.shape != label.shape:
        raise DataError("patient and label must be equally long; give one patient per row")
    values = metrics(label, score, weight)

    order = np.argsort(score, kind="stable")
    label, score, weight = label[order], score[order], weight[order]
    distinct, owner = np.unique(identifiers[order], return_inverse=True)
    patients = len(distinct)
    random = np.random.default_rng(seed)
    drawn: list[Sequence[float]] = []
    for _ in range(resamples):
        times = np.bincount(random.integers(0, patients, patients), minlength=patients).astype(np.float64)
        try:
            drawn.append(metrics(label, score, weight * times[owner]))
        except DataError:
            continue
    if len(drawn) < DEFINED_SHARE * resamples:
        raise DataError(
            f"the metric is undefined on more than {1 - DEFINED_SHARE:.0%} of {resamples} resamples; "
            "there are too few patients with one of the labels for an interval: report the value alone"
        )
    low, high = np.quantile(np.array(drawn), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return tuple(Interval(*map(float, one)) for one in zip(values, low, high, strict=True))


def _checked(
    label: npt.ArrayLike, score: npt.ArrayLike, weight: npt.ArrayLike | None
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """The three as float64 [N] that fit together, or DataError."""
    labels = np.asarray(label, dtype=np.float64)
    scores = np.asarray(score, dtype=np.float64)
    weights = np.ones_like(scores) if weight is None else np.asarray(weight, dtype=np.float64)
    if labels.ndim != 1 or labels.shape != scores.shape or labels.shape != weights.shape:
        raise DataError("label, score and weight must be one-dimensional and equally long; pass one number per row")
    if not np.all((labels == 0) | (labels == 1)):
        raise DataError("labels must be 0 or 1; map other values before scoring")
    if not np.all(np.isfinite(scores)):
        raise DataError("scores must be finite; the model produced NaN or infinity")
    if not np.all(np.isfinite(weights) & (weights >= 0)) or weights.sum() <= 0:
        raise DataError("weights must be finite, not negative and not all zero; pass at least one row that counts")
    return labels, scores, weights


def _check_both_classes(label: FloatArray, weight: FloatArray, name: str) -> None:
    counted = label[weight > 0]
    if counted.min() == counted.max():
        raise DataError(f"labels of one class; {name} needs both")


def _check_probability(probability: FloatArray) -> None:
    if not np.all((probability >= 0) & (probability <= 1)):
        raise DataError("probabilities must lie in [0, 1]; apply the sigmoid to logits first")


def _by_distinct_score(
    label: FloatArray, score: FloatArray, weight: FloatArray, *, name: str
) -> tuple[FloatArray, FloatArray]:
    """Weight of positives and of negatives at each distinct score, from the lowest score up."""
    _check_both_classes(label, weight, name)
    order = np.argsort(score, kind="stable")  # linear when the rows come sorted already
    score, positive, weight = score[order], (weight * label)[order], weight[order]
    starts = np.flatnonzero(np.concatenate([[True], score[1:] != score[:-1]]))
    positives = np.add.reduceat(positive, starts)
    return positives, np.add.reduceat(weight - positive, starts)


def _logit(probability: FloatArray) -> FloatArray:
    _check_probability(probability)
    inside = np.clip(probability, PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
    return np.log(inside) - np.log1p(-inside)


def _separated(label: FloatArray, logit: FloatArray) -> bool:
    """Whether a threshold on the logit parts the labels, either way round; ties at the threshold allowed."""
    positive, negative = logit[label == 1], logit[label == 0]
    return bool(positive.min() >= negative.max() or negative.min() >= positive.max())


def _fit_logistic(design: FloatArray, label: FloatArray, weight: FloatArray, *, offset: FloatArray) -> FloatArray:
    """Maximum likelihood of label ~ sigmoid(offset + beta @ design), design [K, N] -> beta [K].

    Newton steps, each at most LONGEST_STEP (on a saturated sigmoid the curvature vanishes and a full step
    would leap past the optimum) and halved until the likelihood, which is concave, does not fall.
    """
    beta = np.zeros(len(design))
    likelihood = _log_likelihood(offset, label, weight)
    for _ in range(NEWTON_STEPS):
        risk = 0.5 * (1 + np.tanh((offset + beta @ design) / 2))
        gradient = design @ (weight * (label - risk))
        curvature = (design * (weight * risk * (1 - risk))) @ design.T
        step = np.linalg.solve(curvature, gradient)
        if gradient @ step < CONVERGED * weight.sum():  # twice the likelihood that is still to gain
            return beta + step
        step *= min(1.0, LONGEST_STEP / np.max(np.abs(step)))
        while (climbed := _log_likelihood(offset + (beta + step) @ design, label, weight)) < likelihood:
            step /= 2
        beta, likelihood = beta + step, climbed
    raise DataError(f"recalibration did not settle in {NEWTON_STEPS} steps; the labels are nearly separated")


def _log_likelihood(logit: FloatArray, label: FloatArray, weight: FloatArray) -> float:
    """Bernoulli log-likelihood without overflow."""
    return float(weight @ (label * logit - np.logaddexp(0, logit)))
