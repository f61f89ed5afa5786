"""The laws of sample and noise, on fresh entropy: each test states its chance of a false alarm.

Every test's total stays below 1e-6. Where a test exists to catch a defect, the same statistic is shown to catch it.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]  # publishes no stubs

from common.privacy.randomness import Randomness

ALARM = 1e-7
COUNT = 1_000_000

Numbers = NDArray[np.float64]


def variance_score(numbers: Numbers, deviation: float) -> float:
    """How far the sum of squares is from a chi-square's mean, in its standard deviations (about normal)."""
    return float((np.sum((numbers / deviation) ** 2) - len(numbers)) / math.sqrt(2 * len(numbers)))


def correlation_score(one: Numbers, other: Numbers) -> float:
    """The sum of products of two independent standard normal samples, in its standard deviations."""
    return float(np.dot(one, other) / math.sqrt(len(one)))


def test_normals_are_normal() -> None:
    """A million normals pass Kolmogorov and Smirnov's test (false alarm 1e-7); a scale wrong by 5 % would not."""
    normals = Randomness().normal(COUNT)
    assert stats.kstest(normals, "norm").pvalue > ALARM
    assert stats.kstest(1.05 * normals, "norm").pvalue < ALARM


def test_the_scale_of_normals_is_one() -> None:
    """The variance is 1 (false alarm 6e-7); one wrong by 1 % in scale lies over 8 standard deviations away."""
    normals = Randomness().normal(COUNT)
    assert abs(variance_score(normals, 1.0)) < 5
    assert abs(variance_score(0.99 * normals, 1.0)) > 8
    assert abs(variance_score(1.01 * normals, 1.0)) > 8


def test_mean_and_tails_of_normals() -> None:
    """Mean 0, and beyond 3 and 4 standard deviations as many as there should be, on each side (false alarm 5e-7)."""
    normals = Randomness().normal(COUNT)
    assert abs(normals.sum()) / math.sqrt(COUNT) < stats.norm.isf(ALARM / 2)
    for bound in (3.0, 4.0):
        for side in (normals, -normals):
            beyond = int(np.sum(side > bound))
            law = stats.binom(COUNT, stats.norm.sf(bound))
            assert min(law.cdf(beyond), law.sf(beyond - 1)) > ALARM / 2


def test_normals_do_not_depend_on_each_other() -> None:
    """Calls, objects, neighbours, and the two halves of each pair are uncorrelated, also in size (false alarm 8e-7)."""
    source = Randomness()
    size = 1 << 16  # one block: the second half are the sines to the cosines of the first
    one, other = source.normal(size), source.normal(size)
    elsewhere = Randomness().normal(size)
    half = size // 2
    pairs = [(one, other), (one, elsewhere), (one[1:], one[:-1]), (one[:half], one[half:])]
    bound = stats.norm.isf(ALARM / 4)
    for first, second in pairs:
        assert abs(correlation_score(first, second)) < bound
        sizes = [(x**2 - 1) / math.sqrt(2) for x in (first, second)]
        assert abs(correlation_score(*sizes)) < bound
    assert abs(correlation_score(one, one)) > 100


def test_a_released_sum_has_the_noise_it_states() -> None:
    """Noise on a sum has standard deviation sigma C and no relation to the sum (false alarm 6e-7)."""
    d, clip, sigma = 200_000, 2.0, 3.5
    total = np.linspace(-50, 50, d)
    noise = Randomness().add_noise(total, clip, sigma) - total
    stated = sigma * clip
    raised = sigma * (clip + 4 * 2.0**-24 * math.sqrt(d))  # by the rounding of the sum, on a grid of 4 / 2^24
    bound = stats.norm.isf(ALARM)
    assert abs(variance_score(noise, raised)) < bound
    assert abs(noise.sum()) / (raised * math.sqrt(d)) < bound
    assert abs(correlation_score(noise / raised, total / total.std())) < bound
    assert raised > stated
    assert abs(variance_score(0.97 * noise, raised)) > 8


def test_noise_of_two_releases_is_independent() -> None:
    """Two releases of the same sum share no noise, from one object or from two (false alarm 4e-7)."""
    total = np.zeros(100_000)
    source = Randomness()
    one, two, three = source.add_noise(total, 1, 1), source.add_noise(total, 1, 1), Randomness().add_noise(total, 1, 1)
    for first, second in ((one, two), (one, three)):
        assert abs(correlation_score(first, second)) < stats.norm.isf(ALARM)
        assert abs(variance_score(first - second, math.sqrt(2))) < 6  # 2e-9; sqrt(2) up to the raise for rounding


def samples(patients: int, rate: float, draws: int) -> NDArray[np.bool_]:
    """Who joined, [draws, patients], in successive calls to one object."""
    source = Randomness()
    joined = np.zeros((draws, patients), np.bool_)
    for row in joined:
        row[source.poisson_sample(patients, rate)] = True
    return joined


@pytest.mark.parametrize("rate", [0.01, 0.25, 0.9])
def test_every_patient_joins_at_the_stated_rate(rate: float) -> None:
    """Each of 100 patients joins about q of 8,000 steps, none favoured (exact binomial tails, false alarm 3e-7)."""
    counts = samples(100, rate, 8000).sum(axis=0)
    law = stats.binom(8000, rate)
    tails = np.minimum(law.cdf(counts), law.sf(counts - 1))
    assert tails.min() > ALARM / 2 / 100
    whole = stats.binom(800_000, rate)
    assert min(whole.cdf(counts.sum()), whole.sf(counts.sum() - 1)) > ALARM / 2


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_the_batch_size_is_binomial(rate: float) -> None:
    """Batch sizes follow the binomial law, 0 included: none fixed or cut short (exact tails, false alarm 1e-7)."""
    patients, draws = 40, 20_000
    sizes = samples(patients, rate, draws).sum(axis=1)
    observed = np.bincount(sizes, minlength=patients + 1)
    law = stats.binom(draws, stats.binom(patients, rate).pmf(np.arange(patients + 1)))
    assert np.minimum(law.cdf(observed), law.sf(observed - 1)).min() > ALARM / 2 / len(observed)
    if rate == 0.05:
        assert observed[0] > 0  # expected 2570


def test_patients_join_independently() -> None:
    """Whether one joins says nothing about another, a neighbour, or the next step (false alarm 3e-7)."""
    joined = samples(200, 0.25, 4000)
    score = (joined.astype(np.float64) - 0.25) / math.sqrt(0.25 * 0.75)
    bound = stats.norm.isf(ALARM / 2)
    assert abs(correlation_score(score[:, 1:].ravel(), score[:, :-1].ravel())) < bound
    assert abs(correlation_score(score[1:].ravel(), score[:-1].ravel())) < bound
    size = score.sum(axis=1) / math.sqrt(200)
    assert abs(variance_score(size, 1.0)) < bound + 0.5  # a binomial's kurtosis is off a normal's by .01
    halves = np.concatenate([joined[:, :100], joined[:, :100]], axis=1)  # patients chosen in pairs would show
    assert abs(variance_score((halves - 0.25).sum(axis=1) / math.sqrt(200 * 0.25 * 0.75), 1.0)) > 20


def test_the_sample_does_not_depend_on_the_noise() -> None:
    """Sample and noise from one object are unrelated, in whatever order they are drawn (false alarm 2e-7)."""
    source = Randomness()
    n = 100_000
    joined = np.zeros(n)
    joined[source.poisson_sample(n, 0.5)] = 1
    noise = source.normal(n)
    again = np.zeros(n)
    again[source.poisson_sample(n, 0.5)] = 1
    for sample in (joined, again):
        assert abs(correlation_score(2 * sample - 1, noise)) < stats.norm.isf(ALARM / 2)
