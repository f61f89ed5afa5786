"""Locked dropout: one mask for all time steps of a sequence, so that what is left out stays left out.

Dropout that draws anew at every step, as torch.nn's does between layers, adds noise that a recurrent state averages
away. A mask that is drawn once per sequence is dropout of the recurrent network as a whole, called variational (Gal
and Ghahramani 2016, arXiv 1512.05287) or locked (Merity et al. 2018, arXiv 1708.02182, section 4.2).

    LockedDropout(0.3)                                              on inputs (Keras's `dropout`) or on outputs
    GRU(76, 128, num_layers=2, dropout=0.3, locked_dropout=True)    between layers

Hidden-to-hidden masks, Keras's `recurrent_dropout`, are not offered. They multiply the state inside the recurrence,
where a fused kernel lets nobody in, so a network would train on one backend and not on the other; Keras falls back to
its slow loop for the same reason. Nor is Merity's substitute, dropout of the hidden weights: one weight mask serves
the whole batch, and `weight_hh` would then be trained outside its own module, which the private step refuses. Masks
on inputs, between layers and on outputs are the rest of Gal and Ghahramani's scheme; against a state that overfits,
take a smaller one, or weight decay by the optimizer, which sees no records.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from common.models.layout import Layout

Sequences = TypeVar("Sequences", Tensor, PackedSequence)


class LockedDropout(nn.Module):
    """Dropout with one mask per sequence, the same at all of its steps. The identity in evaluation.

    Input and output: a PackedSequence, or [T, B, F] ([B, T, F] if batch_first), or one sequence [T, F].
    A mask has F entries, each 0 with probability p, else 1 / (1 - p), so that the expectation is the input. Masks are
    drawn from torch's default generator of the input's device, in the caller's order of sequences: packed or padded,
    sorted or not, the same generator state gives a sequence the same mask.

    Args:
        p: probability that a feature of a sequence is left out.
        batch_first: as in torch.nn's recurrent layers; packed input has no such dimension.

    Raises:
        ValueError: p is not a probability, or the input has not 2 or 3 dimensions.

    Guarantee:
        Clipping stays per patient. Masks do not depend on records, and a sequence's mask multiplies that sequence
        alone; so, given the masks, a patient's gradient is a function of that patient's records, and taking the
        patient away changes the clipped sum by at most C. Masks are independent and alike for all sequences, so those
        of the others are distributed the same with and without the patient; a mixture of neighbours that are each
        (epsilon, delta) close is (epsilon, delta) close. That holds while masks are secret: under a generator whose
        seed others know, taking a patient away would shift the known masks of all who come after. torch seeds its
        default generators from the operating system; leave them unseeded where privacy matters.
    """

    def __init__(self, p: float = 0.5, *, batch_first: bool = False) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"p={p}; give a probability from 0 to 1")
        self.p = p
        self.batch_first = batch_first

    def forward(self, input: Sequences) -> Sequences:  # noqa: A002 (torch's name)
        """The input with features left out of whole sequences."""
        if isinstance(input, PackedSequence):
            if not self.training or not self.p:
                return input
            layout = Layout(input.batch_sizes.tolist(), input.data.device)
            return input._replace(data=lock(input.data, layout, input.sorted_indices, self.p))
        if input.dim() not in (2, 3):
            raise ValueError(f"LockedDropout: input has {input.dim()} dimensions; give 2 (one sequence) or 3")
        if not self.training or not self.p:
            return input
        if input.dim() == 2:
            return input * draw_masks(1, input.shape[1], self.p, input)
        masks = draw_masks(input.shape[0 if self.batch_first else 1], input.shape[2], self.p, input)
        return input * (masks[:, None] if self.batch_first else masks)

    def extra_repr(self) -> str:
        """Its options."""
        return f"p={self.p}, batch_first={self.batch_first}"


def lock(rows: Tensor, layout: Layout, sorted_indices: Tensor | None, p: float) -> Tensor:
    """Packed rows [N, F], each multiplied by the mask of its sequence.

    Args:
        rows: a packed batch.
        layout: its positions.
        sorted_indices: the caller's order -> sorted order, None if they are one.
        p: see LockedDropout.
    """
    masks = draw_masks(layout.sequences, rows.shape[1], p, rows)
    if sorted_indices is not None:
        masks = masks.index_select(0, sorted_indices)
    if layout.uniform:
        return (rows.view(layout.steps, *masks.shape) * masks).view_as(rows)
    return rows * masks.index_select(0, layout.sequence)


def draw_masks(sequences: int, width: int, p: float, like: Tensor) -> Tensor:
    """[sequences, width] of 0 and 1 / (1 - p), in the type and on the device of `like`."""
    return nn.functional.dropout(torch.ones(sequences, width, dtype=like.dtype, device=like.device), p)
