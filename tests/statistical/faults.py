"""Clients with one fault each, all found in published integrations of DP-SGD or one slip away from ours.

A fault is another source of randomness in `Site`'s constructor, or a piece of the private step that is replaced for
the time of a run. No source file is changed; tests/mutants does that.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.privacy.bookkeeping import clip_weights
from common.privacy.randomness import Randomness
from common.privacy.rows import Rows
from simulations.seeded import SeededRandomness

Numbers = NDArray[np.float64]
Source = Callable[[int, int], Randomness]  # (round, attempt) -> randomness


class Changed(Randomness):
    """Randomness whose noise is made by a function of (itself, clipped sum, clip, sigma)."""

    def __init__(self, noise: Callable[[Changed, Numbers, float, float], Numbers]) -> None:
        super().__init__()
        self._noise = noise
        self.batch = 0

    def poisson_sample(self, patients: int, sampling_rate: float) -> NDArray[np.int64]:
        """As it should be; the size is remembered."""
        chosen = super().poisson_sample(patients, sampling_rate)
        self.batch = len(chosen)
        return chosen

    def add_noise(self, clipped_sum: Numbers, clip: float, noise_multiplier: float) -> Numbers:
        """The function's."""
        return self._noise(self, clipped_sum, clip, noise_multiplier)

    def honest_noise(self, clipped_sum: Numbers, clip: float, noise_multiplier: float) -> Numbers:
        """As it should be."""
        return super().add_noise(clipped_sum, clip, noise_multiplier)


@dataclass(frozen=True)
class Fault:
    """What is wrong with a client.

    Attributes:
        name: for test ids.
        says: for the table.
        randomness: site name -> its source of randomness.
        replaced: dotted name of a piece of the private step -> what stands in its place.
    """

    name: str
    says: str
    randomness: Callable[[str], Source] = lambda _site: lambda _round, _attempt: Randomness()
    replaced: Mapping[str, Any] = field(default_factory=dict)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """While open, the pieces are replaced."""
        with contextlib.ExitStack() as stack:
            for target, replacement in self.replaced.items():
                stack.enter_context(mock.patch(target, replacement))
            yield


def noise(change: Callable[[Changed, Numbers, float, float], Numbers]) -> Callable[[str], Source]:
    """The source of every site and attempt, with its noise changed."""
    return lambda _site: lambda _round, _attempt: Changed(change)


def _clipped_as_a_whole(source: Changed, total: Numbers, clip: float, sigma: float) -> Numbers:
    """The mean gradient is clipped, then noised as if each patient had been."""
    mean = total / source.batch
    mean *= min(1.0, clip / float(np.linalg.norm(mean)))
    return source.honest_noise(mean * source.batch, clip, sigma)


def _half_left_out(source: Changed, total: Numbers, clip: float, sigma: float) -> Numbers:
    noised = source.honest_noise(total, clip, sigma)
    noised[::2] = total[::2]
    return noised


CLIP = "common.privacy.bookkeeping.clip_weights"
OWNERS = "common.training.Rows"


def _never_clipped(norms: Tensor, clip: float, dtype: torch.dtype) -> Tensor:
    return torch.ones_like(norms)


NONE = Fault("none", "as it is")
FAULTS = (
    Fault("no-noise", "no noise", noise(lambda source, total, clip, sigma: total.copy())),
    Fault(
        "noise-over-sqrt-batch",
        "noise / sqrt(batch size)",
        noise(lambda source, total, clip, sigma: source.honest_noise(total, clip, sigma / math.sqrt(source.batch))),
    ),
    Fault(
        "noise-over-batch",
        "noise of the mean, added to the sum",
        noise(lambda source, total, clip, sigma: source.honest_noise(total, clip, sigma / source.batch)),
    ),
    Fault(
        "half-the-noise",
        "half the noise",
        noise(lambda source, total, clip, sigma: source.honest_noise(total, clip, sigma / 2)),
    ),
    Fault(
        "double-clip",
        "clipped at 2 C, noise for C",
        replaced={CLIP: lambda norms, clip, dtype: clip_weights(norms, 2 * clip, dtype)},
    ),
    Fault("never-clipped", "not clipped", replaced={CLIP: _never_clipped}),
    Fault(
        "clipped-after-the-mean",
        "the batch's mean is clipped, not each patient",
        noise(_clipped_as_a_whole),
        {CLIP: _never_clipped},
    ),
    Fault(
        "clipped-per-sequence",
        "each sequence is clipped, not each patient",
        replaced={OWNERS: lambda patient, count: Rows(torch.arange(len(patient)), len(patient))},
    ),
    Fault(
        "clipped-by-anothers-norm",
        "patients are clipped by each other's norms",
        replaced={CLIP: lambda norms, clip, dtype: clip_weights(norms, clip, dtype).flip(0)},
    ),
    Fault(
        "sorted-rows-unsorted-owners",
        "rows sorted by length, their owners not",
        replaced={OWNERS: lambda patient, count: Rows(patient.sort().values, count)},
    ),
    Fault("half-the-weights-noised", "every other weight gets no noise", noise(_half_left_out)),
    Fault(
        "one-draw",
        "one draw of noise for all weights",
        noise(lambda source, total, clip, sigma: total + sigma * clip * source.normal(1)),
    ),
    Fault(
        "same-noise-each-round",
        "the same noise in every round",
        lambda site: lambda _round, _attempt: SeededRandomness(0, site, 0, 0),
    ),
    Fault(
        "same-noise-at-both-sites",
        "the same noise at both sites",
        lambda _site: lambda number, _attempt: SeededRandomness(0, "any", number, 0),
    ),
)
