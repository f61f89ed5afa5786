"""Networks and ragged records for the tests of the private step, small enough for an autograd loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from common.models import recurrent
from common.privacy.rows import Rows

FEATURES, CODES, EMBEDDED, HIDDEN = 3, 7, 4, 5
POOLINGS = (("last",), ("mean",), ("last", "mean"))
CELLS = ("GRU", "LSTM", "RNN")  # and "ReLU", an RNN with that nonlinearity
HEADS = ("linear", "tanh", "norm")
BACKENDS = ("blocked", "fused")  # see common.models.recurrent

Loss = Callable[[nn.Module, Sequence[int]], Tensor]


@dataclass(frozen=True)
class Record:
    """One sequence: values [T, FEATURES], codes of each step, a label."""

    values: Tensor
    codes: list[list[int]]
    label: float


Cohort = list[list[Record]]  # by patient


class Diagnosis(nn.Module):
    """Codes and values -> recurrence -> last state, mean of states -> head -> logit. `layers`: torch.nn or ours."""

    def __init__(
        self,
        layers: ModuleType,
        cell: str,
        pooling: tuple[str, ...],
        *,
        num_layers: int = 1,
        bidirectional: bool = False,
        bias: bool = True,
        head: str = "linear",
        mode: str = "sum",
    ) -> None:
        super().__init__()
        self.pooling = pooling
        self.codes = nn.EmbeddingBag(CODES, EMBEDDED, mode=mode)
        self.values = nn.Linear(FEATURES, EMBEDDED)
        self.norm = nn.LayerNorm(EMBEDDED)
        kind, options = ("RNN", {"nonlinearity": "relu"}) if cell == "ReLU" else (cell, {})
        self.recurrence = getattr(layers, kind)(
            EMBEDDED, HIDDEN, num_layers=num_layers, bidirectional=bidirectional, bias=bias, **options
        )
        width = HIDDEN * (1 + bidirectional) * len(pooling)
        heads: dict[str, Callable[[], nn.Module]] = {
            "linear": lambda: nn.Linear(width, 1, bias=bias),
            "tanh": lambda: nn.Sequential(nn.Linear(width, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1, bias=bias)),
            "norm": lambda: nn.Sequential(nn.Linear(width, HIDDEN), nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 1)),
        }
        self.head = heads[head]()

    def forward(self, sequences: Sequence[Record]) -> Tensor:
        """Logits, in the order of `sequences`."""
        lengths = [len(s.values) for s in sequences]
        packed = pack_sequence([s.values for s in sequences], enforce_sorted=False)
        owner = pack_sequence([torch.full((n,), i) for i, n in enumerate(lengths)], enforce_sorted=False).data
        step = pack_sequence([torch.arange(n) for n in lengths], enforce_sorted=False).data
        codes = [sequences[i].codes[t] for i, t in zip(owner.tolist(), step.tolist(), strict=True)]
        offsets = torch.tensor([0] + [len(c) for c in codes[:-1]]).cumsum(0)
        with Rows.of(packed):
            embedded = self.codes(torch.tensor([c for of_row in codes for c in of_row], dtype=torch.long), offsets)
            x = self.norm(self.values(packed.data) + embedded)
        states, last = self.recurrence(packed._replace(data=x))
        h_n = last[0] if isinstance(last, tuple) else last
        top = h_n[-2:] if self.recurrence.bidirectional else h_n[-1:]
        total = states.data.new_zeros(len(sequences), states.data.shape[1]).index_add(0, owner, states.data)
        pieces = {"last": top.transpose(0, 1).flatten(1), "mean": total / torch.tensor(lengths)[:, None]}
        logits: Tensor = self.head(torch.cat([pieces[p] for p in self.pooling], dim=1))[:, 0]
        return logits


def twins(
    cell: str, pooling: tuple[str, ...], seed: int, dtype: torch.dtype, **options: Any
) -> tuple[Diagnosis, Diagnosis]:
    """The same network from our layers and from torch's, with the same weights. `options`: see Diagnosis."""
    torch.manual_seed(seed)
    both = [Diagnosis(layers, cell, pooling, **options).to(dtype) for layers in (recurrent, nn)]
    both[1].load_state_dict(both[0].state_dict())
    return both[0], both[1]


def make_cohort(
    seed: int, patients: int, dtype: torch.dtype, *, steps: int = 10, sequences: int = 5, ragged: bool = True
) -> Cohort:
    """Random patients: 1 to `sequences` sequences of 1 to `steps` steps (all of one length if not ragged).

    A step has 0 to 3 codes.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    def sequence() -> Record:
        n = draw(1, steps) if ragged else length
        values = torch.randn(n, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
        codes = [[draw(0, CODES - 1) for _ in range(draw(0, 3))] for _ in range(n)]
        return Record(values, codes, float(draw(0, 1)))

    length = 0 if ragged else draw(1, steps)
    return [[sequence() for _ in range(draw(1, sequences))] for _ in range(patients)]


def altered(cohort: Cohort, patient: int, change: Callable[[Tensor], Tensor]) -> Cohort:
    """The cohort with one patient's values changed."""
    mine = [replace(s, values=change(s.values)) for s in cohort[patient]]
    return [mine if p == patient else sequences for p, sequences in enumerate(cohort)]


def in_float64(cohort: Cohort) -> Cohort:
    """The same records, to be computed with in float64."""
    return [[replace(s, values=s.values.double()) for s in sequences] for sequences in cohort]


def loss_over(cohort: Cohort, seed: int = 0) -> Loss:
    """Cross-entropy, averaged over a patient's sequences and summed over patients; sequences in random order."""

    def loss(network: nn.Module, patients: Sequence[int]) -> Tensor:
        pairs = [(i, s) for i, patient in enumerate(patients) for s in cohort[patient]]
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
        owner = torch.tensor([pairs[i][0] for i in order])
        chosen = [pairs[i][1] for i in order]
        with Rows(owner, len(patients)):
            logits = network(chosen)
        labels = torch.tensor([s.label for s in chosen], dtype=logits.dtype)
        losses = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return (losses / torch.bincount(owner, minlength=len(patients))[owner]).sum()

    return loss


def cancelling(patients: int, steps: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """Gradients [P, T, outputs] and inputs [P, T, inputs] of rows whose products all but cancel, for each patient.

    The second half of the rows repeats the first: inputs up to 1e-4 of noise, gradients with the other sign.
    """
    generator = torch.Generator().manual_seed(0)
    a, x, noise = (torch.randn(patients, steps // 2, width, generator=generator) for width in (outputs, inputs, inputs))
    return torch.cat([a, -a], 1), torch.cat([x, x * (1 + 1e-4 * noise)], 1)
