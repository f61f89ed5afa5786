"""A round at one site against a loop over patients with autograd, and what the update may not depend on."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from common.batching import Dataset
from common.models.network import build_network
from common.privacy.plan import Plan
from common.training import load_state, local_optimizer, patient_losses, state_of, train_round
from common.weights import Weights
from simulations.seeded import SeededRandomness
from tests.small import Chosen, Patient, as_sequences, made_up_patients, plan, small_study

DECLARED = 80
SAMPLE = [4, 0, 11, 7, 9, 15, 2]
PATIENTS = made_up_patients(21, 16)
DATASET = Dataset(as_sequences(PATIENTS))
cells = pytest.mark.parametrize("cell", ["gru", "lstm", "rnn", "none"])


class Watched(SeededRandomness):
    """Seeded noise, chosen samples, and a record of what was noised."""

    def __init__(self, *samples: list[int]) -> None:
        super().__init__(5, "north", 1, 1)
        self.samples = list(samples)
        self.noised: list[tuple[NDArray[np.float64], float, float]] = []

    def poisson_sample(self, patients: int, sampling_rate: float) -> NDArray[np.int64]:
        """The next sample."""
        return np.array(self.samples.pop(0), np.int64)

    def add_noise(self, clipped_sum: NDArray[np.float64], clip: float, noise_multiplier: float) -> NDArray[np.float64]:
        """Seeded noise."""
        self.noised.append((clipped_sum.copy(), clip, noise_multiplier))
        return super().add_noise(clipped_sum, clip, noise_multiplier)


def network_of(cell: str = "gru", seed: int = 3) -> nn.Module:
    """A network whose parameters are all random, so that no gradient is zero by construction."""
    network = build_network(small_study(model={"cell": cell}))
    random = np.random.default_rng(seed)
    load_state(network, {n: random.normal(0, 0.5, p.shape).astype(np.float32) for n, p in network.named_parameters()})
    return network


def one_round(
    network: nn.Module,
    dataset: Dataset,
    randomness: SeededRandomness,
    *,
    terms: Plan | None = None,
    declared: int = DECLARED,
    steps: int = 1,
    max_rows: int = 10_000,
    recipe: str = "fedavg-one-step",
) -> Weights:
    return train_round(
        network,
        dataset,
        terms or plan(),
        declared_patients=declared,
        steps=steps,
        optimizer=local_optimizer(recipe, network, 0.01),
        randomness=randomness,
        max_rows=max_rows,
    )


def patient_gradient(network: nn.Module, dataset: Dataset, patient: int) -> dict[str, NDArray[np.float64]]:
    """Gradient of the mean loss over one patient's sequences: torch's own kernels, one sequence after another."""
    network = copy.deepcopy(network).eval()
    batch = dataset.batch(np.array([patient]))
    losses = nn.functional.binary_cross_entropy_with_logits(network(batch), batch.label, reduction="none")
    names, parameters = zip(*network.named_parameters(), strict=True)
    gradients = torch.autograd.grad(losses.mean(), parameters, allow_unused=True)
    return {
        name: (torch.zeros_like(p) if g is None else g).double().numpy()
        for name, p, g in zip(names, parameters, gradients, strict=True)
    }


def clipped_sum(network: nn.Module, dataset: Dataset, sample: list[int], clip: float) -> dict[str, NDArray[np.float64]]:
    """Each patient's gradient, scaled down to norm `clip` if it is longer, added up."""
    total = {name: np.zeros(p.shape) for name, p in network.named_parameters()}
    for patient in sample:
        gradient = patient_gradient(network, dataset, patient)
        norm = math.sqrt(sum(float((part**2).sum()) for part in gradient.values()))
        for name, part in gradient.items():
            total[name] += part * min(1.0, clip / norm)
    return total


def close(one: Weights, other: dict[str, NDArray[np.float64]], tolerance: float) -> bool:
    return one.keys() == other.keys() and all(np.allclose(one[n], other[n], rtol=0, atol=tolerance) for n in one)


def scaled(update: Weights, factor: float) -> Weights:
    return {name: array * np.float32(factor) for name, array in update.items()}


@cells
@pytest.mark.parametrize("clip", [0.05, 0.7, 1e4])
def test_one_step_is_the_clipped_sum_over_the_public_divisor(cell: str, clip: float) -> None:
    """-divisor x update equals the sum of each sampled patient's clipped gradient, taken one patient at a time."""
    network, terms = network_of(cell), plan(clip=clip)
    expected = clipped_sum(network, DATASET, SAMPLE, clip)
    update = one_round(network, DATASET, Chosen(SAMPLE), terms=terms)
    assert close(scaled(update, -terms.divisor(DECLARED)), expected, 1e-5)
    assert max(float(np.abs(part).max()) for part in expected.values()) > 1e-3


def test_the_update_is_what_changed() -> None:
    """The update is weights after minus weights before, and the network holds the weights after."""
    network = network_of()
    before = state_of(network)
    update = one_round(network, DATASET, Chosen(SAMPLE))
    after = state_of(network)
    assert all(np.array_equal(after[name] - before[name], update[name]) for name in before)
    assert all(array.dtype == np.float32 for array in update.values())


@cells
@pytest.mark.parametrize("max_rows", [1, 7, 25])
def test_micro_batches_do_not_change_the_update(cell: str, max_rows: int) -> None:
    """However small the physical batches, the update is the same up to float32 rounding."""
    whole = one_round(network_of(cell), DATASET, Chosen(SAMPLE, SAMPLE), steps=2)
    cut = one_round(network_of(cell), DATASET, Chosen(SAMPLE, SAMPLE), steps=2, max_rows=max_rows)
    assert close(cut, {name: array.astype(np.float64) for name, array in whole.items()}, 1e-6)


@pytest.mark.parametrize("max_rows", [1, 10_000])
def test_every_step_noises_the_whole_sum_once(max_rows: int) -> None:
    """Each step draws noise once, over all parameters, with the plan's clip and sigma, whatever the micro-batches."""
    network, randomness = network_of(), Watched(SAMPLE, [3], SAMPLE)
    one_round(network, DATASET, randomness, terms=plan(clip=0.3, noise_multiplier=1.7), steps=3, max_rows=max_rows)
    count = sum(p.numel() for p in network.parameters())
    assert [(len(total), clip, sigma) for total, clip, sigma in randomness.noised] == [(count, 0.3, 1.7)] * 3


def test_a_plan_without_noise_draws_none() -> None:
    """Sigma 0, as a simulation may ask for: the update is the clipped sum over the divisor, no noise is drawn."""
    network, randomness = network_of(), Watched(SAMPLE)
    expected = clipped_sum(network, DATASET, SAMPLE, 0.7)
    update = one_round(network, DATASET, randomness, terms=plan(noise_multiplier=0.0))
    assert randomness.noised == []
    assert close(scaled(update, -plan().divisor(DECLARED)), expected, 1e-5)


def test_an_empty_sample_still_steps_and_adds_noise() -> None:
    """A step whose sample is empty noises a sum of zero and moves every parameter by noise over the divisor."""
    network, randomness = network_of(), Watched([])
    update = one_round(network, DATASET, randomness)
    ((total, _, _),) = randomness.noised
    assert not total.any()
    fresh = SeededRandomness(5, "north", 1, 1)
    noise = fresh.add_noise(total, 0.7, 1.0) / plan().divisor(DECLARED)
    assert np.allclose(np.concatenate([part.ravel() for part in update.values()]), -noise, rtol=0, atol=1e-6)


def test_empty_samples_between_others_change_nothing_but_noise() -> None:
    """Without noise, an empty step is a step of zero: the update is that of the other steps."""
    with_empty = one_round(network_of(), DATASET, Chosen([], SAMPLE, []), steps=3)
    without = one_round(network_of(), DATASET, Chosen(SAMPLE))
    assert all(np.array_equal(with_empty[name], without[name]) for name in without)


def test_a_site_without_patients_answers_with_noise() -> None:
    """A site with no training patient at all takes its steps like any other."""
    empty = Dataset(as_sequences(PATIENTS).select([]))
    update = one_round(network_of(), empty, SeededRandomness(1, "north", 1, 1), steps=2)
    assert all(np.isfinite(part).all() and part.any() for part in update.values())


@cells
@pytest.mark.parametrize("spoilt", [math.nan, math.inf, 1e38])
@pytest.mark.parametrize("max_rows", [1, 10_000])
def test_a_patient_who_breaks_the_gradient_counts_as_zero(cell: str, spoilt: float, max_rows: int) -> None:
    """NaN, infinite or overflowing inputs of one patient leave the others' contribution alone and raise nothing."""
    patients = copy.deepcopy(PATIENTS)
    for stay in patients[SAMPLE[2]]:
        stay.visits[0].values = [spoilt] * len(stay.visits[0].values)
    others = [i for i in SAMPLE if i != SAMPLE[2]]
    network = network_of(cell)
    expected = clipped_sum(network, DATASET, others, 0.7)
    update = one_round(network, Dataset(as_sequences(patients)), Chosen(SAMPLE), max_rows=max_rows)
    difference = {n: -update[n].astype(np.float64) * plan().divisor(DECLARED) - expected[n] for n in update}
    size = math.sqrt(sum(float((part**2).sum()) for part in difference.values()))
    assert math.isfinite(size)
    if not math.isfinite(spoilt):
        assert size < 1e-4
    else:  # a huge input need not overflow every gradient, but the patient stays within the clip
        assert size <= 0.7 + 1e-4


@settings(deadline=None, max_examples=25)
@given(st.sets(st.integers(0, 15)), st.integers(0, 15), st.sampled_from([0.05, 0.7, 5.0]))
def test_one_patient_changes_the_sum_by_at_most_the_clip(sample: set[int], patient: int, clip: float) -> None:
    """With and without any one patient, the sums that are noised differ by at most C in L2 norm."""
    sums = []
    for chosen in (sample | {patient}, sample - {patient}):
        randomness = Watched(sorted(chosen))
        one_round(network_of(), DATASET, randomness, terms=plan(clip=clip))
        sums.append(randomness.noised[0][0])
    assert float(np.linalg.norm(sums[0] - sums[1])) <= clip * (1 + 1e-6)


def test_the_true_number_of_patients_appears_nowhere() -> None:
    """Patients who are not sampled, ten times as many or none, do not change a bit of the update."""
    kept: list[Patient] = [PATIENTS[i] for i in SAMPLE]
    updates = []
    for others in ([], made_up_patients(99, 5), made_up_patients(99, 5) * 30):
        randomness = Chosen(list(range(len(kept))))
        updates.append(one_round(network_of(), Dataset(as_sequences(kept + others)), randomness))
        assert randomness.patients_seen == [len(kept) + len(others)]
    assert all(np.array_equal(u[name], updates[0][name]) for u in updates[1:] for name in u)


def test_the_divisor_follows_the_declared_patients() -> None:
    """Declaring twice as many patients halves the step, with the same records."""
    once = one_round(network_of(), DATASET, Chosen(SAMPLE), declared=40)
    twice = one_round(network_of(), DATASET, Chosen(SAMPLE), declared=80)
    assert close(scaled(twice, 2.0), {n: a.astype(np.float64) for n, a in once.items()}, 1e-6)


def test_who_is_sampled_follows_the_plan() -> None:
    """The sampler is asked once a step, for the true patients and the plan's sampling rate."""

    class Asked(Chosen):
        rates: list[float]

        def poisson_sample(self, patients: int, sampling_rate: float) -> NDArray[np.int64]:
            self.rates.append(sampling_rate)
            return super().poisson_sample(patients, sampling_rate)

    randomness = Asked([1], [2], [3])
    randomness.rates = []
    one_round(network_of(), DATASET, randomness, terms=plan(sampling_rate=0.31), steps=3)
    assert randomness.rates == [0.31] * 3
    assert randomness.patients_seen == [16] * 3


@cells
def test_local_steps_are_adam_on_the_clipped_mean_gradients(cell: str) -> None:
    """`fedavg-local`: E Adam steps (betas .9 and .99) from the global weights, each on the noised mean gradient."""
    samples = [SAMPLE, [1, 3], [], [5, 6, 8]]
    network = network_of(cell)
    by_hand = copy.deepcopy(network)
    adam = torch.optim.Adam(by_hand.parameters(), lr=0.01, betas=(0.9, 0.99), eps=1e-8)
    before = state_of(network)
    for sample in samples:
        total = clipped_sum(by_hand, DATASET, sample, 0.7)
        for name, p in by_hand.named_parameters():
            p.grad = torch.from_numpy(total[name] / plan().divisor(DECLARED)).to(p.dtype)
        adam.step()
    expected = {name: array.astype(np.float64) - before[name] for name, array in state_of(by_hand).items()}
    update = one_round(network, DATASET, Chosen(*samples), steps=4, recipe="fedavg-local")
    assert close(update, expected, 1e-5)
    assert all(float(np.abs(array).max()) > 1e-3 for array in expected.values())


@pytest.mark.parametrize("where", ["second micro-batch", "noise"])
def test_a_round_that_fails_leaves_nothing_behind(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failure in the middle of a step the next round gives the bits that a fresh network gives."""
    fresh = one_round(network_of(), DATASET, Chosen(SAMPLE))
    network = network_of()
    start = state_of(network)
    with monkeypatch.context() as broken:
        if where == "noise":
            broken.setattr(Chosen, "add_noise", fails)
        else:
            calls = itertools.count()
            broken.setattr(
                "common.training.patient_losses", lambda n, b: fails() if next(calls) else patient_losses(n, b)
            )
        with pytest.raises(MemoryError):
            one_round(network, DATASET, Chosen(SAMPLE), max_rows=10)
    load_state(network, start)
    again = one_round(network, DATASET, Chosen(SAMPLE))
    assert all(np.array_equal(again[name], fresh[name]) for name in fresh)


def fails(*_: object) -> torch.Tensor:
    raise MemoryError


def test_the_network_is_left_without_hooks() -> None:
    """After a round the network trains like any torch module: gradients arrive in `.grad`."""
    network = network_of()
    one_round(network, DATASET, Chosen(SAMPLE))
    network.zero_grad(set_to_none=True)
    network(DATASET.batch(np.array([0, 1]))).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_buffers_are_refused() -> None:
    """A network with buffers would send them without noise: it is refused before anything is trained."""
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match="buffers"):
        state_of(network)
    with pytest.raises(ValueError, match="buffers"):
        one_round(network, DATASET, Chosen(SAMPLE))


@pytest.mark.parametrize(
    "change",
    [lambda w: {**w, "more": np.zeros(1, "f4")}, lambda w: {}, lambda w: {**w, "head.bias": np.zeros(2, "f4")}],
)
def test_weights_of_another_network_are_not_loaded(change: Callable[[Weights], Weights]) -> None:
    """A missing name, one too many or another shape raises."""
    network = network_of()
    with pytest.raises(RuntimeError):
        load_state(network, change(state_of(network)))


def test_states_are_copies() -> None:
    """Neither the state taken nor the arrays loaded share memory with the network."""
    network = network_of()
    taken = state_of(network)
    taken["head.bias"] += 1
    assert not np.array_equal(state_of(network)["head.bias"], taken["head.bias"])
    load_state(network, taken)
    taken["head.bias"] += 1
    assert not np.array_equal(state_of(network)["head.bias"], taken["head.bias"])
