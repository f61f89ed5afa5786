"""What every recurrent cell shares: one layer, in one direction, on its way over one packed batch.

A cell owns the buffers of one pass and knows three things: its gates' equations (`advance`), their derivatives
(`retreat`), and the order of its gate columns. The schedule stands here, once, for all cells: both passes go
block by block (`FLOATS_PER_BLOCK` numbers of gates), so that a block stays in the processor's cache between its input
projection, its time steps and its derivatives. Measured on 256 sequences of 100 steps, hidden size 128, that saves a
quarter of the time; on small batches it changes nothing.

Time steps are views into buffers that exist already, made by one `split` per block: the alternative, indexing
inside the loop, costs as much as the arithmetic of a small batch. Within a step the hidden product is added in
place, so each step is one matrix product and a few element-wise operations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from common.models.layout import Block, Layout

FLOATS_PER_BLOCK = 1 << 18  # a megabyte of float32 gates; half of it costs small and ragged batches 3 to 7 %
LEAST_ROWS = 12  # of a product, see add_product; MKL needs 4 on one thread, 12 on two (measured)


def add_product(total: Tensor, rows: Tensor, weight: Tensor) -> None:
    """Adds rows [n, F] @ weight [F, G] to total [n, G], in place; each row is rounded alike, however many there are.

    For few rows MKL has other kernels. A patient's gradient would then depend in its last bit on who else
    still runs, and weights that make the recurrence chaotic turn that bit into another gradient: the clipped sum moved
    by 4 C where one of four patients was taken away. So few rows are computed among zeros.
    """
    count = len(rows)
    if count >= LEAST_ROWS:
        total.addmm_(rows, weight)
        return
    among, sums = rows.new_zeros(LEAST_ROWS, rows.shape[1]), total.new_zeros(LEAST_ROWS, total.shape[1])
    among[:count], sums[:count] = rows, total
    total.copy_(sums.addmm_(among, weight)[:count])


def put_product(out: Tensor, rows: Tensor, weight: Tensor) -> None:
    """Writes rows @ weight to out; rounded as in `add_product`."""
    if len(rows) >= LEAST_ROWS:
        torch.mm(rows, weight, out=out)
    else:
        add_product(out.zero_(), rows, weight)


def reorder(weight: Tensor, order: Sequence[int]) -> Tensor:
    """Rows of a weight or bias [gates x H, ...], its gates put into another order."""
    parts = weight.chunk(len(order))
    return torch.cat([parts[gate] for gate in order])


class Cell(ABC):
    """One layer and direction over one batch.

    Args:
        layout: positions of the packed rows.
        gates: [N, gates x H] scratch memory; holds the gates after `forward`.
        h0: [B, H] initial states, in sorted order.
        c0: [B, H] initial cell states (LSTM), else None.
        w_ih, w_hh, b_ih, b_hh: torch.nn's parameters [gates x H, D], [gates x H, H], [gates x H] twice.
    """

    GATES: ClassVar[int]  # gate columns per row, in units of H
    INPUT: ClassVar[tuple[int, int]]  # columns, in units of H, whose gradient belongs to w_ih and b_ih
    HIDDEN: ClassVar[tuple[int, int]]  # columns whose gradient belongs to w_hh and b_hh
    TORCH_INPUT: ClassVar[Sequence[int]] = (0,)  # our input gate columns -> torch's order
    TORCH_HIDDEN: ClassVar[Sequence[int]] = (0,)  # our hidden gate columns -> torch's order

    w_ih: Tensor  # [input columns, D], our gate order
    w_hh: Tensor  # [hidden columns, H], our gate order
    bias: Tensor  # [input columns], everything that does not depend on the state

    def __init__(
        self,
        layout: Layout,
        gates: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor,
        b_hh: Tensor,
    ) -> None:
        self.layout = layout
        self.gates = gates
        self.hidden_size = w_hh.shape[1]
        self.blocks = layout.blocks(gates.shape[1], FLOATS_PER_BLOCK)
        self.states = self.history(h0)  # [B + N, H]: initial states, then the state after each packed row
        self.prepare(c0, w_ih, w_hh, b_ih, b_hh)
        self.w_hh_t = self.w_hh.t().contiguous()

    # Forward: x -> gates -> states

    def forward(self, x: Tensor) -> Tensor:
        """States [N, H] after each packed row of x [N, D]."""
        for block in self.blocks:
            inputs = self.columns(self.gates[block.rows], self.INPUT)
            if len(inputs) >= LEAST_ROWS:
                torch.addmm(self.bias, x[block.rows], self.w_ih.t(), out=inputs)
            else:
                inputs[:] = self.bias
                add_product(inputs, x[block.rows], self.w_ih.t())
            self.advance(block)
        return self.states[self.layout.sequences :]

    # Backward: dL/d states -> dL/d gates (before their nonlinearity)

    def backward(self, out: Tensor, grad_states: Tensor, grad_x: Tensor | None) -> Tensor:
        """Writes the gate gradients A [N, gates x H] and the input's gradient; returns that of h0 [B, H].

        Args:
            out: receives A; may be `gates` itself, which are then lost.
            grad_states: [N, H] dL/dh of each row as the rest of the network sees it.
            grad_x: [N, D] receives dL/dx if wanted.
        """
        most = max((block.rows.stop - block.rows.start for block in self.blocks), default=0)
        scratch = out.new_empty(most, out.shape[1])
        self.carried = grad_states.new_zeros(self.layout.sequences, self.hidden_size)  # from the later step
        self.running = 0  # rows of the later step
        self._total = torch.empty_like(self.carried)
        for block in reversed(self.blocks):
            A = out[block.rows]
            self.retreat(block, scratch[: len(A)], A, grad_states[block.rows])
            if grad_x is not None:
                put_product(grad_x[block.rows], self.columns(A, self.INPUT), self.w_ih)
        return self.carried

    def arriving(self, own: Tensor) -> Tensor:
        """dL/dh of a step: its own gradient [k, H] plus what the later step, with fewer rows, sent back."""
        size, later = own.shape[0], self.running
        self.running = size
        if size == later:
            return torch.add(own, self.carried[:size], out=self._total[:size])
        total = self._total[:size]
        torch.add(own[:later], self.carried[:later], out=total[:later])
        total[later:] = own[later:]  # sequences whose last step this is
        return total

    # What differs between cells

    @abstractmethod
    def prepare(self, c0: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> None:
        """Puts the parameters into our gate order: `w_ih`, `w_hh`, `bias`; sets up further state."""

    @abstractmethod
    def advance(self, block: Block) -> None:
        """Runs the time steps of a block: gates (holding their input share) and states are filled in."""

    @abstractmethod
    def retreat(self, block: Block, slopes: Tensor, A: Tensor, grad: Tensor) -> None:
        """Runs the time steps of a block backwards.

        `slopes` [rows, gates x H] is scratch; `A` receives the gate gradients; `grad` [rows, H] is dL/dh.
        `A` may be the memory of the gates: a step reads its own gates before it writes its gradients.
        """

    # Views

    def columns(self, rows: Tensor, units: tuple[int, int]) -> Tensor:
        """Gate columns first to last (in units of H) of [N, gates x H]."""
        return rows[:, units[0] * self.hidden_size : units[1] * self.hidden_size]

    def steps(self, block: Block, first: int, last: int) -> tuple[Tensor, ...]:
        """For each step of the block, its rows of the gate columns first to last (in units of H)."""
        return torch.split(self.columns(self.gates[block.rows], (first, last)), block.sizes)

    def history(self, initial: Tensor) -> Tensor:
        """[B + N, H]: a row for each initial state and for the state after each packed row."""
        history = self.gates.new_empty(self.layout.sequences + self.layout.rows, self.hidden_size)
        history[: self.layout.sequences] = initial
        return history

    def after(self, history: Tensor, block: Block) -> Tensor:
        """The rows of a history that the block's steps write."""
        first = self.layout.sequences
        return history[first + block.rows.start : first + block.rows.stop]

    def preceding(self, history: Tensor, rows: slice) -> Tensor:
        """The state before each packed row in `rows`: a view for equal lengths, else a gathered copy."""
        if self.layout.uniform:
            return history[rows]
        return history.index_select(0, self.layout.previous[rows])


def backwards(block: Block, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Step by step from the block's last to its first: the rows of each tensor."""
    return zip(*(torch.split(tensor, block.sizes)[::-1] for tensor in tensors), strict=True)
