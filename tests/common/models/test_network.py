"""The network against torch.nn's own modules put together by hand, and where its starting weights come from."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.batching import Batch, Dataset
from common.models.network import DiagnosisNetwork, LogisticRegression, build_network
from common.training import load_state, predict, state_of
from tests.small import Patient, Stay, as_sequences, made_up_patients, small_study

CELLS: dict[str, Callable[[int, int], nn.Module]] = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}
POOLINGS = [
    ("last_state", "mean_state", "mean_input", "last_input"),
    ("last_state",),
    ("mean_input", "mean_state"),
    ("last_input", "last_state"),
]
cells = pytest.mark.parametrize("cell", ["gru", "lstm", "rnn"])


def randomised(network: nn.Module, seed: int) -> nn.Module:
    """Every parameter random, also those that start at zero."""
    random = np.random.default_rng(seed)
    shapes = {name: p.shape for name, p in network.named_parameters()}
    load_state(network, {n: random.normal(size=s).astype(np.float32) for n, s in shapes.items()})
    return network


def inputs(stay: Stay) -> Tensor:
    """[T, D] dense inputs of one stay, written out."""
    rows = [[*v.values, *(float(m) - 0.5 for m in v.measured), v.gap, *stay.statics] for v in stay.visits]
    return torch.tensor(rows, dtype=torch.float32)


def by_hand(network: nn.Module, stay: Stay, cell: str, pooling: tuple[str, ...]) -> Tensor:
    """Logit of one stay from torch.nn modules that the network's state dict was loaded into."""
    state = network.state_dict()

    def part(name: str) -> dict[str, Tensor]:
        return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}

    dense = inputs(stay)
    count, width = state["embedding.weight"].shape
    embedding = nn.EmbeddingBag(count, width, mode="sum")
    embedding.load_state_dict(part("embedding"), strict=True)
    start = np.cumsum([0, *(len(v.codes) for v in stay.visits)])[:-1]
    codes = torch.tensor([code for v in stay.visits for code in v.codes], dtype=torch.int64)
    x = torch.cat([dense, embedding(codes, torch.from_numpy(start))], dim=1)
    recurrence = CELLS[cell](x.shape[1], state["recurrence.weight_hh_l0"].shape[1])
    recurrence.load_state_dict(part("recurrence"), strict=True)
    states, _ = recurrence(x)
    pieces = {
        "last_state": states[-1],
        "mean_state": states.mean(0),
        "mean_input": dense.mean(0),
        "last_input": dense[-1],
    }
    head = nn.Linear(state["head.weight"].shape[1], 1)
    head.load_state_dict(part("head"), strict=True)
    logit: Tensor = head(torch.cat([pieces[name] for name in pooling]))[0]
    return logit


def batch_of(patients: list[Patient]) -> Batch:
    return Dataset(as_sequences(patients)).batch(np.arange(len(patients)))


def stays_of(patients: list[Patient], batch: Batch) -> list[Stay]:
    """The stays in the batch's order."""
    everyone = [stay for patient in patients for stay in patient]
    return [everyone[i] for i in batch.order.tolist()]


@cells
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("training", [True, False])
def test_the_network_is_torch_modules_put_together(cell: str, pooling: tuple[str, ...], training: bool) -> None:
    """Its state dict loads strictly into EmbeddingBag, GRU, LSTM or RNN, and Linear, which give the same logits."""
    study = small_study(model={"cell": cell, "pooling": pooling})
    network = randomised(build_network(study), 1).train(training)
    patients = made_up_patients(1, 12)
    batch = batch_of(patients)
    expected = [by_hand(network, stay, cell, pooling).item() for stay in stays_of(patients, batch)]
    assert network(batch).tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_logistic_regression_is_its_formula() -> None:
    """`cell: none`: b + w.(mean and last dense inputs) + sum over codes of u times its mean over steps + v if last."""
    study = small_study(model={"cell": "none"})
    network = randomised(build_network(study), 2)
    state = {name: array.astype(np.float64) for name, array in state_of(network).items()}
    patients = made_up_patients(2, 12)
    batch = batch_of(patients)
    expected = []
    for stay in stays_of(patients, batch):
        dense = inputs(stay).double().numpy()
        logit = state["head.bias"][0] + state["head.weight"][0] @ np.concatenate([dense.mean(0), dense[-1]])
        for code, (mean_weight, last_weight) in enumerate(state["embedding.weight"]):
            there = [code in visit.codes for visit in stay.visits]
            logit += mean_weight * np.mean(there) + last_weight * there[-1]
        expected.append(logit)
    assert isinstance(network, LogisticRegression)
    assert network(batch).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("cell", ["gru", "none"])
def test_records_without_codes_and_studies_without_a_code_list_work(cell: str) -> None:
    """No code anywhere in a batch adds nothing; a schema without codes has no embedding."""
    patients = made_up_patients(3, 5)
    for stay in (stay for patient in patients for stay in patient):
        for visit in stay.visits:
            visit.codes = []
    batch = batch_of(patients)
    network = randomised(build_network(small_study(model={"cell": cell})), 3)
    assert torch.isfinite(network(batch)).all()
    without = build_network(small_study(model={"cell": cell}, features={"codes": ()}))
    assert not any(name.startswith("embedding") for name in state_of(without))
    assert without(batch).shape == (batch.n_sequences,)


@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn", "none"])
def test_starting_weights_are_a_function_of_study_and_seed(cell: str) -> None:
    """Equal studies and seeds give equal bits, another seed others, and torch's global generator is left alone."""
    study = small_study(model={"cell": cell})
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    one = state_of(build_network(study, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(12)
    again = state_of(build_network(study, 4))
    assert one.keys() == again.keys()
    assert all(np.array_equal(one[name], again[name]) for name in one)
    if cell != "none":  # all of logistic regression starts at zero
        other = state_of(build_network(study, 5))
        assert any(not np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn", "none"])
def test_the_network_starts_at_the_public_prevalence(cell: str) -> None:
    """With a head that starts at zero every patient's first prediction is the study's prevalence."""
    study = small_study(model={"cell": cell, "head_start": "zero"}, task={"prevalence": 0.03})
    dataset = Dataset(as_sequences(made_up_patients(4, 6)))
    assert predict(build_network(study), dataset) == pytest.approx(0.03, rel=1e-6)


def test_the_lstm_remembers_at_first() -> None:
    """Gate biases start at zero, except that the LSTM's forget gate starts open by one (torch's order i, f, g, o)."""
    network = build_network(small_study(model={"cell": "lstm"}))
    state = state_of(network)
    assert state["recurrence.bias_ih_l0"].tolist() == [0.0] * 5 + [1.0] * 5 + [0.0] * 10
    assert not state["recurrence.bias_hh_l0"].any()
    gru = state_of(build_network(small_study()))
    assert not gru["recurrence.bias_ih_l0"].any()
    assert not gru["recurrence.bias_hh_l0"].any()


@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn", "none"])
@pytest.mark.parametrize("training", [True, False])
def test_a_patients_logits_do_not_depend_on_who_else_is_in_the_batch(cell: str, training: bool) -> None:
    """Alone, among others, or beside a patient whose inputs are NaN: the logits are the same up to rounding."""
    network = randomised(build_network(small_study(model={"cell": cell})), 6).train(training)
    patients = made_up_patients(6, 20)
    for visit in patients[7][0].visits:
        visit.values = [math.nan] * len(visit.values)
    dataset = Dataset(as_sequences(patients))
    together = dataset.batch(np.arange(20))
    of_sequence = dict(zip(together.order.tolist(), network(together).tolist(), strict=True))
    for patient in [i for i in range(20) if i != 7]:
        alone = dataset.batch(np.array([patient]))
        expected = [of_sequence[s] for s in alone.order.tolist()]
        assert network(alone).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert all(map(math.isfinite, expected))


def test_predictions_are_in_the_order_of_the_sequences() -> None:
    """`predict` gives the sigmoid of each sequence's logit in the data set's order, however it cuts the batches."""
    network = randomised(build_network(small_study()), 8)
    patients = made_up_patients(8, 15)
    dataset = Dataset(as_sequences(patients))
    batch = dataset.batch(np.arange(15))
    logits: dict[int, Any] = dict(zip(batch.order.tolist(), network(batch).tolist(), strict=True))
    expected = [1 / (1 + math.exp(-logits[s])) for s in range(batch.n_sequences)]
    for max_rows in (1, 7, 10_000):
        assert predict(network, dataset, max_rows).tolist() == pytest.approx(expected, rel=1e-5)


@cells
def test_the_network_has_no_buffers(cell: str) -> None:
    """Everything that training changes is a parameter: nothing could leave without noise."""
    network = build_network(small_study(model={"cell": cell}))
    assert isinstance(network, DiagnosisNetwork)
    assert list(network.buffers()) == []
    assert set(state_of(network)) == set(network.state_dict())
