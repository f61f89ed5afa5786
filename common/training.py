"""One site's local training: the only place where patients become an update.

A round starts from the global weights and takes a fixed number of private local steps. Each step: Poisson sample of
patients, per-patient gradients (mean over a patient's sequences), clipped, summed, noised, divided by the public
q * declared_patients, one optimizer step. The last iterate leaves; nothing is selected, stopped early or scaled by
anything that was seen.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.batching import Batch, Dataset
from common.privacy.bookkeeping import BookKeepingHooks, BookKeepingOptimizer
from common.privacy.plan import Plan
from common.privacy.randomness import Randomness
from common.privacy.rows import Rows
from common.weights import Weights

MAX_ROWS = 16_384  # packed rows in a micro-batch: bounds memory, and keeps its gates near the cache
ADAM = {"betas": (0.9, 0.99), "eps": 1e-8}


def train_round(
    network: nn.Module,
    dataset: Dataset,
    plan: Plan,
    *,
    declared_patients: int,
    steps: int,
    optimizer: torch.optim.Optimizer,
    randomness: Randomness,
    max_rows: int = MAX_ROWS,
) -> Weights:
    """Take `steps` private steps on `network` and return the update: weights after minus weights before.

    Args:
        network: maps a Batch to logits [S]; its parameters are changed in place.
        dataset: the site's training sequences.
        plan: sampling rate, noise and clip; fixed before the study's first step.
        declared_patients: the public cohort size; with the sampling rate it gives the divisor.
        optimizer: a torch optimizer over all of the network's parameters; it sees only noised gradients.
        randomness: who is sampled and the noise; one object per attempt.
        max_rows: physical batch size; may change speed and memory, never the result beyond rounding.

    Guarantee:
        Each step is the Poisson-subsampled Gaussian mechanism at (q, sigma) of the plan, for adding or removing one
        patient: one patient changes the clipped sum by at most C, all of a patient's sequences are clipped once, an
        empty sample still steps with noise, and the divisor is public. The update is post-processing of the steps.
        A patient with non-finite gradient counts as zero. A failure raises before anything is returned.
    """
    before = state_of(network)
    network.train()
    hooks = BookKeepingHooks(network, loss_reduction="sum", require_rows=True)
    try:
        private = BookKeepingOptimizer(
            optimizer,
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=plan.clip,
            expected_batch_size=plan.divisor(declared_patients),
            loss_reduction="mean",
            noise=lambda flat, _deviation: _noised(flat, plan, randomness),
        )
        for _ in range(steps):
            private.zero_grad(set_to_none=True)
            chosen = randomness.poisson_sample(dataset.n_patients, plan.sampling_rate)
            if len(chosen) == 0:
                private.empty_batch()
            for batch in dataset.micro_batches(chosen, max_rows):
                patient_losses(network, batch).sum().backward()
                private.accumulate()
            private.step()
    finally:
        hooks.cleanup()
    after = state_of(network)
    return {name: after[name] - before[name] for name in before}


def patient_losses(network: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of each sequence [S], weighted so that the sum over a patient's sequences is their mean."""
    with Rows(batch.patient, batch.n_patients):
        logits = network(batch)
    losses = nn.functional.binary_cross_entropy_with_logits(logits, batch.label, reduction="none")
    return losses * batch.share


def _noised(flat: Tensor, plan: Plan, randomness: Randomness) -> Tensor:
    noised = randomness.add_noise(flat.cpu().numpy(), plan.clip, plan.noise_multiplier)
    return torch.from_numpy(noised).to(flat.device)


def local_optimizer(recipe: str, network: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """The optimizer at the site. `fedavg-one-step`: the identity (update = -noised mean gradient; the server has the
    learning rate). `fedavg-local`: Adam (Kingma and Ba 2015), fresh each round, so that a site keeps no state.
    """
    parameters = list(network.parameters())
    if recipe == "fedavg-one-step":
        return torch.optim.SGD(parameters, lr=1.0)
    options: dict[str, Any] = ADAM
    return torch.optim.Adam(parameters, lr=learning_rate, **options)


def state_of(network: nn.Module) -> Weights:
    """Float32 copies of the parameters by name. Buffers are refused: they would leave without noise."""
    if next(network.buffers(), None) is not None:
        raise ValueError("the network has buffers, which no noise covers; use layers without running statistics")
    return {name: p.detach().cpu().numpy().astype(np.float32).copy() for name, p in network.named_parameters()}


def load_state(network: nn.Module, weights: Weights) -> None:
    """Put arrays into the network's parameters of the same names and shapes."""
    network.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()}, strict=True)


@torch.no_grad()
def predict(network: nn.Module, dataset: Dataset, max_rows: int = 4 * MAX_ROWS) -> NDArray[np.float64]:
    """Probability of a positive label [S] for every sequence of the data set, in its order; torch's own kernels."""
    network.eval()
    out = np.empty(dataset.sequences.n_sequences)
    for batch in dataset.micro_batches(np.arange(dataset.n_patients), max_rows):
        out[batch.order.cpu().numpy()] = torch.sigmoid(network(batch).double()).cpu().numpy()
    return out
