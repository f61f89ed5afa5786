"""Which patient owns which row: a value that the training step carries, never an assumption about dimension 0.

A module sees rows: sequences, time steps of many sequences, or patients. `Rows` names the owner of each. As a
context it applies to dimension 0 of every module that is called inside it:

    with Rows(patient_of_sequence, n_patients):     # the training loop
        logits = network(batch)

    with Rows.of(packed):                           # in the network, where rows are steps
        x = project(packed.data)

Contexts compose: `Rows.of` maps steps to sequences and then, through the context around it, to patients, so a
network need not know whether a patient has one sequence or five. Given a `PackedSequence`, a recurrent layer reads
dimension 0 as its sequences in the caller's order and undoes torch's sort itself. Opacus does not: its recurrent
gradients come back in sorted order and those of its linear layers in the caller's, so that clipping mixes patients.

A tensor subclass that carries its owners was rejected: it would have to survive every operation between packing and
the module, and the one that drops it would do so silently.

One hole stays open and cannot be seen from here: if all sequences have length one, a linear layer on `packed.data`
outside `Rows.of` has as many rows as there are sequences, in sorted instead of the caller's order. Open `Rows.of`
around everything that is applied to packed rows.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from common.models.layout import Layout

FLOATS_PER_CHUNK = 1 << 21  # numbers gathered or formed at a time: few enough for the cache, many for one product


class _Contexts(threading.local):
    """The contexts that are open in this thread, innermost last."""

    def __init__(self) -> None:
        self.open: list[Rows] = []


_contexts = _Contexts()


class Rows:
    """The owner of each row.

    Args:
        patient: [N] int64 in [0, count).
        count: P, patients in the batch, also those without a row.

    Raises:
        ValueError: `patient` is not [N] int64, or an index is outside [0, count).

    Guarantee:
        All rows of a patient are one example: every consumer of rows groups them by `patient`, whatever their order
        and number. A row has exactly one owner.
    """

    def __init__(self, patient: Tensor, count: int) -> None:
        if patient.dim() != 1 or patient.dtype != torch.int64:
            raise ValueError(
                f"patient is {patient.dtype} with shape {tuple(patient.shape)}; give int64 of shape [rows]"
            )
        if patient.numel() and not (int(patient.min()) >= 0 and int(patient.max()) < count):
            raise ValueError(f"a patient index is outside [0, {count}); number the patients 0 .. {count - 1}")
        self.patient = patient
        self.count = count

    @staticmethod
    def current() -> Rows | None:
        """The innermost open context of this thread."""
        return _contexts.open[-1] if _contexts.open else None

    @staticmethod
    def of(packed: PackedSequence) -> Rows:
        """Owners of the rows of `packed.data`: their sequences, or the patients of these if a context is open."""
        layout = Layout(packed.batch_sizes.tolist(), packed.data.device)
        return Rows.of_steps(layout, packed.sorted_indices)

    @staticmethod
    def of_steps(layout: Layout, sorted_indices: Tensor | None) -> Rows:
        """As `of`, from the layout and `PackedSequence.sorted_indices`.

        Raises:
            ValueError: the open context names another number of sequences.
        """
        owner, count = torch.arange(layout.sequences, device=layout.device), layout.sequences
        outer = Rows.current()
        if outer is not None:
            if len(outer) != layout.sequences:
                raise ValueError(
                    f"the open Rows names {len(outer)} sequences but the packed batch has {layout.sequences}; "
                    "open Rows(patient_of_sequence, n_patients) around the network"
                )
            owner, count = outer.patient.to(layout.device), outer.count
        owner = owner if sorted_indices is None else owner[sorted_indices]
        if layout.uniform:
            return Grid(owner, count, layout.steps, steps_first=True)
        return Rows(owner[layout.sequence], count)

    @staticmethod
    def each(count: int, device: torch.device) -> Rows:
        """Row i is patient i: Opacus's rule, used where no context is open."""
        return Grid(torch.arange(count, device=device), count, 1, steps_first=False)

    @staticmethod
    def joined(parts: Sequence[Rows]) -> Rows:
        """The rows of several calls of one module, one after the other."""
        return parts[0] if len(parts) == 1 else Rows(torch.cat([rows.patient for rows in parts]), parts[0].count)

    def __enter__(self) -> Rows:
        _contexts.open.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _contexts.open.pop()

    def __len__(self) -> int:
        return len(self.patient)

    @property
    def device(self) -> torch.device:
        """Where the owners are."""
        return self.patient.device

    def repeat(self, times: int) -> Rows:
        """Every row becomes `times` consecutive rows of the same owner: inner dimensions, flattened."""
        return self if times == 1 else Rows(self.patient.repeat_interleave(times), self.count)

    def to(self, device: torch.device) -> Rows:
        """The same rows with their owners on `device`."""
        return self if self.device == device else Rows(self.patient.to(device), self.count)

    def spread(self, values: Tensor) -> Tensor:
        """A value per patient [P, ..] -> the owner's value per row [N, ..]."""
        return values[self.patient]

    def add_up(self, values: Tensor) -> Tensor:
        """A value per row [N, ..] -> the sum over each patient's rows [P, ..], in float64."""
        total = values.new_zeros(self.count, *values.shape[1:], dtype=torch.float64)
        return total.index_add_(0, self.patient, values.double())

    def groups(self, numbers: Callable[[int], int]) -> Iterator[Group]:
        """Cuts the rows by patient: groups of patients with about equally many rows, the largest first.

        Args:
            numbers: rows of a patient -> numbers that are gathered and formed of them; a group has about
                FLOATS_PER_CHUNK of them.
        """
        counts, start = self._counts.tolist(), 0
        while start < len(counts):
            steps = counts[start]
            end = min(len(counts), start + max(1, FLOATS_PER_CHUNK // numbers(steps)))
            step = torch.arange(steps, device=self.patient.device)
            own = self._counts[start:end, None]
            rows = self._order[self._first[start:end, None] + torch.minimum(step, own - 1)]
            padding = None if counts[end - 1] == steps else (step >= own).flatten().nonzero()[:, 0]
            yield Gathered(self._patients[start:end], steps, rows, padding)
            start = end

    # Patients that have rows, by falling number of rows

    @cached_property
    def _order(self) -> Tensor:
        """[N] rows sorted by patient."""
        return torch.argsort(self.patient, stable=True)

    @cached_property
    def _all_counts(self) -> Tensor:
        return torch.bincount(self.patient, minlength=self.count)

    @cached_property
    def _patients(self) -> Tensor:
        return torch.argsort(self._all_counts, descending=True)[: int((self._all_counts > 0).sum())]

    @cached_property
    def _counts(self) -> Tensor:
        return self._all_counts[self._patients]

    @cached_property
    def _first(self) -> Tensor:
        """Where each patient's rows start in `_order`."""
        return (self._all_counts.cumsum(0) - self._all_counts)[self._patients]


class Grid(Rows):
    """Rows of series of equal length, whose rows by patient are views instead of gathered copies.

    Args:
        owner: [S] int64, owner of each series.
        count: P, patients in the batch.
        steps: rows of each series.
        steps_first: rows run over all series at step 0, then step 1; otherwise over the steps of series 0 first.
    """

    def __init__(self, owner: Tensor, count: int, steps: int, *, steps_first: bool) -> None:
        self.owner, self.count, self.steps, self.steps_first = owner, count, steps, steps_first

    @cached_property
    def patient(self) -> Tensor:  # type: ignore[override]  # an attribute of Rows, here made on demand
        """[N] int64, owner of each row."""
        return self.owner.repeat(self.steps) if self.steps_first else self.owner.repeat_interleave(self.steps)

    def __len__(self) -> int:
        return len(self.owner) * self.steps

    @property
    def device(self) -> torch.device:
        """Where the owners are."""
        return self.owner.device

    def repeat(self, times: int) -> Rows:
        """Every row becomes `times` consecutive rows of the same owner."""
        if self.steps_first and self.steps > 1:
            return super().repeat(times)
        return Grid(self.owner, self.count, self.steps * times, steps_first=False)

    def add_up(self, values: Tensor) -> Tensor:
        """As `Rows.add_up`; first over each series."""
        shape = (self.steps, len(self.owner)) if self.steps_first else (len(self.owner), self.steps)
        series: Tensor = values.double().unflatten(0, shape).sum(0 if self.steps_first else 1)
        return series.new_zeros(self.count, *values.shape[1:]).index_add_(0, self.owner, series)

    def groups(self, numbers: Callable[[int], int]) -> Iterator[Group]:
        """As `Rows.groups`; views if every patient has one series."""
        if len(self) and int(torch.bincount(self.owner).max()) > 1:
            yield from super().groups(numbers)
            return
        most = max(1, FLOATS_PER_CHUNK // numbers(self.steps)) if self.steps else 1
        for start in range(0, len(self.owner) if self.steps else 0, most):
            series = slice(start, start + most)
            yield Viewed(self.owner[series], self.steps, self, series)


@dataclass(frozen=True)
class Group(ABC):
    """Some patients of a batch and how to take their rows out of a tensor of all rows.

    Attributes:
        patients: [p] int64.
        steps: T, rows of the patient with the most rows.
    """

    patients: Tensor
    steps: int

    @abstractmethod
    def take(self, tensor: Tensor, *, zero_padding: bool = False) -> Tensor:
        """[N, F] -> [p, T, F]. A patient with fewer rows is padded: by zeros, or by its OWN last row.

        Never by another patient's row: a NaN or infinity stays with its owner.
        """


@dataclass(frozen=True)
class Gathered(Group):
    """Rows by index. rows: [p, T]; padding: flat positions in it that repeat a patient's last row."""

    rows: Tensor
    padding: Tensor | None

    def take(self, tensor: Tensor, *, zero_padding: bool = False) -> Tensor:
        """[N, F] -> [p, T, F]."""
        taken = tensor.index_select(0, self.rows.flatten())
        if zero_padding and self.padding is not None:
            taken.index_fill_(0, self.padding, 0)
        return taken.view(*self.rows.shape, tensor.shape[1])


@dataclass(frozen=True)
class Viewed(Group):
    """Rows of a grid, by strides: nothing to pad."""

    grid: Grid
    series: slice

    def take(self, tensor: Tensor, *, zero_padding: bool = False) -> Tensor:  # noqa: ARG002 (nothing to pad)
        """[N, F] -> [p, T, F], a view."""
        series, width = len(self.grid.owner), tensor.shape[1]
        if self.grid.steps_first:
            return tensor.view(self.steps, series, width).transpose(0, 1)[self.series]
        return tensor.view(series, self.steps, width)[self.series]
