"""Who takes part in a step, read off what hospitals release: Poisson sampling over patients, as the plan says.

Every patient has a code of its own, so that the code's weights move if and only if the patient was sampled. Sampling is
the real client's, on the operating system's entropy; only the noise is left out, to see by. Each look has a false
alarm of at most 1e-7; together, over both sampling rates, 1e-6. The same looks are given wrong sampling.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]  # publishes no stubs

from client.ledger import MemoryLedger
from client.site import Site
from common.batching import Dataset
from common.models.network import build_network
from common.privacy.randomness import Randomness
from common.training import state_of
from tests.small import Stay, Visit, as_sequences, request, small_study
from tests.statistical.released import Numbers

EACH = 1e-7
PATIENTS, ROUNDS = 240, 400
Joined = NDArray[np.bool_]  # [rounds, patients]


class Unnoised(Randomness):
    """Sampling from the operating system's entropy, no noise."""

    def add_noise(self, clipped_sum: Numbers, clip: float, noise_multiplier: float) -> Numbers:
        """The sum itself."""
        return clipped_sum


class Shuffled(Unnoised):
    """A fixed number of patients in each step, as loaders of batches give: not Poisson."""

    def poisson_sample(self, patients: int, sampling_rate: float) -> NDArray[np.int64]:
        """Distinct patients."""
        return np.sort(np.random.default_rng().permutation(patients)[: round(patients * sampling_rate)])


class InPairs(Unnoised):
    """Patients join two by two."""

    def poisson_sample(self, patients: int, sampling_rate: float) -> NDArray[np.int64]:
        """Neighbours together."""
        first = 2 * super().poisson_sample(patients // 2, sampling_rate)
        return np.sort(np.concatenate([first, first + 1]))


class TooOften(Unnoised):
    """Each patient joins with a probability that is 6 % too large."""

    def poisson_sample(self, patients: int, sampling_rate: float) -> NDArray[np.int64]:
        """More of them."""
        return super().poisson_sample(patients, 1.06 * sampling_rate)


class FirstAlways(Unnoised):
    """One patient is in every step."""

    def poisson_sample(self, patients: int, sampling_rate: float) -> NDArray[np.int64]:
        """With the first."""
        return np.union1d([0], super().poisson_sample(patients, sampling_rate))


class TheSameAgain(Unnoised):
    """The sample is drawn once and kept."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[tuple[int, float], NDArray[np.int64]] = {}

    def poisson_sample(self, patients: int, sampling_rate: float) -> NDArray[np.int64]:
        """The same as before."""
        return self._kept.setdefault((patients, sampling_rate), super().poisson_sample(patients, sampling_rate))


def released(rate: float) -> Joined:
    """Who joined each round, by what was released."""
    study = small_study(
        model={"cell": "none"},
        features={"codes": [f"CODE//{i}" for i in range(PATIENTS)]},
        privacy={"epsilon": 50.0, "sampling_rate": rate, "spare_rounds": 0},
        training={"rounds": ROUNDS},
    )
    visit = Visit([0.0, 0.0], [False, False], 0.0, [])
    patients = [[Stay([visit, Visit([0.0, 0.0], [False, False], 0.0, [code])], [0.0], 1)] for code in range(PATIENTS)]
    records = Dataset(as_sequences(patients))
    site = Site("north", study, records, MemoryLedger(50.0, 1e-3), lambda _round, _attempt: Unnoised())
    weights = state_of(build_network(study))
    joined = np.zeros((ROUNDS, PATIENTS), bool)
    for at in range(ROUNDS):
        update = site.train(request(study, weights, at + 1)).update
        assert update is not None
        joined[at] = update["embedding.weight"].any(axis=1)
    return joined


def drawn(source: Randomness, rate: float) -> Joined:
    """Who joined each round, by what a source drew."""
    joined = np.zeros((ROUNDS, PATIENTS), bool)
    for row in joined:
        row[source.poisson_sample(PATIENTS, rate)] = True
    return joined


def each_patients_share(joined: Joined, rate: float) -> float:
    """Each patient joins a binomial number of steps (exact tails)."""
    counts, law = joined.sum(axis=0), stats.binom(len(joined), rate)
    return float(2 * joined.shape[1] * np.minimum(law.cdf(counts), law.sf(counts - 1)).min())


def everybodys_share(joined: Joined, rate: float) -> float:
    """All together too."""
    law, count = stats.binom(joined.size, rate), int(joined.sum())
    return float(2 * min(law.cdf(count), law.sf(count - 1)))


def batch_sizes(joined: Joined, rate: float) -> float:
    """Batch sizes are binomial, each as often as it should be, 0 included (exact tails)."""
    size = joined.shape[1]
    observed = np.bincount(joined.sum(axis=1), minlength=size + 1)
    law = stats.binom(len(joined), stats.binom(size, rate).pmf(np.arange(size + 1)))
    return float(2 * len(observed) * np.minimum(law.cdf(observed), law.sf(observed - 1)).min())


def pairs_of_patients(joined: Joined, rate: float) -> float:
    """Two patients join together in a binomial number of steps (exact tails, every pair)."""
    together = joined.T.astype(int) @ joined.astype(int)
    counts, law = together[np.triu_indices(len(together), 1)], stats.binom(len(joined), rate**2)
    return float(2 * len(counts) * np.minimum(law.cdf(counts), law.sf(counts - 1)).min())


def steps_in_a_row(joined: Joined, rate: float) -> float:
    """Who joined a step joins the next as often as anybody: steps 0 and 1, 2 and 3, ..; then 1 and 2, .. (exact)."""
    chances = []
    for start in (0, 1):
        first, second = joined[start:-1:2], joined[start + 1 :: 2]
        count, law = int((first & second).sum()), stats.binom(second.size, rate**2)
        chances.append(2 * min(law.cdf(count), law.sf(count - 1)))
    return float(2 * min(chances))


LOOKS = (each_patients_share, everybodys_share, batch_sizes, pairs_of_patients, steps_in_a_row)


@pytest.mark.parametrize("rate", [0.01, 0.25])
def test_patients_join_independently_at_the_planned_rate(rate: float) -> None:
    """In 400 released rounds of 240 patients the looks find nothing; at 1 % there are empty steps (expected: 36)."""
    joined = released(rate)
    assert [look.__name__ for look in LOOKS if look(joined, rate) < EACH] == []
    if rate == 0.01:
        assert (joined.sum(axis=1) == 0).any()


@pytest.mark.parametrize(
    ("source", "look"),
    [
        (Shuffled, batch_sizes),
        (InPairs, pairs_of_patients),
        (TooOften, everybodys_share),
        (FirstAlways, each_patients_share),
        (TheSameAgain, steps_in_a_row),
    ],
)
def test_wrong_sampling_is_caught(source: type[Unnoised], look: Callable[[Joined, float], float]) -> None:
    """Batches of fixed size, patients in pairs, a rate 6 % too large, a patient who is always in, a sample kept."""
    assert look(drawn(source(), 0.25), 0.25) < EACH
