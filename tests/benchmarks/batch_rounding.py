"""How far one patient's removal moves the clipped sum if a server chose weights that amplify rounding.

    python -m tests.benchmarks.batch_rounding

A product of n rows may round a row otherwise than one of n - 1 rows does. For trained weights that is 1e-7 of a
gradient. A recurrence whose weights make it chaotic multiplies it at every step, until the others' gradients are other
gradients: each of them is still clipped to C, but the sum has moved by more than the one patient. docs/guarantees.md
says what follows.

Columns: cell, patients in the batch, time steps, gain of the recurrent weights (1: about as at initialisation, 3:
chaotic), and the largest move over all removals, in C.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.models.recurrent import GRU, LSTM, RNN
from common.privacy.bookkeeping import BookKeepingHooks, clip_weights
from common.privacy.rows import Rows

HIDDEN, INPUTS, STEPS, CLIP = 32, 8, 100, 0.01
KINDS = {"gru": GRU, "lstm": LSTM, "rnn": RNN}


def chaotic(cell: str, gain: float) -> nn.ModuleDict:
    """A layer that is a plain tanh recurrence, its gates held open or shut, with random weights of this gain."""
    torch.manual_seed(0)
    layer, unit = KINDS[cell](INPUTS, HIDDEN), HIDDEN
    with torch.no_grad():
        layer.weight_hh_l0.zero_()
        candidate = {"rnn": 0, "gru": 2 * unit, "lstm": 2 * unit}[cell]
        layer.weight_hh_l0[candidate : candidate + unit] = torch.randn(unit, unit) * gain / unit**0.5
        open_, shut = {"rnn": ((), ()), "gru": ((0,), (1,)), "lstm": ((0, 3), (1,))}[cell]
        for gates, bias in ((open_, 20.0), (shut, -20.0)):
            for gate in gates:
                layer.bias_ih_l0[gate * unit : (gate + 1) * unit] = bias
    return nn.ModuleDict({"recurrence": layer, "head": nn.Linear(HIDDEN, 1)})


def clipped_sum(network: nn.ModuleDict, records: Tensor) -> Tensor:
    """The sum [d] that would be noised, of records [steps, patients, inputs]."""
    hooks = BookKeepingHooks(network, loss_reduction="sum", require_rows=True)
    with Rows(torch.arange(records.shape[1]), records.shape[1]):
        states, _ = network["recurrence"](records)
        logits = network["head"](states[-1])
    logits.sum().backward()
    sums = hooks.book.gradients().clipped_sum(lambda norms: clip_weights(norms, CLIP, torch.float32))
    hooks.cleanup()
    return torch.cat([part.flatten() for part in sums.values()])


def largest_move(cell: str, patients: int, steps: int, gain: float) -> float:
    """The largest distance, in C, between the sum of all patients and that of all but one."""
    network = chaotic(cell, gain)
    records = torch.randn(steps, patients, INPUTS, generator=torch.Generator().manual_seed(1))
    whole = clipped_sum(network, records)
    others = [[other for other in range(patients) if other != one] for one in range(patients)]
    return max(float((whole - clipped_sum(network, records[:, kept])).norm()) / CLIP for kept in others)


def main() -> None:
    """Print the table."""
    print("cell  patients  steps  gain  moved by")
    for cell in KINDS:
        for gain in (1.0, 3.0):
            for patients in (3, 4, 5, 16):
                print(
                    f"{cell:4s}  {patients:8d}  {100:5d}  {gain:4.1f}  {largest_move(cell, patients, 100, gain):.3f} C"
                )


if __name__ == "__main__":
    main()
