"""What a round releases, to the last term: the sum, all of its noise, and no patient's influence on another."""

from __future__ import annotations

import numpy as np
import pytest

from common.training import state_of
from simulations.seeded import SeededRandomness
from tests.common.test_training import DATASET, DECLARED, SAMPLE, Watched, network_of, one_round
from tests.small import Chosen, plan


@pytest.mark.parametrize("sample", [[], [3], SAMPLE], ids=["nobody", "one", "seven"])
def test_an_update_is_the_sum_and_all_of_its_noise_over_the_divisor(sample: list[int]) -> None:
    """-divisor x update equals the clipped sum plus the noise as it was drawn, whatever the size of the sample."""
    terms, watched = plan(noise_multiplier=1.7), Watched(sample)
    update = one_round(network_of(), DATASET, watched, terms=terms)
    assert len(watched.noised) == 1
    total, *_ = watched.noised[0]
    noised = SeededRandomness(5, "north", 1, 1).add_noise(total, terms.clip, terms.noise_multiplier)
    released = np.concatenate([part.ravel() for part in update.values()]).astype(np.float64)
    largest = max(float(np.abs(part).max()) for part in state_of(network_of()).values()) + float(np.abs(released).max())
    rounding = 2 * largest * float(np.finfo(np.float32).eps)  # of weights before and after, and their difference
    assert np.abs(released + noised / terms.divisor(DECLARED)).max() <= rounding
    assert np.std(noised - total) > 0.9 * terms.clip * terms.noise_multiplier


@pytest.mark.parametrize("clip", [0.7, 1e4])
def test_a_patients_part_does_not_depend_on_who_else_was_drawn(clip: float) -> None:
    """With and without the others, what a patient adds to the sum is the same: nothing is shared out among a batch."""

    def summed(sample: list[int]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        update = one_round(network_of(), DATASET, Chosen(sample), terms=plan(clip=clip))
        return np.concatenate([part.ravel() for part in update.values()]) * -plan().divisor(DECLARED)

    others = [i for i in SAMPLE if i != 7]
    alone = summed([7])
    assert np.abs(alone).max() > 1e-2
    assert np.allclose(summed(SAMPLE) - summed(others), alone, rtol=0, atol=1e-4)
