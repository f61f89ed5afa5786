"""The book: what the trainable modules of a network left behind in one forward and backward pass.

From it come the norm of every patient's whole gradient and the weighted sum of gradients, without a second backward
pass (Bu et al. 2023, arXiv 2210.00038, call it book-keeping). It is filled by hooks, read by the optimizer, and
emptied after every clip: one pass at a time, because two passes may number their patients differently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from common.models.recurrent import Recurrent
from common.privacy.norms import SquaredNorms
from common.privacy.products import ProductGradient
from common.privacy.rows import Rows
from common.privacy.samplers import SAMPLERS, PatientGradient, Strand, Use, fallback, recurrent


@dataclass(frozen=True)
class PatientGradients:
    """The gradients of all trained parameters, one per patient.

    Attributes:
        count: P, patients.
        parts: modules' gradients, in any order.
        scale: 1, or P where the loss was a mean over patients (Opacus's loss_reduction="mean").
        device: where they are.
    """

    count: int
    parts: Sequence[PatientGradient]
    scale: float
    device: torch.device

    def norms(self) -> Tensor:
        """[P] float64: upper bounds on the norms over all parameters together; not finite for NaN or overflow."""
        return self._squared_norms(self.parts).bounds() * self.scale

    def weighted_sum(self, weights: Tensor) -> dict[Parameter, Tensor]:
        """Sum of weight [P] times gradient, float64. A weight of 0 leaves the patient out, NaN and all."""
        sums: dict[Parameter, Tensor] = {}
        for part in self.parts:
            sums.update(part.weighted_sum(weights * self.scale))
        return sums

    def clipped_sum(self, weigh: Callable[[Tensor], Tensor]) -> dict[Parameter, Tensor]:
        """`weighted_sum(weigh(norms()))` at less cost: the largest product is formed once, see products.py."""
        last = max((p for p in self.parts if isinstance(p, ProductGradient)), key=lambda p: p.cost, default=None)
        if last is None:
            return self.weighted_sum(weigh(self.norms()))
        others = [part for part in self.parts if part is not last]
        rest = self._squared_norms(others)
        weights, sums = last.clipped_sum(rest, lambda bounds: weigh(bounds * self.scale) * self.scale)
        for part in others:
            sums.update(part.weighted_sum(weights))
        return sums

    def _squared_norms(self, parts: Sequence[PatientGradient]) -> SquaredNorms:
        norms = [part.squared_norms() for part in parts]
        zero = SquaredNorms.zero(self.count, self.device)
        return SquaredNorms(sum((n.net for n in norms), zero.net), sum((n.gross for n in norms), zero.gross))


class Book:
    """Uses and strands of one pass, and scratch memory that is lent again from step to step.

    Fresh gate buffers of a few megabytes cost page faults at every step; the same memory again costs none.

    Args:
        loss_reduction: "sum", or "mean" if the loss is a mean over patients.
    """

    def __init__(self, loss_reduction: str) -> None:
        self.loss_reduction = loss_reduction
        self.anchor = torch.zeros((), requires_grad=True)  # makes backward run where no input wants a gradient
        self._uses: list[Use] = []
        self._strands: list[Strand] = []
        self._spare: list[Tensor] = []

    def __bool__(self) -> bool:
        return bool(self._uses or self._strands)

    def note(self, entry: Use | Strand) -> None:
        """Adds what one module, or one layer and direction, left behind."""
        if isinstance(entry, Use):
            self._uses.append(entry)
        else:
            self._strands.append(entry)

    def clear(self) -> None:
        """Forgets the pass; its gate buffers may be lent again."""
        self._spare += [strand.memory for strand in self._strands]
        self._uses.clear()
        self._strands.clear()

    def refuse_second_pass(self, name: str) -> None:
        """Raises RuntimeError if an earlier backward pass was not clipped yet."""
        if self:
            raise RuntimeError(
                f"{name}: forward pass while an earlier backward pass waits to be clipped, and patient 0 of one may "
                "not be patient 0 of the other; call optimizer.accumulate(), step() or zero_grad() first"
            )

    def lend(self, rows: int, columns: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """A buffer and its view [rows, columns], in the type and on the device of `like`."""
        size = rows * columns
        for position, memory in enumerate(self._spare):
            if memory.numel() >= size and memory.dtype == like.dtype and memory.device == like.device:
                del self._spare[position]
                return memory, memory[:size].view(rows, columns)
        self._spare.clear()  # too small, all of them: do not hoard
        memory = like.new_empty(size + size // 8)  # the next batch may be a little larger
        return memory, memory[:size].view(rows, columns)

    def gradients(self) -> PatientGradients:
        """The gradients per patient of the pass. The book must not be empty.

        Raises:
            ValueError: modules disagree on the number of patients.
            RuntimeError: float32 products may be rounded to fewer digits than norms allow for.
        """
        entries: list[Use | Strand] = [*self._uses, *self._strands]
        counts = sorted({entry.rows.count for entry in entries})
        if len(counts) != 1:
            raise ValueError(
                f"modules disagree on the number of patients: {counts}; name the owners of rows with Rows(...)"
            )
        if torch.get_float32_matmul_precision() != "highest":
            raise RuntimeError(
                f"float32 matrix products run at {torch.get_float32_matmul_precision()!r} precision, for which norms "
                'are no bounds; call torch.set_float32_matmul_precision("highest")'
            )
        parts = [SAMPLERS.get(type(uses[0].module), fallback)(uses) for uses in _by_module(self._uses)]
        parts += [recurrent(strands) for strands in _by_strand(self._strands)]
        scale = float(counts[0]) if self.loss_reduction == "mean" else 1.0
        return PatientGradients(counts[0], parts, scale, entries[0].rows.device)


class BookTape:
    """Where one strand of a recurrent layer leaves its gate gradients: a page of the book."""

    def __init__(self, book: Book, layer: Recurrent, suffix: str, rows: Rows) -> None:
        self.anchor = book.anchor
        self._book, self._layer, self._suffix, self._rows = book, layer, suffix, rows

    def lend(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """Memory for the gates."""
        self._memory, gates = self._book.lend(rows, columns, like)
        return gates

    def keep(self, gates: Tensor, inputs: Tensor, states: Tensor) -> None:
        """Notes the strand."""
        self._book.note(Strand(self._layer, self._suffix, gates, inputs.detach(), states, self._rows, self._memory))


def _by_module(uses: Sequence[Use]) -> list[list[Use]]:
    grouped: dict[nn.Module, list[Use]] = {}
    for use in uses:
        grouped.setdefault(use.module, []).append(use)
    return list(grouped.values())


def _by_strand(strands: Sequence[Strand]) -> list[list[Strand]]:
    grouped: dict[tuple[nn.Module, str], list[Strand]] = {}
    for strand in strands:
        grouped.setdefault((strand.layer, strand.suffix), []).append(strand)
    return list(grouped.values())
