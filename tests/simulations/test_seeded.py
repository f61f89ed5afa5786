"""Seeded randomness: repeatable for whoever knows the seed, hence stamped, and out of reach of a real site."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import numpy as np
import pytest

from client.site import Site
from common.privacy.randomness import Randomness
from simulations.seeded import STAMP, SeededRandomness, Silent

ROOT = Path(__file__).resolve().parents[2]


def test_the_same_name_gives_the_same_numbers() -> None:
    """Seed, site, round and attempt fix sample and noise, whatever was drawn before from other objects."""
    one = SeededRandomness(7, "north", 3, 1)
    Randomness().bits(10)
    other = SeededRandomness(7, "north", 3, 1)
    np.testing.assert_array_equal(one.poisson_sample(1000, 0.3), other.poisson_sample(1000, 0.3))
    total = np.linspace(-1, 1, 1000)
    np.testing.assert_array_equal(one.add_noise(total, 1.0, 2.0), other.add_noise(total, 1.0, 2.0))


@pytest.mark.parametrize(
    "name", [(8, "north", 3, 1), (7, "south", 3, 1), (7, "north", 4, 1), (7, "north", 3, 2), (7, "north", 31, 1)]
)
def test_another_seed_site_round_or_attempt_gives_other_numbers(name: tuple[int, str, int, int]) -> None:
    """No two attempts of a simulation share a stream: a retry has fresh noise."""
    assert not np.any(SeededRandomness(*name).bits(1000) == SeededRandomness(7, "north", 3, 1).bits(1000))


def test_the_stream_is_fixed_across_machines_and_versions() -> None:
    """The first words of one stream, as they were when written: results in run folders stay reproducible."""
    assert SeededRandomness(0, "north", 1, 1).bits(2).tolist() == [7663654074100115123, 18369594269743077463]


def test_the_stamp_says_that_the_weights_are_not_private() -> None:
    """What a seeded result carries says what epsilon means there and that the weights are not private."""
    assert "epsilon is what this plan costs with secret randomness" in STAMP
    assert "not private" in STAMP
    assert "seeded" in STAMP


def test_silence_returns_the_sum_itself() -> None:
    """`Silent` samples as seeded and adds nothing: for comparing weights between grids."""
    total = np.linspace(-1, 1, 11)
    silent = Silent(7, "north", 3, 1)
    assert silent.add_noise(total, 1.0, 5.0) is total
    np.testing.assert_array_equal(
        Silent(7, "north", 3, 1).poisson_sample(100, 0.5), SeededRandomness(7, "north", 3, 1).poisson_sample(100, 0.5)
    )


def test_a_site_is_secret_unless_an_object_is_handed_in() -> None:
    """A site's default source is the secret one, fresh for each attempt."""
    default = inspect.signature(Site).parameters["randomness"].default
    one, other = default(1, 1), default(1, 1)
    assert type(one) is type(other) is Randomness
    assert not np.any(one.bits(100) == other.bits(100))


OTHER_SOURCES = {"manual_seed", "default_rng", "RandomState", "rand", "randn", "randperm", "bernoulli"}


@pytest.mark.parametrize("place", ["common/privacy", "common/training.py", "common/batching.py", "client"])
def test_private_training_has_no_other_source(place: str) -> None:
    """Where patients become an update, and at a site, numpy's, torch's and Python's generators are unused."""
    files = sorted((ROOT / place).rglob("*.py")) or [ROOT / place]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.Attribute) and node.attr in OTHER_SOURCES), path
            assert not (isinstance(node, ast.Import) and any(alias.name == "random" for alias in node.names)), path
            assert not (isinstance(node, ast.ImportFrom) and node.module in {"random", "numpy.random"}), path
