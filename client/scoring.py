"""The final weights' scores on held-out patients, as a noised histogram: the only place where they become one.

A site's metrics are one Gaussian release. The weights come from a server, which may choose them to harm: nothing here
relies on what they are.

Decisions a reader would question:

- Each patient is scored alone, on the CPU. In a batch a product of n rows may round a row otherwise than one of n - 1,
  and weights that amplify this would let one patient move the others' scores (docs/guarantees.md, N1). Alone, a
  patient's scores are one function of one patient's records. It takes about a millisecond a patient.
- The noise is the step's: the same source, the same grid (common/privacy/randomness.py). Float32, in which the result
  is stored and sent, comes after the noise and so costs nothing.
- No total is sent beside it: how many patients were held out follows from the noised cells alone.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from common.batching import Dataset
from common.privacy.plan import Plan
from common.privacy.randomness import Randomness
from common.score_histogram import CLASSES, HISTOGRAM, ScoreBins, histogram
from common.weights import Weights


def noised_histogram(
    network: nn.Module, held_out: Dataset | None, plan: Plan, bins: ScoreBins, randomness: Randomness
) -> Weights:
    """How many held-out patients have each label and score, with noise: `HISTOGRAM` -> float32 [2, bins].

    Args:
        network: maps a Batch to logits [S], on the CPU.
        held_out: the patients who never train, on the CPU; None: there are none.
        plan: one step at q = 1; its clip is the histogram's sensitivity.
        bins: public.
        randomness: of this attempt alone.

    Guarantee:
        The Gaussian mechanism at the plan's noise multiplier, for adding or removing one patient, whatever the
        weights are: a patient's scores do not depend on the others, a patient moves the histogram by at most the
        plan's clip (`histogram`), and every cell has noise, also where nobody is held out.
    """
    counted = np.zeros((CLASSES, bins.number))
    if held_out is not None:
        sequences = held_out.sequences
        counted = histogram(bins, sequences.patient, sequences.label, scores_one_by_one(network, held_out))
    noised = randomness.add_noise(counted.ravel(), plan.clip, plan.noise_multiplier)
    return {HISTOGRAM: noised.reshape(counted.shape).astype(np.float32)}


@torch.no_grad()
def scores_one_by_one(network: nn.Module, dataset: Dataset) -> NDArray[np.float64]:
    """Logit [S] of every sequence, in the data set's order, each patient's as if there were no other."""
    network.eval()
    logit = np.empty(dataset.sequences.n_sequences)
    for patient in range(dataset.n_patients):
        batch = dataset.batch(np.array([patient]))
        logit[batch.order.numpy()] = network(batch).double().numpy()
    return logit
