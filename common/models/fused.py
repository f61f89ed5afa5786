"""The recurrence on torch's own kernels, which on a GPU are cuDNN's fused ones: the alternative to `recurrence`.

A fused kernel runs all time steps in one call, a GPU's only fast way through short steps, but it keeps its gate
gradients to itself. It does hand out the gradient of its input. So it is given the finished projections
P = x W_ih' + b_ih as its input, an identity matrix as its input weight and no input bias: P arrives at the gates as it
is, and what backward sends to P is the gradient of the gates' arguments, which is what a private step needs. For the
hidden share of a GRU's candidate, W_hn h + b_hn, which the reset gate r multiplies, that gradient is r times the
candidate's, with r computed again by one product. The kernel's weights want no gradient, so cuDNN forms none.

What this costs: two products with an identity [gates x H, gates x H], and one direction of one layer at a time. On a
CPU a private step takes two to four times as long as with `recurrence`, whose results it equals to rounding.

TF32. By default torch lets cuDNN round the factors of float32 products to 10 bits, and the identity product would so
round every projection and every gate gradient. Here it may not, in either pass. torch has only a process-wide switch
for that, so it is turned for the duration of the call and turned back. The backward kernel runs inside this module's
own backward pass (and not in the surrounding graph, where it would run whenever autograd pleases) so that the switch
holds for it too. Another thread that turns the same switch meanwhile can cost accuracy, never privacy: norms are
taken from the gate gradients as they are.

One difference from `recurrence`: 0 x inf is NaN, so a row whose projection overflows gets NaN in all of its gates,
where a saturated sigmoid may have stayed finite. It is that patient's row alone, and counts as zero like any that is
not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import PackedSequence

from common.models.layout import Layout
from common.models.recurrence import CELLS, Parameters, Tape


class _Blank(nn.RNNBase):
    """A layer whose parameters start as they are found: they are written at once, and random numbers cost time."""

    def reset_parameters(self) -> None:
        """Leaves them."""


class _GRU(_Blank, nn.GRU):
    """See _Blank."""


class _LSTM(_Blank, nn.LSTM):
    """See _Blank."""


class _RNN(_Blank, nn.RNN):
    """See _Blank."""


KERNELS: dict[str, Callable[..., nn.RNNBase]] = {"GRU": _GRU, "LSTM": _LSTM, "RNN_TANH": _RNN, "RNN_RELU": _RNN}


def usable(x: Tensor) -> bool:
    """Whether torch would run a layer on `x` by cuDNN: on CUDA, with cuDNN built in and not switched off."""
    return x.is_cuda and bool(torch.backends.cudnn.is_acceptable(x))


def run(
    mode: str,
    layout: Layout,
    tape: Tape | None,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    parameters: Parameters,
) -> tuple[Tensor, Tensor | None]:
    """One layer in one direction over a packed batch with at least one row: `recurrence.run` by other means.

    Arguments, results, and what the tape receives are those of `recurrence.run`, the order of gate columns included.
    """
    states: Tensor
    memory: Tensor | None
    anchor = None if tape is None else tape.anchor
    held = parameters if tape is None else tuple(p.detach() for p in parameters)
    states, memory = FusedRecurrence.apply(mode, layout, tape, anchor, x, h0, c0, *held)  # type: ignore[no-untyped-call]  # torch's typing
    return states, memory


class FusedRecurrence(torch.autograd.Function):
    """See `run`, which is its typed front."""

    @staticmethod
    def forward(
        ctx: Any,  # torch gives the context no type
        mode: str,
        layout: Layout,
        tape: Tape | None,
        anchor: Tensor | None,  # noqa: ARG004 (it is here to want a gradient, never to get one)
        x: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor,
        b_hh: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """States after each packed row, last cell states."""
        _, _, _, _, _, wants_h0, wants_c0, *_ = ctx.needs_input_grad
        projections = torch.addmm(b_ih, x, w_ih.t()).requires_grad_()
        first_h = h0.detach().contiguous().requires_grad_(wants_h0)
        first_c = None if c0 is None else c0.detach().contiguous().requires_grad_(wants_c0)
        kernel = _kernel(mode, w_hh, b_hh)
        with torch.enable_grad(), _full_precision(x):
            outputs, last_c = _through(kernel, layout, projections, first_h, first_c)
        states = outputs.detach()
        ctx.save_for_backward(x, w_ih, states)  # so that torch notices if somebody changes any in place
        ctx.mode, ctx.layout, ctx.tape = mode, layout, tape
        ctx.kernel, ctx.ends, ctx.starts = kernel, (outputs, last_c), (projections, first_h, first_c)
        ctx.set_materialize_grads(False)
        return states, None if last_c is None else last_c.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_states: Tensor | None, grad_memory: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of x, h0, c0 and, without a tape, of the parameters."""
        tape: Tape | None = ctx.tape
        if ctx.ends is None:
            raise RuntimeError(
                "second backward pass through one forward pass of a recurrent layer in private training, which keeps "
                "one set of gate gradients; run forward again"
            )
        x, w_ih, states = ctx.saved_tensors
        _, _, _, _, wants_x, _, _, *wants_weights = ctx.needs_input_grad
        projections, first_h, _ = ctx.starts
        if grad_states is None:
            grad_states = states.new_zeros(()).expand_as(states)
        with _full_precision(x):
            grads = _gradients(ctx.ends, ctx.starts, (grad_states, grad_memory), retain_graph=tape is None)
        dP, grad_h0, grad_c0 = grads
        assert dP is not None
        previous = _previous(ctx.layout, first_h.detach(), states)
        hidden = list(dP.chunk(len(CELLS[ctx.mode].TORCH_HIDDEN), dim=1))  # of the gates' hidden shares, torch's order
        if ctx.mode == "GRU":
            hidden[2] = hidden[2] * _reset_gate(ctx.kernel, projections.detach(), previous)
        weights: tuple[Tensor | None, ...] = (None,) * 4
        if tape is not None:
            _record(tape, ctx.mode, dP, hidden, x, previous)
            ctx.kernel = ctx.ends = ctx.starts = None
        elif any(wants_weights):
            dH = torch.cat(hidden, dim=1)
            weights = (dP.t() @ x, dH.t() @ previous, dP.sum(0), dH.sum(0))
        return (None, None, None, None, dP @ w_ih if wants_x else None, grad_h0, grad_c0, *weights)


def _kernel(mode: str, w_hh: Tensor, b_hh: Tensor) -> nn.RNNBase:
    """A layer of torch's for finished projections. Made anew for each pass: it holds copies that nothing else changes.

    Made by torch's class and not by a call of the function behind it, because cuDNN wants its weights in one piece of
    memory, in an order of its own, and torch's class knows how.
    """
    gates, hidden_size = w_hh.shape
    options = {"nonlinearity": "relu"} if mode == "RNN_RELU" else {}
    kernel = KERNELS[mode](gates, hidden_size, device=w_hh.device, dtype=w_hh.dtype, **options).requires_grad_(False)
    w_identity, own_w_hh, own_b_ih, own_b_hh = kernel.parameters()
    nn.init.eye_(w_identity)
    own_w_hh.copy_(w_hh)
    own_b_ih.zero_()
    own_b_hh.copy_(b_hh)
    return kernel


def _through(
    kernel: nn.RNNBase, layout: Layout, projections: Tensor, h0: Tensor, c0: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """States [N, H] after each packed row and last cell states [B, H], by torch's kernel."""
    given = (
        projections.view(layout.steps, layout.sequences, -1)
        if layout.uniform
        else PackedSequence(projections, torch.tensor(layout.sizes))
    )
    outputs, last = kernel(given, h0[None] if c0 is None else (h0[None], c0[None]))
    states = outputs.flatten(0, 1) if isinstance(outputs, Tensor) else outputs.data
    return states, None if c0 is None else last[1][0]


def _gradients(
    ends: tuple[Tensor, Tensor | None],
    starts: tuple[Tensor, Tensor, Tensor | None],
    arriving: tuple[Tensor | None, Tensor | None],
    *,
    retain_graph: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of projections, h0, c0, those that want one; from those of states and last cell states, None for zero."""
    outputs = [(end, grad) for end, grad in zip(ends, arriving, strict=True) if end is not None and grad is not None]
    wanted = [start for start in starts if start is not None and start.requires_grad]
    found = iter(
        torch.autograd.grad(
            [end for end, _ in outputs], wanted, [grad for _, grad in outputs], retain_graph=retain_graph
        )
    )
    dP, grad_h0, grad_c0 = (next(found) if s is not None and s.requires_grad else None for s in starts)
    return dP, grad_h0, grad_c0


def _previous(layout: Layout, h0: Tensor, states: Tensor) -> Tensor:
    """[N, H] the state before each packed row."""
    history = torch.cat([h0, states])
    return history[: layout.rows] if layout.uniform else history.index_select(0, layout.previous)


def _reset_gate(kernel: nn.RNNBase, projections: Tensor, previous: Tensor) -> Tensor:
    """[N, H] r = sigmoid(P_r + W_hr h + b_hr): the first of torch's gates."""
    H = previous.shape[1]
    _, w_hh, _, b_hh = kernel.parameters()
    return torch.addmm(b_hh[:H], previous, w_hh[:H].t()).add_(projections[:, :H]).sigmoid_()


def _record(tape: Tape, mode: str, dP: Tensor, hidden: list[Tensor], x: Tensor, previous: Tensor) -> None:
    """Hands over gate gradients in the order of the cell's columns, as `recurrence` does."""
    cell = CELLS[mode]
    unit = previous.shape[1]
    A = tape.lend(len(dP), cell.GATES * unit, dP)
    inputs = dP.chunk(len(cell.TORCH_INPUT), dim=1)
    for (first, _), order, parts in (
        (cell.HIDDEN, cell.TORCH_HIDDEN, hidden),
        (cell.INPUT, cell.TORCH_INPUT, inputs),  # a gate in both has one gradient
    ):
        for gate, part in zip(order, parts, strict=True):
            A[:, (first + gate) * unit : (first + gate + 1) * unit] = part
    tape.keep(A, x, previous)


@contextmanager
def _full_precision(x: Tensor) -> Iterator[None]:
    """Keeps cuDNN's recurrent kernels from rounding float32 factors to TF32, if they work on `x`."""
    cudnn: Any = torch.backends.cudnn  # its switches have no types
    # torch 2.9 has a switch for recurrent kernels alone and warns of the older one, which governs convolutions too.
    where, name, off = (cudnn.rnn, "fp32_precision", "ieee") if hasattr(cudnn, "conv") else (cudnn, "allow_tf32", False)
    before = getattr(where, name) if x.is_cuda else off
    if before not in ("tf32", True):
        yield
        return
    setattr(where, name, off)
    try:
        yield
    finally:
        setattr(where, name, before)
