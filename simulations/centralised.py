"""All records in one place: the trusted curator, and training without any privacy, which federation is compared with.

Decisions a reader would question:

- With privacy, a curator is a study of one virtual site that holds everybody: the same code, the same plan, one noise
  instead of one per site.
- Without privacy nothing is clipped, so per-patient gradients are not needed, and weight decay, which no private study
  has, is. Hence the plain loop below; a test holds it against a study of one site whose clip never binds.
- Patients are renumbered when records are joined: the same number at two hospitals is two people.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from common.batching import Dataset
from common.device import resolve
from common.models.network import build_network
from common.sequences import Sequences
from common.study import Study
from common.training import ADAM, MAX_ROWS, patient_losses, state_of
from common.weights import Weights
from simulations.experiment import one_thread
from simulations.hospitals import Hospitals
from simulations.seeded import SeededRandomness


@dataclass(frozen=True)
class Gathered(Hospitals):
    """Hospitals whose training records are handed over instead of read: joined, or a part of them."""

    training: Mapping[str, Sequences] = field(default_factory=dict)

    def dataset(self, site: str, splits: tuple[str, ...]) -> Dataset:
        """The handed-over records of a site, whatever the splits."""
        del splits
        return as_dataset(self.study, self.training[site])


def as_dataset(study: Study, sequences: Sequences) -> Dataset:
    """Sequences on the study's device, with its mask."""
    return Dataset(sequences, centre_mask=study.model.centre_mask, device=resolve(study.device))


def join(parts: list[Sequences]) -> Sequences:
    """The records of several sites as one; patients are renumbered 0..P-1 in the order of the parts."""
    patients = np.cumsum([0, *(part.n_patients for part in parts)])
    steps = np.cumsum([0, *(part.n_steps for part in parts)])
    codes = np.cumsum([0, *(len(part.codes) for part in parts)])

    def chained(name: str) -> Any:
        return np.concatenate([getattr(part, name) for part in parts])

    def shifted(name: str, offset: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.concatenate([getattr(part, name)[:-1] + start for part, start in zip(parts, offset, strict=False)])

    return Sequences(
        patient_id=np.arange(patients[-1]),
        patient=np.concatenate([part.patient + first for part, first in zip(parts, patients, strict=False)]),
        start=np.append(shifted("start", steps), steps[-1]),
        values=chained("values"),
        measured=chained("measured"),
        gap=chained("gap"),
        codes=chained("codes"),
        code_start=np.append(shifted("code_start", codes), codes[-1]),
        statics=chained("statics"),
        label=chained("label"),
        prediction_time=chained("prediction_time"),
    )


def train_plainly(
    study: Study,
    sequences: Sequences,
    seed: int,
    *,
    weight_decay: float = 0.0,
    rounds: int | None = None,
    on_round: Callable[[int, Weights], None] = lambda _number, _weights: None,
) -> Weights:
    """Adam on everybody's records, no clip, no noise, no epsilon: starting weights, samples and rates of the study.

    Args:
        study: model, sampling rate, steps and learning rate; of one virtual site, by whose name samples are drawn.
        sequences: all training records.
        seed: of starting weights and samples.
        weight_decay: decoupled (Loshchilov and Hutter 2019), per unit of learning rate, on matrices, not on biases.
        rounds: stop after so many; default all of the study's.
        on_round: called after every round with its number and the weights.
    """
    (site,), training, rate = study.sites, study.training, study.privacy.sampling_rate
    dataset = as_dataset(study, sequences)
    network = build_network(study, seed).to(dataset.device)
    groups = [
        {"params": [p for p in network.parameters() if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in network.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    options: dict[str, Any] = ADAM
    optimizer = torch.optim.AdamW(groups, lr=training.learning_rate, **options)
    with one_thread():
        for number in range(1, (rounds or training.rounds) + 1):
            randomness = SeededRandomness(seed, site, number, 1)
            for group in optimizer.param_groups:
                group["lr"] = study.learning_rate(number)
            for _ in range(training.local_steps):
                chosen = randomness.poisson_sample(dataset.n_patients, rate)
                optimizer.zero_grad()
                for batch in dataset.micro_batches(chosen, MAX_ROWS):
                    (patient_losses(network, batch).sum() / (rate * dataset.n_patients)).backward()
                optimizer.step()
            on_round(number, state_of(network))
    return state_of(network)
