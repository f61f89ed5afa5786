"""Where the rows of a packed batch stand.

A packed batch (`torch.nn.utils.rnn.PackedSequence`) writes its sequences one time step after the other: first
every sequence's row for step 0, then for step 1, and so on. Sequences are sorted by falling length, so that the
rows of one step are contiguous, and sequence b, if it is still running, is row number b among them. A padded
batch is the same thing with equal lengths, so one layout serves both.

What the recurrence, its reversal and the attribution of rows to patients need to know about positions is derived
here, once, from the sizes of the steps; nothing else does index arithmetic on packed data. The sizes are on the host,
and nothing here makes the host wait for a device.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """A run of whole time steps: small enough for the cache, large enough for one matrix product.

    Attributes:
        rows: the packed rows of these steps.
        steps: the time steps.
        sizes: rows of each step.
    """

    rows: slice
    steps: slice
    sizes: list[int]


class Layout:
    """The positions of a packed batch.

    Args:
        sizes: rows of each time step, not increasing (`PackedSequence.batch_sizes`). May be empty or all zero.
        device: where the index tensors live.

    Attributes:
        steps: T, the length of the longest sequence.
        sequences: B, rows of the first step.
        rows: N, the sum of all lengths.
        uniform: all sequences have the same length.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.sizes = list(sizes)
        self.device = torch.device(device)
        self.steps = len(self.sizes)
        self.sequences = self.sizes[0] if self.sizes else 0
        self.rows = sum(self.sizes)
        self.offsets = list(itertools.accumulate(self.sizes, initial=0))[:-1]
        self.uniform = not self.sizes or self.sizes[-1] == self.sequences

    def blocks(self, width: int, floats: int) -> list[Block]:
        """Cuts the steps into blocks of at most `floats` numbers at `width` numbers a row (at least one step)."""
        return list(self._blocks(max(1, floats // max(1, width))))

    def _blocks(self, most_rows: int) -> Iterator[Block]:
        first, start = 0, 0
        while first < self.steps:
            end, last = start + self.sizes[first], first + 1
            while last < self.steps and end + self.sizes[last] - start <= most_rows:
                end, last = end + self.sizes[last], last + 1
            yield Block(slice(start, end), slice(first, last), self.sizes[first:last])
            first, start = last, end

    def before(self, step: int) -> slice:
        """Rows of the states that `step` starts from, in cat([initial states [B], states [N]])."""
        start = 0 if step == 0 else self.sequences + self.offsets[step - 1]
        return slice(start, start + self.sizes[step])

    @cached_property
    def step(self) -> Tensor:
        """[N] time step of each row."""
        steps = torch.arange(self.steps, device=self.device)
        return steps.repeat_interleave(self._size, output_size=self.rows)

    @cached_property
    def sequence(self) -> Tensor:
        """[N] sequence of each row, counted in sorted order."""
        return torch.arange(self.rows, device=self.device) - self._offset[self.step]

    @cached_property
    def lengths(self) -> Tensor:
        """[B] number of rows of each sequence: sequence b has a row in every step of more than b rows."""
        return torch.searchsorted(-self._size, -torch.arange(self.sequences, device=self.device))

    @cached_property
    def last(self) -> Tensor:
        """[B] row of each sequence's last step. Sequences must not be empty."""
        return self._offset[self.lengths - 1] + torch.arange(self.sequences, device=self.device)

    @cached_property
    def previous(self) -> Tensor:
        """[N] where the state before each row stands, in cat([initial states [B], states [N]])."""
        earlier = self.sequences + self._offset[(self.step - 1).clamp(min=0)] + self.sequence
        return torch.where(self.step > 0, earlier, self.sequence)

    @cached_property
    def reverse(self) -> Tensor:
        """[N] row of the same sequence counted from its end: every sequence back to front. Its own inverse."""
        return self._offset[self.lengths[self.sequence] - 1 - self.step] + self.sequence

    @cached_property
    def _size(self) -> Tensor:
        return torch.tensor(self.sizes, dtype=torch.long, device=self.device)

    @cached_property
    def _offset(self) -> Tensor:
        return torch.tensor(self.offsets, dtype=torch.long, device=self.device)
