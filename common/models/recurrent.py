"""RNN, GRU and LSTM that can be trained with privacy per patient.

Subclasses of torch.nn's layers: the same constructor, parameters (names, order and shapes, so state dicts load
both ways), inputs and outputs. Training passes run on `recurrence.run`, which keeps the gate gradients that the
private step needs, or on `fused.run`, which gets the same from cuDNN (see `backend`); evaluation, and anything under
`torch.no_grad()`, runs torch's own layer. Opacus replaces these layers by a Python loop of linear layers instead, with
other parameter names and orders and another dropout.

Differences from torch.nn: a batch of zero sequences is a batch like any other (Poisson sampling draws one), and
`proj_size` is refused. Outputs of a training pass must not be changed in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from common.models import fused, recurrence
from common.models.dropout import lock
from common.models.layout import Layout
from common.models.recurrence import Parameters, Tape

BACKENDS = ("auto", "blocked", "fused")

State = Tensor | tuple[Tensor, Tensor]

# (layer, layout, sorted_indices of the packed batch) -> a Tape for each weight suffix, such as "_l0_reverse".
Recorder = Callable[["Recurrent", Layout, Tensor | None], Callable[[str], Tape] | None]


@dataclass(frozen=True)
class _Batch:
    """Any input of a recurrent layer as packed rows, with the way back."""

    x: Tensor  # [N, D]
    layout: Layout
    sorted_indices: Tensor | None  # caller's order -> sorted order
    unsorted_indices: Tensor | None

    def sort(self, states: Tensor) -> Tensor:
        """[.., B, H] from the caller's order."""
        return states if self.sorted_indices is None else states.index_select(1, self.sorted_indices)

    def unsort(self, states: Tensor) -> Tensor:
        """[.., B, H] into the caller's order."""
        return states if self.unsorted_indices is None else states.index_select(1, self.unsorted_indices)


class Recurrent(nn.RNNBase):
    """What RNN, GRU and LSTM share. Shapes, options and defaults: see the torch.nn class of the same name.

    Args:
        backend: what runs training passes; see the attribute.
        locked_dropout: `dropout`, which acts between layers, draws one mask per sequence instead of one per step; see
            dropout.py, also for why privacy allows it.

    Attributes:
        recorder: set by `BookKeepingHooks` while the layer is trained privately, else None.
        backend: "blocked" is `recurrence.run`; "fused" is `fused.run`, torch's own kernels; "auto", the default, is
            "fused" on CUDA where cuDNN can be used, and else "blocked", which is faster on a CPU. Results are the same
            up to rounding, so it may be changed at any time between passes (`set_backend` does so for a network). It
            is not part of the state dict; copies and pickles keep it.

    Raises:
        ValueError: `proj_size` is set, or there is no such backend.
    """

    recorder: Recorder | None = None
    locked_dropout = False
    _backend = "auto"

    def __init__(self, *args: Any, backend: str = "auto", locked_dropout: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.backend = backend
        self.locked_dropout = locked_dropout
        if self.proj_size:
            raise ValueError(f"proj_size={self.proj_size}: projections are not supported; leave it at 0")

    @property
    def backend(self) -> str:
        """See the class."""
        return self._backend

    @backend.setter
    def backend(self, name: str) -> None:
        if name not in BACKENDS:
            raise ValueError(f"backend={name!r}; give one of {', '.join(BACKENDS)}")
        self._backend = name

    def forward(self, input: Tensor | PackedSequence, hx: State | None = None) -> Any:  # noqa: A002 (torch's name)
        """(outputs, h_n), for an LSTM (outputs, (h_n, c_n)); outputs are of the same kind as `input`."""
        rows = input.data if isinstance(input, PackedSequence) else input
        if rows.numel() and not (self.training and (torch.is_grad_enabled() or self._locks)):
            return super().forward(input, hx)
        batch = self._packed(input)
        h0, c0 = self._initial_states(batch, hx, unbatched=_is_unbatched(input))
        return self._as_given(input, batch, *self._run(batch, h0, c0))

    def _run(self, batch: _Batch, h0: Tensor, c0: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Layer after layer: outputs [N, directions x H]; last states, cell states [layers x directions, B, H]."""
        layout, x = batch.layout, batch.x
        recorder = self.recorder if self.training and torch.is_grad_enabled() else None
        tapes = None if recorder is None else recorder(self, layout, batch.sorted_indices)
        run = fused.run if self._runs_fused(batch) else recurrence.run
        directions = ("", "_reverse") if self.bidirectional else ("",)
        h_n: list[Tensor] = []
        c_n: list[Tensor] = []
        for layer in range(self.num_layers):
            outputs = []
            for direction in directions:
                suffix, strand = f"_l{layer}{direction}", len(h_n)
                states, memory = run(
                    self.mode,
                    layout,
                    tapes(suffix) if tapes is not None else None,
                    x.index_select(0, layout.reverse) if direction else x,
                    h0[strand],
                    None if c0 is None else c0[strand],
                    self._weights(suffix),
                )
                h_n.append(states.index_select(0, layout.last) if layout.rows else h0[strand])
                if memory is not None:
                    c_n.append(memory)
                outputs.append(states.index_select(0, layout.reverse) if direction else states)
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
            if self.training and layer < self.num_layers - 1:
                if self._locks:
                    x = lock(x, layout, batch.sorted_indices, self.dropout)
                elif self.dropout:
                    x = nn.functional.dropout(x, self.dropout)
        return x, torch.stack(h_n), torch.stack(c_n) if c_n else None

    @property
    def _locks(self) -> bool:
        """Whether there is dropout that torch's own layer does not have."""
        return self.locked_dropout and self.dropout > 0 and self.num_layers > 1

    def _runs_fused(self, batch: _Batch) -> bool:
        if not batch.layout.rows:  # torch's kernels refuse an empty batch
            return False
        return self.backend == "fused" or (self.backend == "auto" and fused.usable(batch.x))

    def _weights(self, suffix: str) -> Parameters:
        """weight_ih, weight_hh, bias_ih, bias_hh of one layer and direction; zeros for absent biases."""
        w_ih: Tensor = getattr(self, f"weight_ih{suffix}")
        w_hh: Tensor = getattr(self, f"weight_hh{suffix}")
        if not self.bias:
            zeros = w_ih.new_zeros(len(w_ih))
            return w_ih, w_hh, zeros, zeros
        return w_ih, w_hh, getattr(self, f"bias_ih{suffix}"), getattr(self, f"bias_hh{suffix}")

    def _packed(self, given: Tensor | PackedSequence) -> _Batch:
        if isinstance(given, PackedSequence):
            self.check_input(given.data, given.batch_sizes)
            layout = Layout(given.batch_sizes.tolist(), given.data.device)
            return _Batch(given.data, layout, given.sorted_indices, given.unsorted_indices)
        if given.dim() not in (2, 3):
            raise ValueError(f"{self.mode}: input has {given.dim()} dimensions; give 2 (unbatched) or 3")
        padded = given.transpose(0, 1) if self.batch_first else given
        if _is_unbatched(given):
            padded = given.unsqueeze(1)
        self.check_input(padded, None)
        steps, sequences, features = padded.shape
        layout = Layout([sequences] * steps, given.device)
        return _Batch(padded.reshape(steps * sequences, features), layout, None, None)

    def _initial_states(self, batch: _Batch, hx: State | None, *, unbatched: bool) -> tuple[Tensor, Tensor | None]:
        """h0 and c0 [layers x directions, B, H] in sorted order; zeros if not given."""
        directions = 2 if self.bidirectional else 1
        shape = (self.num_layers * directions, batch.layout.sequences, self.hidden_size)
        if hx is None:
            zeros = batch.x.new_zeros(()).expand(shape)
            return zeros, zeros if self.mode == "LSTM" else None
        h0, c0 = hx if isinstance(hx, tuple) else (hx, None)
        if (c0 is not None) != (self.mode == "LSTM"):
            wanted = "(h0, c0)" if c0 is None else "one tensor"
            raise ValueError(f"{self.mode}: initial states of the wrong kind; give {wanted}")

        def sort(state: Tensor) -> Tensor:
            state = state.unsqueeze(1) if unbatched else state
            if state.shape != shape:
                raise ValueError(f"{self.mode}: initial states of shape {tuple(state.shape)}; give {shape}")
            return batch.sort(state)

        return sort(h0), None if c0 is None else sort(c0)

    def _as_given(
        self, given: Tensor | PackedSequence, batch: _Batch, x: Tensor, h_n: Tensor, c_n: Tensor | None
    ) -> tuple[Tensor | PackedSequence, State]:
        """Outputs in the form of the input, states in the caller's order."""
        h_n, c_n = batch.unsort(h_n), None if c_n is None else batch.unsort(c_n)
        outputs: Tensor | PackedSequence
        if isinstance(given, PackedSequence):
            outputs = PackedSequence(x, given.batch_sizes, given.sorted_indices, given.unsorted_indices)
        else:
            outputs = x.view(batch.layout.steps, batch.layout.sequences, x.shape[1])
            if _is_unbatched(given):
                outputs, h_n = outputs.squeeze(1), h_n.squeeze(1)
                c_n = None if c_n is None else c_n.squeeze(1)
            elif self.batch_first:
                outputs = outputs.transpose(0, 1)
        return outputs, h_n if c_n is None else (h_n, c_n)


def set_backend(network: nn.Module, name: str) -> None:
    """Sets `backend` ("auto", "blocked" or "fused", see `Recurrent`) of every recurrent layer in a network."""
    for module in network.modules():
        if isinstance(module, Recurrent):
            module.backend = name


def _is_unbatched(given: Tensor | PackedSequence) -> bool:
    return isinstance(given, Tensor) and given.dim() == 2


class RNN(Recurrent, nn.RNN):
    """torch.nn.RNN for private training."""


class GRU(Recurrent, nn.GRU):
    """torch.nn.GRU for private training.

    Papers also write h = (1 - z) h + z tanh(W x + (1 - r) U h + b). That is the same layer with the weights and biases
    of the gates r and z negated, and no hidden bias of the candidate.
    """


class LSTM(Recurrent, nn.LSTM):
    """torch.nn.LSTM for private training."""
