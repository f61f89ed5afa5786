"""How far one patient's removal moves the clipped sum if a server chose weights that amplify rounding.

    python -m tests.benchmarks.batch_rounding

A product of n rows may round a row otherwise than a product of n - 1 rows does (on one thread MKL does so below four
rows; a GPU's library anywhere). For trained weights that is 1e-7 of a gradient. A recurrence whose weights make it
chaotic multiplies it at every step, until the others' gradients are other gradients: each of them is still clipped to
C, but the sum has moved by more than the one patient. docs/guarantees.md says what follows.

Columns: patients in the batch, time steps, gain of the recurrent weights (1: as at initialisation, 3: chaotic), and
the largest move over all removals, in C.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.models.recurrent import GRU
from common.privacy.bookkeeping import BookKeepingHooks, clip_weights
from common.privacy.rows import Rows

HIDDEN, INPUTS, CLIP = 32, 8, 0.01


def chaotic(gain: float) -> nn.ModuleDict:
    """A GRU that is a plain tanh recurrence, its gates held open and shut, with random weights of this gain."""
    torch.manual_seed(0)
    gru = GRU(INPUTS, HIDDEN)
    with torch.no_grad():
        gru.weight_hh_l0.zero_()
        gru.weight_hh_l0[2 * HIDDEN :] = torch.randn(HIDDEN, HIDDEN) * gain / HIDDEN**0.5
        gru.bias_ih_l0[:HIDDEN], gru.bias_ih_l0[HIDDEN : 2 * HIDDEN] = 20.0, -20.0
    return nn.ModuleDict({"gru": gru, "head": nn.Linear(HIDDEN, 1)})


def clipped_sum(network: nn.ModuleDict, records: Tensor) -> Tensor:
    """The sum [d] that would be noised, of records [steps, patients, inputs]."""
    hooks = BookKeepingHooks(network, loss_reduction="sum", require_rows=True)
    with Rows(torch.arange(records.shape[1]), records.shape[1]):
        states, _ = network["gru"](records)
        logits = network["head"](states[-1])
    logits.sum().backward()
    sums = hooks.book.gradients().clipped_sum(lambda norms: clip_weights(norms, CLIP, torch.float32))
    hooks.cleanup()
    return torch.cat([part.flatten() for part in sums.values()])


def largest_move(patients: int, steps: int, gain: float) -> float:
    """The largest distance, in C, between the sum of all patients and that of all but one."""
    network = chaotic(gain)
    records = torch.randn(steps, patients, INPUTS, generator=torch.Generator().manual_seed(1))
    whole = clipped_sum(network, records)
    others = [[other for other in range(patients) if other != one] for one in range(patients)]
    return max(float((whole - clipped_sum(network, records[:, kept])).norm()) / CLIP for kept in others)


def main() -> None:
    """Print the table."""
    print("patients  steps  gain  moved by")
    for gain in (1.0, 3.0):
        for patients in (3, 4, 5, 16):
            print(f"{patients:8d}  {100:5d}  {gain:4.1f}  {largest_move(patients, 100, gain):.3f} C")


if __name__ == "__main__":
    main()
