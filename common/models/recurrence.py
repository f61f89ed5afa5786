"""Forward and backward through time as one autograd function, over packed rows.

With a tape (a private training pass) the backward pass hands over the gate gradients A, the layer inputs X and
the previous states H, and forms no weight gradient: the gradient of patient b is A_b' [X_b, H_b], and who holds A,
X and H can have its norm and any weighted sum without a second backward pass (book-keeping; Bu et al. 2023,
arXiv 2210.00038). Without a tape it is an ordinary differentiable function with ordinary weight gradients.

With a tape the gate gradients overwrite the gates, which halves the memory; the price is one backward pass per
forward pass, and a second one raises. Without a tape buffers are fresh, and backward may run again. Second
derivatives are not available either way.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.models.cells.cell import Cell, reorder
from common.models.cells.gru import GRUCell
from common.models.cells.lstm import LSTMCell
from common.models.cells.rnn import ReLUCell, TanhCell
from common.models.layout import Layout

CELLS: dict[str, type[Cell]] = {"GRU": GRUCell, "LSTM": LSTMCell, "RNN_TANH": TanhCell, "RNN_RELU": ReLUCell}

Parameters = tuple[Tensor, Tensor, Tensor, Tensor]  # weight_ih, weight_hh, bias_ih, bias_hh as torch.nn has them


class Tape(Protocol):
    """Where one layer and direction leaves what a private step needs, once per backward pass."""

    anchor: Tensor  # a scalar that wants a gradient, so that backward runs even when no input wants one

    def lend(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """Scratch memory [rows, columns] for the gates, in the type and on the device of `like`."""

    def keep(self, gates: Tensor, inputs: Tensor, states: Tensor) -> None:
        """Receives the gate gradients [N, gates x H], the inputs [N, D] and the previous states [N, H]."""


def run(
    mode: str,
    layout: Layout,
    tape: Tape | None,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    parameters: Parameters,
) -> tuple[Tensor, Tensor | None]:
    """One layer in one direction over a packed batch.

    Args:
        mode: torch.nn's name of the cell: GRU, LSTM, RNN_TANH or RNN_RELU.
        layout: positions of the packed rows.
        tape: receives gate gradients, in place of the parameters receiving theirs; None for ordinary gradients.
        x: [N, D] inputs.
        h0: [B, H] initial states, in sorted order.
        c0: [B, H] initial cell states (LSTM only).
        parameters: weight_ih [G, D], weight_hh [G, H], bias_ih [G], bias_hh [G] in torch.nn's gate order.

    Returns:
        The state after each packed row [N, H], and the last cell states [B, H] (LSTM only).
    """
    states: Tensor
    memory: Tensor | None
    if tape is None:
        states, memory = Recurrence.apply(CELLS[mode], layout, None, None, x, h0, c0, *parameters)  # type: ignore[no-untyped-call]  # torch's typing
    else:
        held = [p.detach() for p in parameters]
        states, memory = Recurrence.apply(CELLS[mode], layout, tape, tape.anchor, x, h0, c0, *held)  # type: ignore[no-untyped-call]  # torch's typing
    return states, memory


class Recurrence(torch.autograd.Function):
    """See `run`, which is its typed front."""

    @staticmethod
    def forward(
        ctx: Any,  # torch gives the context no type
        cell_type: type[Cell],
        layout: Layout,
        tape: Tape | None,
        anchor: Tensor | None,  # noqa: ARG004 (it is here to want a gradient, never to get one)
        x: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """States after each packed row, last cell states."""
        columns = cell_type.GATES * h0.shape[1]
        gates = x.new_empty(layout.rows, columns) if tape is None else tape.lend(layout.rows, columns, x)
        cell = cell_type(layout, gates, h0, c0, *parameters)
        states = cell.forward(x)
        memory = cell.last_memory() if isinstance(cell, LSTMCell) else None
        ctx.save_for_backward(x, states)  # so that torch notices if somebody changes either in place
        ctx.cell, ctx.tape = cell, tape
        ctx.set_materialize_grads(False)
        return states, memory

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_states: Tensor | None, grad_memory: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of x, h0, c0 and, without a tape, of the parameters."""
        cell: Cell | None = ctx.cell
        tape: Tape | None = ctx.tape
        if cell is None:
            raise RuntimeError(
                "second backward pass through one forward pass of a recurrent layer: its gate gradients "
                "have overwritten its gates; run forward again"
            )
        x, _ = ctx.saved_tensors
        _, _, _, _, wants_x, wants_h0, wants_c0, *wants_weights = ctx.needs_input_grad
        if grad_states is None:
            grad_states = x.new_zeros(()).expand(cell.layout.rows, cell.hidden_size)
        if isinstance(cell, LSTMCell):
            cell.start_back(grad_memory)
        A = cell.gates if tape is not None else torch.empty_like(cell.gates)
        grad_x = torch.empty_like(x) if wants_x else None
        grad_h0 = cell.backward(A, grad_states, grad_x)
        grad_c0 = cell.carried_c if isinstance(cell, LSTMCell) else None

        previous = cell.preceding(cell.states, slice(0, cell.layout.rows))
        if tape is not None:
            ctx.cell = None
            tape.keep(A, x, previous)
        weights = _weight_gradients(cell, A, x, previous) if any(wants_weights) else (None,) * 4
        states = (grad_x, grad_h0 if wants_h0 else None, grad_c0 if wants_c0 else None)
        return (None, None, None, None, *states, *weights)


def _weight_gradients(cell: Cell, A: Tensor, x: Tensor, previous: Tensor) -> Parameters:
    """A'X, A'H and the sums of A, in torch.nn's gate order."""
    A_ih, A_hh = cell.columns(A, cell.INPUT), cell.columns(A, cell.HIDDEN)
    return (
        reorder(A_ih.t() @ x, cell.TORCH_INPUT),
        reorder(A_hh.t() @ previous, cell.TORCH_HIDDEN),
        reorder(A_ih.sum(0), cell.TORCH_INPUT),
        reorder(A_hh.sum(0), cell.TORCH_HIDDEN),
    )
