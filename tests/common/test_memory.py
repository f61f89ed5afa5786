"""What a round holds in memory: bounded by the micro-batch, whatever the sample. Counted, not timed or weighed.

In megabytes: `python -m tests.benchmarks.memory`.
"""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.profiler import ProfilerActivity, profile

from common.batching import Batch, Dataset
from common.models.network import build_network
from common.training import local_optimizer, patient_losses, train_round
from tests.small import Chosen, as_sequences, made_up_patients, plan, small_study

PATIENTS = made_up_patients(1, 1280, most_stays=1)  # of 1 to 5 rows each
cells = pytest.mark.parametrize("cell", ["gru", "lstm", "rnn", "none"])


def one_round(dataset: Dataset, cell: str, max_rows: int) -> None:
    """A private step on every patient of the data set."""
    network = build_network(small_study(model={"cell": cell}))
    train_round(
        network,
        dataset,
        plan(sampling_rate=1.0),
        declared_patients=80,
        steps=1,
        optimizer=local_optimizer("fedavg-one-step", network, 0.01),
        randomness=Chosen(list(range(dataset.n_patients))),
        max_rows=max_rows,
    )


def most_bytes(patients: int, cell: str, max_rows: int) -> int:
    """The most bytes that torch held at a time during a round, above what it held before."""
    dataset = Dataset(as_sequences(PATIENTS[:patients]))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        one_round(dataset, cell, max_rows)
    assert seen.profiler is not None
    assert seen.profiler.kineto_results is not None
    changes = [e.nbytes() for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    return int(np.cumsum(changes).max())


@cells
def test_a_round_holds_a_micro_batch_however_many_patients_are_sampled(cell: str) -> None:
    """Four times the patients in micro-batches of equal size need at most a fifth more; in one batch, ten times."""
    few, many = most_bytes(320, cell, 50), most_bytes(1280, cell, 50)
    assert many < 1.2 * few
    assert most_bytes(1280, cell, 10**9) > 10 * many


@pytest.mark.parametrize("max_rows", [7, 50, 200])
def test_one_micro_batch_is_alive_while_it_is_trained(max_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a micro-batch goes forward the earlier ones are gone, and it has at most `max_rows` rows."""
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    build = Dataset.batch

    def batch(self: Dataset, patients: NDArray[np.int64]) -> Batch:
        one = build(self, patients)
        made.append(weakref.ref(one.dense))
        return one

    def losses(network: torch.nn.Module, one: Batch) -> torch.Tensor:
        held = [dense for ref in made if (dense := ref()) is not None]
        alive.append(sum(len(dense) for dense in held))
        return patient_losses(network, one)

    monkeypatch.setattr(Dataset, "batch", batch)
    monkeypatch.setattr("common.training.patient_losses", losses)
    dataset = Dataset(as_sequences(PATIENTS[:400]))
    one_round(dataset, "gru", max_rows)
    assert len(alive) == len(made) > 1
    assert max(alive) <= max_rows
    assert sum(alive) == len(dataset.dense)  # every row went forward once
