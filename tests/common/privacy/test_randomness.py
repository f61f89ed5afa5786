"""The secret source: what it is made of, and that nothing from outside reaches it. Its laws: tests/statistical."""

from __future__ import annotations

import copy
import inspect
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from common.privacy.randomness import GRID_BITS, KEY_BYTES, Randomness


class Keyed(Randomness):
    """The same streams every time, from a key that the test names."""

    def __init__(self, key: bytes = bytes(KEY_BYTES)) -> None:
        self._chosen = key
        super().__init__()

    def _key(self) -> bytes:
        return self._chosen


class Fixed(Randomness):
    """Chosen words and chosen normals in place of drawn ones."""

    def __init__(self, words: list[int] | None = None, normals: float = 0.0) -> None:
        super().__init__()
        self._words, self._normals = words or [], normals

    def bits(self, count: int) -> NDArray[np.uint64]:
        return np.array(self._words[:count], np.uint64)

    def normal(self, count: int) -> NDArray[np.float64]:
        return np.full(count, self._normals)


def test_two_objects_never_share_a_stream() -> None:
    """Each object has a key of its own, from the operating system: no word occurs in two of their streams."""
    streams = [Randomness().bits(1000) for _ in range(20)]
    assert len(np.unique(np.concatenate(streams))) == 20_000  # a chance repeat: 1e-11


def test_the_key_is_fresh_entropy_of_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each object asks os.urandom once for 256 bits, and its stream is what follows from them."""
    asked: list[int] = []

    def urandom(count: int) -> bytes:
        asked.append(count)
        return bytes([len(asked)]) * count

    monkeypatch.setattr(os, "urandom", urandom)
    first, second = Randomness(), Randomness()
    assert asked == [32, 32]
    np.testing.assert_array_equal(first.bits(10), Keyed(b"\x01" * 32).bits(10))
    np.testing.assert_array_equal(second.bits(10), Keyed(b"\x02" * 32).bits(10))


def test_the_stream_is_aes_256_in_counter_mode() -> None:
    """The stream of the zero key begins with AES-256 of the zero block, a published vector (NIST AESAVS)."""
    assert Keyed().bits(2).tobytes().hex() == "dc95c078a2408989ad48a21492842087"
    both = Keyed()
    np.testing.assert_array_equal(np.concatenate([both.bits(3), both.bits(5)]), Keyed().bits(8))


def test_no_argument_can_seed_it() -> None:
    """The constructor takes nothing: a configuration has nowhere to put a seed."""
    assert not inspect.signature(Randomness).parameters


SEEDED_FROM_OUTSIDE = """
import os, random, sys
import numpy, torch
from common.privacy.randomness import Randomness
random.seed(0); numpy.random.seed(0); torch.manual_seed(0)
source = Randomness()
print(source.bits(2).tobytes().hex(), source.normal(2).tobytes().hex(), source.poisson_sample(200, 0.5).tobytes().hex())
"""


def test_no_seed_from_outside_reaches_it() -> None:
    """With every seed, environment variable and hash seed fixed, two runs still differ in bits, noise and sample."""
    fixed = dict.fromkeys(("PYTHONHASHSEED", "SEED", "WARDROUND_SEED", "PL_GLOBAL_SEED"), "0")
    environment = {**os.environ, **fixed, "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.run(
            [sys.executable, "-c", SEEDED_FROM_OUTSIDE],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
            cwd=Path(__file__).parents[3],
        ).stdout.split()
        for _ in range(2)
    ]
    assert len(runs[0]) == 3
    assert all(one != other for one, other in zip(*runs, strict=True))


FORKED = """
import os
from common.privacy.randomness import Randomness
source = Randomness()
child = os.fork()
if child == 0:
    try:
        source.bits(1)
    except RuntimeError:
        os._exit(7)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
source.bits(1)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_cannot_repeat_the_noise() -> None:
    """A child process that inherits an object is refused; the parent goes on."""
    subprocess.run([sys.executable, "-c", FORKED], check=True, cwd=Path(__file__).parents[3])


def test_it_cannot_be_copied_to_another_process() -> None:
    """The state can be neither pickled nor copied deeply: a copy would repeat the noise."""
    for duplicate in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError):
            duplicate(Randomness())


def test_a_given_key_gives_the_same_numbers() -> None:
    """An injected key, as simulations have, makes sample and noise repeatable; another key, others."""
    total = np.linspace(-1, 1, 100)
    one, same, other = (source.add_noise(total, 1.0, 2.0) for source in (Keyed(), Keyed(), Keyed(b"\x01" * 32)))
    np.testing.assert_array_equal(one, same)
    assert np.all(one != other)
    np.testing.assert_array_equal(Keyed().poisson_sample(100, 0.3), Keyed().poisson_sample(100, 0.3))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 65_535, 65_536, 65_537, 131_073])
def test_as_many_numbers_as_asked_for(count: int) -> None:
    """Any count of words and normals, also 0, odd, and around the block size; all finite, no two alike."""
    assert Keyed().bits(count).shape == (count,)
    normals = Keyed().normal(count)
    assert normals.shape == (count,)
    assert np.isfinite(normals).all()
    assert len(np.unique(normals)) == count


@pytest.mark.parametrize("word", [0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1])
def test_every_word_gives_a_finite_normal(word: int) -> None:
    """The extreme words of the stream give finite normals, none beyond 13.4 standard deviations."""
    source = Fixed([word, 0])
    for normals in (Randomness.normal(source, 2), Randomness.normal(Fixed([0, word]), 2)):
        assert np.isfinite(normals).all()
        assert np.abs(normals).max() < 13.4


class Words(Randomness):
    """A radius word, the angle word zero, and what a second call for words brings."""

    def __init__(self, radius: int, more: int) -> None:
        super().__init__()
        self._calls = [[radius, 0], [more]]

    def bits(self, count: int) -> NDArray[np.uint64]:
        return np.array(self._calls.pop(0)[:count] if count else [], np.uint64)


def radius_of(word: int, more: int = 0) -> float:
    """The radius of the pair that these words make; at angle zero it is the pair's first number."""
    return float(Words(word, more).normal(2)[0])


@given(word=st.integers(0, 2**64 - 2) | st.integers(0, 2**32 + 10) | st.integers(0, 63).map(lambda k: 2**k))
@settings(deadline=None, max_examples=200)
def test_no_grid_cell_is_out_of_reach(word: int) -> None:
    """Neighbouring radii are less than 1/500 of the finest grid step apart, from 1e-5 to 11 standard deviations; closer
    in they are about half a step apart at most. The radius that 53 bits make is not: beyond 6.7 it steps over cells.
    """
    finest = 2.0 ** -(GRID_BITS + 1)
    inner = radius_of(word + 1, 0)
    outer = radius_of(word, 2**64 - 1)  # the most that further bits, where they are used, can add
    if outer < 11:
        assert 0 <= outer - inner < (finest / 500 if inner > 1e-5 else 0.51 * finest)
    coarse = [math.sqrt(-2 * math.log((k + 0.5) * 2.0**-53)) for k in (10**6, 10**6 + 1)]
    assert coarse[0] > 6.7
    assert coarse[0] - coarse[1] > 2 * finest


@pytest.mark.parametrize("word", [5, 2**20, 2**31])
def test_a_large_radius_moves_with_its_further_bits(word: int) -> None:
    """Below 2^32 the further word shifts the radius within its gap: without it the gap would stay empty."""
    radii = [radius_of(word, share * 2**60) for share in range(16)]
    assert radii == sorted(radii, reverse=True)
    assert len(set(radii)) == 16
    assert radii[0] - radii[-1] == pytest.approx((radius_of(word) - radius_of(word + 1)) * 15 / 16, rel=0.1)


def test_full_sampling_takes_everyone_and_none_of_nobody() -> None:
    """At q = 1 all patients join; of no patients, none do."""
    np.testing.assert_array_equal(Randomness().poisson_sample(50, 1.0), np.arange(50))
    for rate in (0.25, 1.0):
        assert Randomness().poisson_sample(0, rate).shape == (0,)


def test_a_patient_joins_exactly_below_the_threshold() -> None:
    """A patient joins if its word is below q 2^64, rounded down: the probability is never above q."""
    rate = 0.3
    threshold = math.floor(math.ldexp(rate, 64))
    source = Fixed([0, threshold - 1, threshold, threshold + 1, 2**64 - 1])
    np.testing.assert_array_equal(source.poisson_sample(5, rate), [0, 1])
    nearly_all = math.nextafter(1.0, 0.0)
    np.testing.assert_array_equal(Fixed([2**64 - 2**11 - 1, 2**64 - 1]).poisson_sample(2, nearly_all), [0])
    assert len(Randomness().poisson_sample(1000, 2.0**-70)) == 0


def test_each_patient_has_its_own_word() -> None:
    """The sample of n patients uses n words: the decision on one says nothing about another."""
    words = Keyed().bits(1000)
    chosen = Keyed().poisson_sample(1000, 0.25)
    np.testing.assert_array_equal(chosen, np.flatnonzero(words < np.uint64(2**62)))
    assert chosen.dtype == np.int64


scales = st.floats(1e-3, 1e3)


@given(clip=scales, sigma=scales, draw=st.data())
@settings(deadline=None, max_examples=100)
def test_the_output_lies_on_a_public_grid(clip: float, sigma: float, draw: st.DataObject) -> None:
    """Every released number is a multiple of one power of two, at most 2^-24 of the noise's standard deviation."""
    bound = 100 * clip
    total = draw.draw(arrays.arrays(np.float64, st.integers(1, 20), elements=st.floats(-bound, bound)))
    released = Randomness().add_noise(total, clip, sigma)
    grid = 2.0**-GRID_BITS
    while not grid <= sigma * clip * 2.0**-GRID_BITS < 2 * grid:
        grid *= 2 if 2 * grid <= sigma * clip * 2.0**-GRID_BITS else 0.5
    np.testing.assert_array_equal(released, grid * np.rint(released / grid))


@given(clip=scales, sigma=st.floats(1e-3, 100), draw=st.data())
@settings(deadline=None, max_examples=100)
def test_rounding_moves_two_sums_apart_by_less_than_the_noise_allows_for(
    clip: float, sigma: float, draw: st.DataObject
) -> None:
    """Two sums at distance <= C are, rounded, within C + grid sqrt(d); the noise is scaled for that distance."""
    d = draw.draw(st.integers(1, 30))
    total = draw.draw(arrays.arrays(np.float64, d, elements=st.floats(-50 * clip, 50 * clip)))
    step = draw.draw(arrays.arrays(np.float64, d, elements=st.floats(-1, 1)))
    step *= clip / max(1.0, float(np.linalg.norm(step)))
    quiet, one = Fixed(), Fixed(normals=1.0)
    apart = np.linalg.norm(quiet.add_noise(total + step, clip, sigma) - quiet.add_noise(total, clip, sigma))
    grid = sigma * clip * 2.0**-24
    allowed = clip + grid * math.sqrt(d)
    assert apart <= allowed * (1 + 1e-12)
    deviation = one.add_noise(np.zeros(d), clip, sigma)  # one standard deviation, rounded to the grid
    assert np.all(deviation >= sigma * clip - grid / 2)
    assert np.all(deviation >= sigma * apart - grid / 2)


@given(sigma=st.floats(0.25, 100), d=st.integers(1, 40))
@settings(deadline=None, max_examples=50)
def test_the_noise_is_never_smaller_than_asked_for(sigma: float, d: int) -> None:
    """One standard deviation of the noise is at least sigma C to half a grid step, and at most .1 % more."""
    deviation = Fixed(normals=1.0).add_noise(np.zeros(d), 1.0, sigma)
    assert np.all(deviation >= sigma * (1 - 2.0**-25))
    assert np.all(deviation <= sigma * 1.001)


def test_noise_is_added_exactly() -> None:
    """What is released is the rounded sum plus the noise, without further rounding, whatever the sum's size."""
    small, large = np.array([0.0, 1e-9, 3.0]), np.array([1e6, 1e6 + 1e-9, 1e6 + 3.0])
    noise = Keyed().add_noise(np.zeros(3), 1.0, 1.0)
    grid = 2.0**-24
    for total in (small, large):
        np.testing.assert_array_equal(Keyed().add_noise(total, 1.0, 1.0) / grid, np.rint(total / grid) + noise / grid)


@pytest.mark.parametrize(("clip", "sigma"), [(1.0, 0.0), (0.0, 1.0), (1.0, -1.0), (1.0, math.nan), (math.inf, 1.0)])
def test_no_call_is_answered_without_noise(clip: float, sigma: float) -> None:
    """A scale that is not positive and finite raises: the sum is never returned bare."""
    with pytest.raises(ValueError, match="must be positive and finite"):
        Randomness().add_noise(np.zeros(3), clip, sigma)


def test_float32_sums_are_noised_as_float64() -> None:
    """A float32 sum is released in float64, on the same grid: the grid is finer than float32 could hold."""
    total = np.array([1.5, -2.25, 1e-3], np.float32)
    released = Keyed().add_noise(total, 1.0, 1.0)  # type: ignore[arg-type]  # the case under test
    assert released.dtype == np.float64
    np.testing.assert_array_equal(released, Keyed().add_noise(total.astype(np.float64), 1.0, 1.0))
