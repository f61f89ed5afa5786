"""The noise in what hospitals release: its scale, its whiteness, and that no two releases share any of it.

From the real client, on the operating system's entropy. With everybody sampled (q = 1) the clipped sum is a fixed
number, known from a run without noise; what an update holds beside it is noise: 16 releases of 58,685 weights, from
two sites and eight rounds. `alarms` looks at them in six ways; in each a false alarm has probability at most 1.5e-7,
together 9e-7. The same function is given faulty noise, and must name the fault: a scale wrong by 1 % lies 13 standard
deviations from the claim and is missed once in 10^15.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import combinations
from multiprocessing import get_context

import numpy as np
import pytest
from scipy import stats  # type: ignore[import-untyped]  # publishes no stubs

from client.ledger import Attempt, MemoryLedger
from client.site import Site
from common.batching import Dataset
from common.models.network import build_network
from common.privacy.randomness import Randomness
from common.records import Status
from common.training import state_of
from common.weights import from_bytes
from simulations.seeded import Silent
from tests.small import as_sequences, made_up_patients, request, small_study
from tests.statistical.faults import Changed, Source
from tests.statistical.released import Numbers, deviation, flat

ROUNDS = 8
STUDY = small_study(
    model={"hidden": 128, "embedding": 16},
    training={"rounds": ROUNDS},
    privacy={"epsilon": 3.0, "sampling_rate": 1.0, "spare_rounds": 1},
)
WEIGHTS = state_of(build_network(STUDY))
LENGTH = flat(WEIGHTS).size
EACH = 1.5e-7  # false alarm of each look
EDGES = np.cumsum([WEIGHTS[name].size for name in sorted(WEIGHTS)])[:-1]


def site_of(name: str, source: Source, ledger: MemoryLedger | None = None) -> Site:
    """A hospital of six patients."""
    records = as_sequences(made_up_patients(len(name), 6))
    return Site(name, STUDY, Dataset(records), ledger or MemoryLedger(3.0, 1e-3), source)


def sums(site: Site, rounds: int = ROUNDS) -> Numbers:
    """[rounds, d] released sums, all from the same weights."""
    divisor = STUDY.plan().divisor(STUDY.sites[site.name].declared_patients)
    updates = [site.train(request(STUDY, WEIGHTS, number)).update for number in range(1, rounds + 1)]
    return np.stack([-divisor * flat(update) for update in updates if update is not None])


@cache
def sum_without_noise(name: str) -> Numbers:
    """[d] the clipped sum."""
    (only,) = sums(site_of(name, lambda number, attempt: Silent(0, name, number, attempt)), 1)
    return only


def noise_of(source_of: Callable[[str], Source]) -> Numbers:
    """[16, d] the noise of both sites' releases, in standard deviations."""
    of_sites = [sums(site_of(name, source_of(name))) - sum_without_noise(name) for name in ("north", "east")]
    return np.concatenate(of_sites) / deviation(STUDY, LENGTH)


def scale(noise: Numbers) -> float:
    """The sum of squares is a chi-square's."""
    law, total = stats.chi2(noise.size), float(np.sum(noise**2))
    return float(2 * min(law.cdf(total), law.sf(total)))


def scale_in_parts(noise: Numbers) -> float:
    """So it is in every release, and over all releases in every parameter array."""
    return _least([scale(part) for part in (*noise, *_by_parameter(noise))])


def shape(noise: Numbers) -> float:
    """Kolmogorov and Smirnov's test of all numbers."""
    return float(stats.kstest(noise.ravel(), "norm").pvalue)


def whiteness(noise: Numbers) -> float:
    """Within releases no period and no lag stands out, of the numbers or of their squares; releases averaged.

    Periods: the power at each is half a chi-square with two degrees of freedom a release (Fisher 1929). Lags: each
    circular autocovariance is about normal; twice, because products of squares are a little skew.
    """
    chances = []
    for z in (noise, (noise**2 - 1) / math.sqrt(2)):
        power = np.abs(np.fft.rfft(z, axis=1)) ** 2
        period = power[:, 1:-1].sum(axis=0).max() / LENGTH
        chances.append(power.shape[1] * stats.chi2(2 * len(z)).sf(2 * period))
        lag = np.abs(np.fft.irfft(power.sum(axis=0), LENGTH)[1 : LENGTH // 2]).max() / math.sqrt(z.size)
        chances.append(2 * LENGTH * stats.norm.sf(lag))
    return _least(chances)


def unlike_releases(noise: Numbers) -> float:
    """No two releases are correlated."""
    return _least([correlation(*pair) for pair in combinations(noise, 2)])


def unlike_parameters(noise: Numbers) -> float:
    """Neighbouring weights, halves of a release, and the weights of each two arrays are uncorrelated."""
    return _least([correlation(*pair) for pair in _columns(noise)])


LOOKS = (scale, scale_in_parts, shape, whiteness, unlike_releases, unlike_parameters)


def alarms(noise: Numbers) -> list[str]:
    """What looks wrong with [n, d] numbers that should be independent standard normals."""
    return [look.__name__ for look in LOOKS if look(noise) < EACH]


def correlation(one: Numbers, other: Numbers) -> float:
    """Two-sided chance of so large a sum of products of independent standard normals."""
    return float(2 * stats.norm.sf(abs(np.dot(one.ravel(), other.ravel())) / math.sqrt(one.size)))


def _least(chances: list[float]) -> float:
    """Bonferroni."""
    return len(chances) * min(chances)


def _by_parameter(noise: Numbers) -> list[Numbers]:
    """All releases of each parameter array."""
    return np.split(noise, EDGES, axis=1)


def _columns(noise: Numbers) -> list[tuple[Numbers, Numbers]]:
    """Pairs of parts of a release: neighbouring weights, its halves, and each two arrays as far as both reach."""
    half = noise.shape[1] // 2
    pairs = [(noise[:, 1:], noise[:, :-1]), (noise[:, :half], noise[:, half : 2 * half])]
    for one, other in combinations(_by_parameter(noise), 2):
        shared = min(one.shape[1], other.shape[1])
        if len(noise) * shared > 1000:  # else the sum of products is not normal enough for such small chances
            pairs.append((one[:, :shared], other[:, :shared]))
    return pairs


@pytest.fixture(scope="module")
def noise() -> Numbers:
    """Of the client as it is."""
    return noise_of(lambda _site: lambda _round, _attempt: Randomness())


def test_released_noise_is_white_and_of_the_stated_scale(noise: Numbers) -> None:
    """Standard deviation sigma C, normal, independent over parameters, rounds and sites (false alarm 9e-7)."""
    assert noise.shape == (2 * ROUNDS, LENGTH)
    assert alarms(noise) == []


def _scaled(factor: float) -> Callable[[str], Source]:
    return lambda _site: lambda _round, _attempt: Changed(lambda s, t, c, z: t + factor * (s.honest_noise(t, c, z) - t))


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_a_scale_wrong_by_one_percent_is_caught(factor: float) -> None:
    """The client's noise made 1 % smaller or larger: the scale alarms."""
    assert scale(noise_of(_scaled(factor))) < EACH


def test_noise_that_one_array_lacks_is_caught(noise: Numbers) -> None:
    """Any one parameter array without noise, the smallest too: its scale alarms, though the whole hardly changes."""
    for at in range(len(WEIGHTS)):
        parts = [part.copy() for part in _by_parameter(noise)]
        parts[at][:] = 0
        assert scale_in_parts(np.concatenate(parts, axis=1)) < EACH


@pytest.mark.parametrize(
    ("change", "look"),
    [
        (lambda z: np.concatenate([z[:-1], z[:1]]), unlike_releases),
        (lambda z: np.concatenate([z[:-1], 0.97 * z[-1:] - 0.243 * z[:1]]), unlike_releases),
        (lambda z: (z + 0.02 * np.roll(z, 1, axis=1)) / math.hypot(1, 0.02), unlike_parameters),
        (lambda z: np.concatenate([z[:, : LENGTH // 2]] * 2, axis=1), unlike_parameters),
        (lambda z: (z + 0.03 * np.roll(z, 1234, axis=1)) / math.hypot(1, 0.03), whiteness),
        (lambda z: z * np.sqrt(1 + 0.1 * np.sin(np.arange(LENGTH))), whiteness),
        (lambda z: np.resize(z[:, :997], z.shape), whiteness),
        (lambda z: math.sqrt(3) * np.random.default_rng(1).uniform(-1, 1, z.shape), shape),
        (lambda z: np.sign(z) * np.abs(z) ** 1.05, shape),
    ],
    ids=["repeated", "leaked", "smeared", "halved", "lagged", "pulsing", "periodic", "uniform", "heavy-tailed"],
)
def test_noise_with_a_pattern_is_caught(
    change: Callable[[Numbers], Numbers], look: Callable[[Numbers], float], noise: Numbers
) -> None:
    """Noise that repeats or leaks between releases or parameters, or is not normal, alarms where it should."""
    assert look(change(noise)) < EACH


class Heard(Randomness):
    """The client's own randomness; what it added to each sum is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.noise: list[Numbers] = []

    def add_noise(self, clipped_sum: Numbers, clip: float, noise_multiplier: float) -> Numbers:
        """The noised sum."""
        noised = super().add_noise(clipped_sum, clip, noise_multiplier)
        self.noise.append(noised - clipped_sum)
        return noised


def test_local_steps_of_a_round_have_noise_of_their_own() -> None:
    """Eight local steps of one round: eight draws, as white and of the same scale as rounds (false alarm 9e-7)."""
    local = STUDY.model_copy(
        update={"training": STUDY.training.model_copy(update={"recipe": "fedavg-local", "local_steps": 8, "rounds": 1})}
    )
    source = Heard()
    records = Dataset(as_sequences(made_up_patients(5, 6)))
    site = Site("north", local, records, MemoryLedger(3.0, 1e-3), lambda _round, _attempt: source)
    assert site.train(request(local, WEIGHTS)).status is Status.OK
    assert len(source.noise) == 8
    assert alarms(np.stack(source.noise) / deviation(local, LENGTH)) == []


class Unstorable(MemoryLedger):
    """Fails to store the first update of every round, and keeps its bytes: what a lost attempt would have released."""

    lost: bytes | None = None

    def release(self, attempt: Attempt, update: bytes) -> None:
        """Store the second."""
        if attempt.number == 1:
            self.lost = update
            raise OSError
        super().release(attempt, update)


def test_a_retry_has_noise_of_its_own() -> None:
    """The update of an attempt that was lost and that of its retry share no noise (false alarm 3e-7)."""
    ledger = Unstorable(3.0, 1e-3)
    site = site_of("north", lambda _round, _attempt: Randomness(), ledger)
    assert site.train(request(STUDY, WEIGHTS)).status is Status.LOCAL_FAILURE
    second = sums(site, 1)[0]
    assert ledger.lost is not None
    first = -STUDY.plan().divisor(STUDY.sites["north"].declared_patients) * flat(from_bytes(ledger.lost))
    pair = (np.stack([first, second]) - sum_without_noise("north")) / deviation(STUDY, LENGTH)
    assert correlation(*pair) > EACH
    assert scale(pair) > EACH


def released_elsewhere(_number: int) -> Numbers:
    """Round 1 of a hospital, in the process where this is called."""
    records = Dataset(as_sequences(made_up_patients(5, 6)))
    (only,) = sums(Site("north", STUDY, records, MemoryLedger(3.0, 1e-3)), 1)
    return only


def test_two_processes_share_no_noise() -> None:
    """Two processes with everything equal (code, records, study, round) release unrelated noise (false alarm 3e-7)."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        released = np.stack([*pool.map(released_elsewhere, range(2)), released_elsewhere(2)])
    noise = (released - sum_without_noise("north")) / deviation(STUDY, LENGTH)
    assert min(correlation(*pair) for pair in combinations(noise, 2)) > EACH / 3
    assert scale(noise) > EACH
