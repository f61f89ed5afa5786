"""Metrics from noised histograms: the noise that a site adds, and how often the intervals hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from client.scoring import noised_histogram
from common.models.network import build_network
from common.privacy.randomness import Randomness
from common.score_histogram import HISTOGRAM, ScoreBins
from server.estimates import auprc, auroc, estimate, in_the_large, slope
from tests.small import small_study

TRIALS = 200
# A true coverage of .95 falls below this in one of 1e5 tests of 200 trials (binomial); .85 does in 96 of 100.
LEAST = 0.88
CASES = {  # patients of all sites, share with the label, sites, noise of each, bins
    "as in the documentation": (1500, 0.2, 4, 5.0, 10),
    "little noise": (1500, 0.2, 4, 2.0, 20),
    "rare label": (6000, 0.05, 10, 3.0, 10),
    "many patients": (20000, 0.1, 8, 5.0, 20),
}


def test_the_noise_of_a_histogram_is_what_the_study_says() -> None:
    """100,000 cells of nobody: mean 0, standard deviation the study's noise within 1 in 100, no outlier cells."""
    study = small_study(metrics={"noise_multiplier": 3.0, "bins": 50})
    plan, network = study.metrics_plan(), build_network(study)
    assert plan is not None
    told = [noised_histogram(network, None, plan, ScoreBins(50, 0.2), Randomness())[HISTOGRAM] for _ in range(1000)]
    cells = np.stack(told).astype(np.float64)
    assert abs(cells.std() / 3.0 - 1) < 0.01  # 4.5 standard errors
    assert abs(cells.mean()) < 5 * 3.0 / math.sqrt(cells.size)
    assert np.abs(cells.std(axis=0) / 3.0 - 1).max() < 0.12  # each cell over 1,000 tellings: 5.4 standard errors
    one, other = cells[:, 0, 0], cells[:, 1, 7]
    assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(len(one))


def truth(bins: ScoreBins, prevalence: float) -> NDArray[np.float64]:
    """Share of patients by label and bin, where a good score is 1.2 times too extreme: [2, bins]."""
    grid = np.linspace(-12, 12, 200_001)
    risk = grid + math.log(prevalence / (1 - prevalence)) - 0.5
    weight = np.exp(-((grid / 1.3) ** 2) / 2)
    weight /= weight.sum()
    positive, place = weight / (1 + np.exp(-risk)), bins.of(1.2 * risk)
    return np.stack([np.bincount(place, part, minlength=bins.number) for part in (weight - positive, positive)])


@pytest.mark.parametrize(
    "case", [next(iter(CASES)), *(pytest.param(c, marks=pytest.mark.full) for c in list(CASES)[1:])]
)
def test_intervals_hold_the_truth_as_often_as_they_say(case: str) -> None:
    """Patients drawn anew, noise drawn anew: 95 % intervals hold the population's metrics in at least LEAST."""
    patients, prevalence, sites, noise, number = CASES[case]
    bins = ScoreBins(number, prevalence)
    shares = truth(bins, prevalence)
    true = {
        "auroc": auroc(shares[None])[0],
        "auprc": auprc(shares[None])[0],
        "slope": slope(shares[None], bins.middles)[0],
        "in_the_large": in_the_large(shares[None], bins.middles)[0],
    }
    random = np.random.default_rng(11)
    held = dict.fromkeys(true, 0)
    for _ in range(TRIALS):
        per_site = shares * patients / sites
        told = {f"s{k}": random.poisson(per_site) + random.normal(0, noise, shares.shape) for k in range(sites)}
        found = estimate(told, noise, bins)
        for name, value in true.items():
            interval = getattr(found, name)
            held[name] += interval is not None and interval.low <= value <= interval.high
    assert {name: count for name, count in held.items() if count < LEAST * TRIALS} == {}


def test_intervals_are_wide_enough_where_patients_have_several_records() -> None:
    """Shares of 1/k vary less than whole patients: intervals then hold the truth at least as often."""
    bins = ScoreBins(10, 0.2)
    shares = truth(bins, 0.2)
    value, random, held = auroc(shares[None])[0], np.random.default_rng(4), 0
    flat = shares.ravel() / shares.sum()
    for _ in range(TRIALS):
        records = random.multinomial(4, flat, size=1500)  # four independent records: the least variance there is
        told = {"a": (records.sum(0) / 4).reshape(shares.shape) + random.normal(0, 3.0, shares.shape)}
        interval = estimate(told, 3.0, bins).auroc
        assert interval is not None
        held += interval.low <= value <= interval.high
    assert held >= LEAST * TRIALS
