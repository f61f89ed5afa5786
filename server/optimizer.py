"""The server's optimizer: average update in, new global weights out (FedOpt, Reddi et al. 2021, algorithm 2).

Pure: `(state, weights, average) -> (state, weights)`. The averaged update points downhill, so its negative is the
gradient. `adam` serves one-step rounds, where the average is a noised gradient; `plain` adds the average of local
training (McMahan et al. 2017).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from common.weights import Weights

Mean = dict[str, NDArray[np.float64]]
BETA1, BETA2, EPSILON = 0.9, 0.99, 1e-8


@dataclass(frozen=True)
class AdamState:
    """Steps taken and running first and second moments, by parameter name; checkpoints as it is."""

    step: int = 0
    first: Mean = field(default_factory=dict)
    second: Mean = field(default_factory=dict)


def adam(state: AdamState, weights: Weights, average: Mean, learning_rate: float) -> tuple[AdamState, Weights]:
    """One Adam step (Kingma and Ba 2015, algorithm 1) in float64 along the averaged update.

    Args:
        state: moments so far; `AdamState()` at first.
        weights, average: arrays of equal names and shapes.
        learning_rate: this round's rate, after decay.
    """
    step = state.step + 1
    first, second, new = {}, {}, {}
    for name, weight in weights.items():
        gradient = -average[name]
        first[name] = BETA1 * state.first.get(name, 0.0) + (1 - BETA1) * gradient
        second[name] = BETA2 * state.second.get(name, 0.0) + (1 - BETA2) * gradient**2
        mean = first[name] / (1 - BETA1**step)
        scale = np.sqrt(second[name] / (1 - BETA2**step)) + EPSILON
        new[name] = (weight - learning_rate * mean / scale).astype(np.float32)
    return AdamState(step, first, second), new


def plain(weights: Weights, average: Mean) -> Weights:
    """Federated averaging: add the average update."""
    return {name: (weight + average[name]).astype(np.float32) for name, weight in weights.items()}


def weighted_mean(updates: dict[str, Weights], weights: dict[str, float]) -> Mean:
    """Sum over sites of weight * update / sum of weights, in float64 and in a fixed order of sites.

    Args:
        updates: by site name; all with equal names and shapes; at least one.
        weights: public weight of each site, > 0.
    """
    present = sorted(updates)
    total = sum(weights[site] for site in present)
    mean: Mean = {name: np.zeros_like(array, np.float64) for name, array in updates[present[0]].items()}
    for site in present:
        for name, array in updates[site].items():
            mean[name] += weights[site] / total * array.astype(np.float64)
    return mean
