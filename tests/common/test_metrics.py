"""Metrics against scikit-learn and against loops; the cluster bootstrap against copying rows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from common.errors import ConfigurationError, DataError
from common.metrics import FloatArray, auprc, auroc, bootstrap, brier, calibration, in_the_large

Rows = list[tuple[bool, int, int]]


def _both_classes(rows: Rows) -> bool:
    return len({label for label, _, weight in rows if weight}) == 2


# Few distinct scores, so that ties are the rule, and weights of zero.
rows_with_ties = st.lists(
    st.tuples(st.booleans(), st.integers(0, 5), st.integers(0, 3)), min_size=2, max_size=40
).filter(_both_classes)


def _logit(p: FloatArray) -> FloatArray:
    return np.log(p / (1 - p))


@given(rows=rows_with_ties)
@settings(deadline=None, max_examples=200)
def test_ranking_metrics_agree_with_scikit_learn(rows: Rows) -> None:
    """AUROC and AUPRC equal scikit-learn's, with ties and with weights, zero weights included."""
    label, score, weight = map(np.array, zip(*rows, strict=True))
    assert auroc(label, score, weight) == pytest.approx(roc_auc_score(label, score, sample_weight=weight), abs=1e-12)
    assert auprc(label, score, weight) == pytest.approx(
        average_precision_score(label, score, sample_weight=weight), abs=1e-12
    )


@given(rows=rows_with_ties)
@settings(deadline=None, max_examples=100)
def test_auroc_is_the_share_of_pairs_in_order(rows: Rows) -> None:
    """AUROC is the share of (positive, negative) pairs in the right order, a tie counting one half."""
    pairs = [
        (weight_p * weight_n, 1.0 if p > n else 0.5 if p == n else 0.0)
        for is_positive, p, weight_p in rows
        if is_positive
        for is_negative, n, weight_n in rows
        if not is_negative
    ]
    expected = sum(w * v for w, v in pairs) / sum(w for w, _ in pairs)
    label, score, weight = map(np.array, zip(*rows, strict=True))
    assert auroc(label, score, weight) == pytest.approx(expected, abs=1e-12)


@given(rows=rows_with_ties)
@settings(deadline=None, max_examples=100)
def test_a_weight_is_a_number_of_copies(rows: Rows) -> None:
    """Weight 3 gives the same AUROC, AUPRC and Brier score as writing the row three times."""
    label, score, weight = map(np.array, zip(*rows, strict=True))
    probability = score / 5
    copies = np.repeat(np.arange(len(rows)), weight)
    for metric in (auroc, auprc, brier):
        assert metric(label, probability, weight) == pytest.approx(
            metric(label[copies], probability[copies]), abs=1e-12
        )


@given(rows=rows_with_ties, factor=st.floats(0.1, 10), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_ranking_ignores_scale_and_row_order(rows: Rows, factor: float, seed: int) -> None:
    """AUROC and AUPRC do not change when scores are rescaled and rows are shuffled."""
    label, score, weight = map(np.array, zip(*rows, strict=True))
    shuffled = np.random.default_rng(seed).permutation(len(rows))
    for metric in (auroc, auprc):
        assert metric(label[shuffled], factor * score[shuffled] - 7, weight[shuffled]) == pytest.approx(
            metric(label, score, weight), abs=1e-12
        )


def test_known_values_by_hand() -> None:
    """Perfect, reversed and uninformative scores have the values that the definitions give."""
    label = [0, 0, 0, 1]
    assert auroc(label, [0.1, 0.2, 0.3, 0.4]) == 1.0
    assert auroc(label, [0.4, 0.3, 0.2, 0.1]) == 0.0
    assert auroc(label, [0.5, 0.5, 0.5, 0.5]) == 0.5
    assert auprc(label, [0.5, 0.5, 0.5, 0.5]) == 0.25
    assert brier([0, 1], [0.5, 1.0]) == 0.125
    assert brier([0, 0], [0.0, 0.0]) == 0.0


def test_brier_agrees_with_scikit_learn() -> None:
    """The Brier score equals scikit-learn's, weighted and not."""
    rng = np.random.default_rng(0)
    label, probability, weight = rng.random(500) < 0.3, rng.random(500), rng.integers(0, 4, 500)
    assert brier(label, probability) == pytest.approx(brier_score_loss(label, probability), abs=1e-12)
    assert brier(label, probability, weight) == pytest.approx(
        brier_score_loss(label, probability, sample_weight=weight), abs=1e-12
    )


@pytest.mark.parametrize(("slope", "intercept"), [(1.0, 0.0), (0.5, -1.0), (2.0, 0.7), (-0.3, 0.2)])
def test_calibration_agrees_with_unpenalised_logistic_regression(slope: float, intercept: float) -> None:
    """Slope and intercept equal scikit-learn's unpenalised fit on the logit, for any miscalibration."""
    rng = np.random.default_rng(1)
    logit = rng.normal(-1.5, 1.2, 3000)
    label = rng.random(3000) < 1 / (1 + np.exp(-(intercept + slope * logit)))
    weight = rng.integers(0, 3, 3000)
    fitted = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(logit[:, None], label, sample_weight=weight)
    found = calibration(label, 1 / (1 + np.exp(-logit)), weight)
    assert found.slope == pytest.approx(fitted.coef_[0, 0], abs=1e-5)
    assert found.intercept == pytest.approx(fitted.intercept_[0], abs=1e-5)


def test_calibration_recovers_the_distortion() -> None:
    """Probabilities that are the truth get slope 1, intercept 0; distorted ones get the distortion undone."""
    rng = np.random.default_rng(2)
    truth = 1 / (1 + np.exp(-rng.normal(-1, 1.5, 200_000)))
    label = rng.random(200_000) < truth
    slope, intercept = calibration(label, truth)
    assert abs(slope - 1) < 0.03
    assert abs(intercept) < 0.03
    assert abs(in_the_large(label, truth)) < 0.03
    overconfident = 1 / (1 + np.exp(-(2 * _logit(truth) + 0.6)))  # truth = sigmoid((logit - .6) / 2)
    slope, intercept = calibration(label, overconfident)
    assert abs(slope - 0.5) < 0.02
    assert abs(intercept + 0.3) < 0.03


def test_in_the_large_moves_mean_risk_to_prevalence() -> None:
    """Shifting every logit by the value of in_the_large makes the mean risk equal the prevalence."""
    rng = np.random.default_rng(3)
    probability = rng.uniform(0.01, 0.6, 1000)
    label = rng.random(1000) < 0.05
    shifted = 1 / (1 + np.exp(-(_logit(probability) + in_the_large(label, probability))))
    assert shifted.mean() == pytest.approx(label.mean(), abs=1e-8)


@given(rows=st.lists(st.tuples(st.booleans(), st.floats(0, 1)), min_size=2, max_size=60))
@settings(deadline=None, max_examples=200)
def test_recalibration_settles_at_the_optimum(rows: list[tuple[bool, float]]) -> None:
    """For any probabilities the fit ends where the recalibrated mean is the prevalence, or says why."""
    label, probability = map(np.array, zip(*rows, strict=True))
    if label.all() or not label.any():
        return
    logit = _logit(np.clip(probability, 1e-7, 1 - 1e-7))
    shifted = 1 / (1 + np.exp(-(logit + in_the_large(label, probability))))
    assert shifted.mean() == pytest.approx(label.mean(), abs=1e-7)
    try:
        slope, intercept = calibration(label, probability)
    except DataError as error:
        assert "separates" in str(error) or "one distinct" in str(error)  # noqa: PT017 (both outcomes are right)
    else:
        residual = label - 1 / (1 + np.exp(-(intercept + slope * logit)))
        assert residual.mean() == pytest.approx(0, abs=1e-7)
        assert (residual @ logit) / len(logit) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("saturated", [0.0, 1.0])
def test_saturated_probabilities_are_taken_at_the_floor(saturated: float) -> None:
    """Probabilities of exactly 0 or 1 give finite calibration, as a saturated float32 sigmoid would need."""
    label = np.array([0, 1, 0, 1, 0, 0])
    assert np.isfinite(in_the_large(label, np.full(6, saturated)))
    assert np.all(np.isfinite(calibration(label, np.array([saturated, saturated, 0.5, 0.5, 0.4, 0.2]))))


@pytest.mark.parametrize("metric", [auroc, auprc, calibration, in_the_large])
def test_one_class_is_refused_without_counts(metric: Callable[..., object]) -> None:
    """One class of labels raises DataError that says so without a digit: counts of labels are private."""
    for label in ([0, 0, 0], [1, 1, 1]):
        with pytest.raises(DataError, match=r"labels of one class; .* needs both") as error:
            metric(label, [0.1, 0.2, 0.3])
        assert not any(character.isdigit() for character in str(error.value))


def test_one_class_by_weight_is_refused() -> None:
    """A class whose rows all have weight zero is absent."""
    with pytest.raises(DataError, match="one class"):
        auroc([0, 1, 1], [0.1, 0.2, 0.3], [0, 1, 1])


def test_unusable_input_is_refused() -> None:
    """Non-finite scores, other labels, unequal lengths, bad weights and bad probabilities raise DataError."""
    for bad in (np.nan, np.inf):
        with pytest.raises(DataError, match="finite"):
            auroc([0, 1], [0.5, bad])
    with pytest.raises(DataError, match="0 or 1"):
        auroc([0, 2], [0.5, 0.6])
    with pytest.raises(DataError, match="equally long"):
        auroc([0, 1], [0.5, 0.6, 0.7])
    for weight in ([0, 0], [-1, 2], [np.nan, 1]):
        with pytest.raises(DataError, match="weights"):
            brier([0, 1], [0.5, 0.6], weight)
    for metric in (brier, calibration, in_the_large):
        with pytest.raises(DataError, match=r"\[0, 1\]"):
            metric([0, 1], [0.5, 1.2])
    with pytest.raises(DataError, match="equally long"):
        auroc([], [0.5])


def test_calibration_without_a_finite_answer_is_refused() -> None:
    """A constant probability and one that separates the labels, ties allowed, have no slope."""
    with pytest.raises(DataError, match="one distinct probability"):
        calibration([0, 1, 1], [0.3, 0.3, 0.3])
    for probability in ([0.1, 0.2, 0.8, 0.9], [0.9, 0.8, 0.2, 0.1], [0.1, 0.5, 0.5, 0.9]):
        with pytest.raises(DataError, match="separates"):
            calibration([0, 0, 1, 1], probability)


def _visits(patients: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Patients with 1 to 6 sequences whose scores agree within the patient; the label is the patient's."""
    rng = np.random.default_rng(seed)
    owner = np.repeat(rng.permutation(patients) * 7 + 3, rng.integers(1, 7, patients))
    _, index = np.unique(owner, return_inverse=True)
    label = (rng.random(patients) < 0.3)[index]
    score = np.round(rng.normal(0, 1, patients)[index] + label + rng.normal(0, 0.1, len(owner)), 2)
    return owner, label, score


def test_bootstrap_equals_copying_the_rows_of_drawn_patients() -> None:
    """The interval equals the one from copying all rows of each drawn patient, with the same draws."""
    patient, label, score = _visits(60, seed=4)
    found = bootstrap(auroc, patient, label, score, seed=11, resamples=200)

    rng = np.random.default_rng(11)
    distinct = np.unique(patient)
    values = []
    for _ in range(200):
        drawn = distinct[rng.integers(0, len(distinct), len(distinct))]
        rows = np.concatenate([np.flatnonzero(patient == one) for one in drawn])
        values.append(roc_auc_score(label[rows], score[rows]))
    low, high = np.quantile(values, [0.025, 0.975])
    assert found.value == pytest.approx(roc_auc_score(label, score), abs=1e-12)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-12)


def test_bootstrap_resamples_patients_not_rows() -> None:
    """Five copies of each patient's row leave the interval alone; taking rows for patients narrows it."""
    rng = np.random.default_rng(5)
    label = rng.random(200) < 0.3
    score = rng.normal(0, 1, 200) + label
    patient = np.arange(200)
    once = bootstrap(auroc, patient, label, score, seed=0)
    five_times = bootstrap(auroc, patient.repeat(5), label.repeat(5), score.repeat(5), seed=0)
    rows_as_patients = bootstrap(auroc, np.arange(1000), label.repeat(5), score.repeat(5), seed=0)
    assert five_times == pytest.approx(once, abs=1e-12)
    assert (rows_as_patients.high - rows_as_patients.low) < 0.6 * (once.high - once.low)


def test_bootstrap_interval_covers_the_truth() -> None:
    """95 % intervals of a known AUROC cover it in about 95 % of 200 samples (90 % or more: 3.2 sd below)."""
    covered = 0
    for sample in range(200):
        rng = np.random.default_rng([6, sample])
        label = np.arange(300) < 90
        score = rng.normal(0, 1, 300) + label  # AUROC = Phi(1 / sqrt 2)
        interval = bootstrap(auroc, np.arange(300), label, score, seed=sample, resamples=200)
        covered += interval.low <= 0.7602499 <= interval.high
    assert covered >= 180


def test_bootstrap_is_reproducible_and_takes_any_metric() -> None:
    """Equal seeds give equal intervals, other seeds others; any function of the three arrays will do."""
    patient, label, score = _visits(80, seed=7)
    probability = 1 / (1 + np.exp(-score))

    def slope(label: FloatArray, probability: FloatArray, weight: FloatArray) -> float:
        return calibration(label, probability, weight).slope

    for metric in (auroc, auprc, brier, in_the_large, slope):
        first = bootstrap(metric, patient, label, probability, seed=1, resamples=50)
        assert first == bootstrap(metric, patient, label, probability, seed=1, resamples=50)
        assert first != bootstrap(metric, patient, label, probability, seed=2, resamples=50)
        assert first.low <= first.value <= first.high


def test_bootstrap_is_narrower_at_a_lower_level() -> None:
    """The 50 % interval lies within the 95 % interval of the same draws."""
    patient, label, score = _visits(80, seed=8)
    wide = bootstrap(auroc, patient, label, score, seed=1)
    narrow = bootstrap(auroc, patient, label, score, seed=1, level=0.5)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_bootstrap_takes_identifiers_of_any_kind() -> None:
    """Patients named by text or by large numbers give the same interval as patients numbered from zero."""
    patient, label, score = _visits(40, seed=9)
    expected = bootstrap(auroc, patient, label, score, seed=1, resamples=50)
    text = np.array([f"{identifier:06d}" for identifier in patient])
    assert bootstrap(auroc, text, label, score, seed=1, resamples=50) == expected
    assert bootstrap(auroc, patient + 2**60, label, score, seed=1, resamples=50) == expected


def test_bootstrap_refuses_an_interval_from_too_few_of_one_class() -> None:
    """One positive patient in 20 is missing from a third of the draws: no interval is given."""
    label = np.arange(20) == 0
    with pytest.raises(DataError, match="too few patients"):
        bootstrap(auroc, np.arange(20), label, np.linspace(0, 1, 20), seed=0, resamples=300)
    with pytest.raises(DataError, match="one class"):
        bootstrap(auroc, [1, 2], [0, 0], [0.1, 0.2], seed=0)


def test_bootstrap_refuses_settings_out_of_range() -> None:
    """No resamples, a level of 1 and a patient column of another length are refused by name."""
    with pytest.raises(ConfigurationError, match="resamples=0"):
        bootstrap(auroc, [1, 2], [0, 1], [0.1, 0.2], seed=0, resamples=0)
    with pytest.raises(ConfigurationError, match="level=1"):
        bootstrap(auroc, [1, 2], [0, 1], [0.1, 0.2], seed=0, level=1)
    with pytest.raises(DataError, match="one patient per row"):
        bootstrap(auroc, [1], [0, 1], [0.1, 0.2], seed=0)


def test_metrics_import_no_training_library() -> None:
    """`wardround client check` starts fast: metrics load neither torch, opacus, flwr nor scikit-learn."""
    code = "import sys, common.metrics; print(sorted({'torch', 'opacus', 'flwr', 'sklearn'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
