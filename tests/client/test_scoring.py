"""From held-out patients and any weights to a noised histogram."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from client.scoring import noised_histogram, scores_one_by_one
from common.batching import Dataset
from common.models.network import build_network
from common.privacy.randomness import Randomness
from common.score_histogram import HISTOGRAM
from common.training import load_state, predict, state_of
from simulations.seeded import SeededRandomness, Silent
from tests.small import Patient, as_sequences, made_up_patients, small_study

STUDY = small_study(metrics={"noise_multiplier": 2.0, "bins": 12})
METRICS = STUDY.metrics
assert METRICS is not None
PLAN, BINS = STUDY.metrics_plan(), STUDY.score_bins(METRICS)
assert PLAN is not None
PATIENTS = made_up_patients(3, 30)


def network(cell: str = "gru", scale: float = 1.0) -> torch.nn.Module:
    """The study's network, all its weights made `scale` times as large."""
    made = build_network(small_study(model={"cell": cell}))
    load_state(made, {name: array * np.float32(scale) for name, array in state_of(made).items()})
    return made


def told(patients: list[Patient], made: torch.nn.Module, randomness: Randomness) -> NDArray[Any]:
    assert PLAN is not None
    held_out = Dataset(as_sequences(patients)) if patients else None
    return noised_histogram(made, held_out, PLAN, BINS, randomness)[HISTOGRAM]


@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn", "none"])
def test_scores_are_the_networks(cell: str) -> None:
    """One by one gives what the whole data set gives at once, in the data set's order, up to rounding."""
    made, dataset = network(cell), Dataset(as_sequences(PATIENTS))
    scores = scores_one_by_one(made, dataset)
    assert np.allclose(1 / (1 + np.exp(-scores)), predict(made, dataset), atol=1e-6)


@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn", "none"])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4, 1e30])
def test_a_patients_score_does_not_depend_on_the_others(cell: str, scale: float) -> None:
    """To the last bit, also under weights that amplify rounding: alone, with others, or with others of another size."""
    made = network(cell, scale)
    everybody = scores_one_by_one(made, Dataset(as_sequences(PATIENTS)))
    owner = as_sequences(PATIENTS).patient
    for kept in (range(5), range(20, 30), [7], range(1, 30, 2)):
        found = scores_one_by_one(made, Dataset(as_sequences([PATIENTS[index] for index in kept])))
        assert np.array_equal(found, everybody[np.isin(owner, list(kept))], equal_nan=True)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e30])
def test_removing_any_patient_moves_the_histogram_by_at_most_the_clip(scale: float) -> None:
    """Before noise, for every patient of a site and for weights of any size: at most the plan's clip in L2."""
    made = network("gru", scale)
    assert PLAN is not None
    whole = told(PATIENTS, made, Silent(0, "north", 1, 1)).astype(np.float64)
    for gone in range(len(PATIENTS)):
        rest = told(PATIENTS[:gone] + PATIENTS[gone + 1 :], made, Silent(0, "north", 1, 1)).astype(np.float64)
        assert np.sqrt(((whole - rest) ** 2).sum()) <= PLAN.clip * (1 + 1e-6)  # float32, in which it is stored


def test_the_noise_is_the_steps_and_in_every_cell() -> None:
    """The histogram is the counts plus what `add_noise` gives for them: same source, sensitivity and multiplier."""
    asked: list[tuple[float, float, int]] = []

    class Watched(SeededRandomness):
        def add_noise(self, clipped_sum: NDArray[np.float64], clip: float, noise: float) -> NDArray[np.float64]:
            asked.append((clip, noise, clipped_sum.size))
            return super().add_noise(clipped_sum, clip, noise)

    found = told(PATIENTS, network(), Watched(1, "north", 4, 1))
    plain = told(PATIENTS, network(), Silent(1, "north", 4, 1))
    assert asked == [(1.0, 2.0, 24)]
    assert (found != plain).all()
    assert (found.shape, found.dtype) == ((2, 12), np.float32)


def test_nobody_held_out_is_noise_alone() -> None:
    """No patient, no error: the same form, and noise."""
    found = told([], network(), Randomness())
    assert (found.shape, found.dtype) == ((2, 12), np.float32)
    assert (found != 0).all()


def test_no_two_tellings_are_alike() -> None:
    """By default the noise is the operating system's."""
    one, other = (told(PATIENTS, network(), Randomness()) for _ in range(2))
    assert (one != other).all()
