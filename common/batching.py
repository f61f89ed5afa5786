"""Ragged sequences -> packed batches: rows sorted by time, then by falling length, with the patient of each sequence.

A packed batch holds exactly the steps that exist: at time t only the sequences longer than t have a row. Sequences
are sorted here, once, so that nothing downstream has to undo a sort; which patient a sequence belongs to is carried
as a value (`patient`), never read off a position.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.assembly import ranges
from common.sequences import Sequences

MASK_CENTRE = 0.5


@dataclass(frozen=True)
class Batch:
    """A packed batch of S sequences of P patients with N rows in all.

    Attributes:
        dense: [N, D] values, mask, log gap and statics of each row.
        sizes: [T] int64 on the CPU, rows at each time, falling; empty for an empty batch.
        codes: [M] int64 codes of all rows, one after another.
        code_start: [N] int64 where each row's codes begin in `codes`.
        length: [S] int64 steps of each sequence, falling.
        patient: [S] int64 in [0, P), owner of each sequence.
        n_patients: P, sampled patients, also those without a row of their own in this batch.
        label: [S] float labels.
        share: [S] 1 / number of the owner's sequences: a patient's loss is the mean over its sequences.
        order: [S] int64 index of each sequence in the Sequences it came from.
    """

    dense: Tensor
    sizes: Tensor
    codes: Tensor
    code_start: Tensor
    length: Tensor
    patient: Tensor
    n_patients: int
    label: Tensor
    share: Tensor
    order: Tensor

    @property
    def n_sequences(self) -> int:
        """S."""
        return len(self.label)

    def sequence_of_row(self) -> Tensor:
        """[N] int64: which sequence each packed row belongs to."""
        return torch.cat([torch.arange(int(n)) for n in self.sizes] or [torch.arange(0)]).to(self.dense.device)

    def last_row(self) -> Tensor:
        """[S] int64: the packed row of each sequence's last step."""
        offset = torch.cumsum(self.sizes, 0) - self.sizes
        return (offset.to(self.length.device)[self.length - 1]) + torch.arange(len(self.length)).to(self.length.device)


class Dataset:
    """A site's sequences on its device, ready to be cut into packed batches by patient.

    Args:
        sequences: the ragged sequences.
        centre_mask: subtract .5 from the mask, so that "measured" and "not measured" pull alike.
        device, dtype: where and as what the dense inputs live.
    """

    def __init__(
        self,
        sequences: Sequences,
        *,
        centre_mask: bool = True,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.sequences = sequences
        self.device = torch.device(device)
        length = np.diff(sequences.start)
        statics = np.repeat(sequences.statics, length, axis=0)
        mask = sequences.measured.astype(np.float32) - (MASK_CENTRE if centre_mask else 0.0)
        dense = np.concatenate([sequences.values, mask, sequences.gap[:, None], statics], axis=1)
        self.dense = torch.as_tensor(dense, dtype=dtype).to(self.device)
        self._length = length
        per_patient = np.bincount(sequences.patient, minlength=sequences.n_patients)
        self._share = 1.0 / per_patient[sequences.patient]
        self._first = np.cumsum(per_patient) - per_patient  # sequences are grouped by patient
        self._per_patient = per_patient
        self._rows_of_patient = np.bincount(sequences.patient, weights=length, minlength=sequences.n_patients)

    @property
    def n_patients(self) -> int:
        """Patients in the data set: a private number."""
        return self.sequences.n_patients

    def batch(self, patients: NDArray[np.int64]) -> Batch:
        """The packed batch of all sequences of `patients` (distinct indices [P]); P may be 0."""
        counts = self._per_patient[patients]
        owner = np.repeat(np.arange(len(patients)), counts)
        chosen = ranges(self._first[patients], counts)
        by_length = np.argsort(-self._length[chosen], kind="stable")
        chosen, owner = chosen[by_length], owner[by_length]
        length = self._length[chosen]
        sizes = _packed_sizes(length)
        begin = self.sequences.start[chosen]
        rows = np.concatenate([begin[:n] + t for t, n in enumerate(sizes)] or [np.empty(0, np.int64)])
        n_codes = np.diff(self.sequences.code_start)[rows]
        codes = self.sequences.codes[ranges(self.sequences.code_start[rows], n_codes)]

        def on_device(array: NDArray[np.generic], dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.as_tensor(array, dtype=dtype).to(self.device)

        return Batch(
            dense=self.dense.index_select(0, on_device(rows)),
            sizes=torch.as_tensor(sizes, dtype=torch.int64),
            codes=on_device(codes),
            code_start=on_device(np.cumsum(n_codes) - n_codes),
            length=on_device(length),
            patient=on_device(owner),
            n_patients=len(patients),
            label=on_device(self.sequences.label[chosen], self.dense.dtype),
            share=on_device(self._share[chosen], self.dense.dtype),
            order=on_device(chosen),
        )

    def micro_batches(self, patients: NDArray[np.int64], max_rows: int) -> Iterator[Batch]:
        """`patients` cut into batches of at most `max_rows` rows each, never splitting a patient.

        Patients of like length go together, which changes nothing but speed: the clipped sum is the same.
        A single patient with more rows is a batch of its own. Nothing is yielded for no patients.
        """
        by_rows = patients[np.argsort(-self._rows_of_patient[patients], kind="stable")]
        rows_up_to = np.cumsum(self._rows_of_patient[by_rows])
        start, taken = 0, 0.0
        while start < len(by_rows):
            end = max(start + 1, int(np.searchsorted(rows_up_to, taken + max_rows, side="right")))
            yield self.batch(by_rows[start:end])
            start, taken = end, rows_up_to[end - 1]


def _packed_sizes(length: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows at each time for falling lengths [S]: sizes[t] = number of lengths greater than t."""
    if not len(length):
        return np.empty(0, np.int64)
    ended: NDArray[np.int64] = np.cumsum(np.bincount(length, minlength=length[0] + 1))[:-1]
    return len(length) - ended
