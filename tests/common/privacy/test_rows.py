"""Rows name the owner of each row, compose, and hand a patient's rows out together."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from common.models.layout import Layout
from common.privacy.rows import Grid, Rows

LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=8)


def _packed(lengths: list[int]) -> PackedSequence:
    """Every row holds the number of its sequence, in the caller's order."""
    return pack_sequence([torch.full((n, 1), float(i)) for i, n in enumerate(lengths)], enforce_sorted=False)


@settings(deadline=None, max_examples=50)
@given(lengths=LENGTHS, seed=st.integers(0, 999))
def test_of_packed_names_sequences_and_composes_with_patients(lengths: list[int], seed: int) -> None:
    """Rows of a packed batch belong to its sequences in the caller's order, and through a context to their patients."""
    packed = _packed(lengths)
    sequence = packed.data[:, 0].long()
    assert torch.equal(Rows.of(packed).patient, sequence)
    patient = torch.randint(0, 3, (len(lengths),), generator=torch.Generator().manual_seed(seed))
    with Rows(patient, 3):
        rows = Rows.of(packed)
        assert torch.equal(rows.patient, patient[sequence])
        assert rows.count == 3
        with rows:
            assert Rows.current() is rows


def test_contexts_nest_and_close_even_on_errors() -> None:
    """The innermost open context counts; leaving it, also by an error, brings the outer one back."""
    outer, inner = Rows(torch.tensor([0]), 1), Rows(torch.tensor([0, 0]), 1)
    assert Rows.current() is None
    with outer:
        with inner, inner:
            assert Rows.current() is inner
        assert Rows.current() is outer
        with pytest.raises(KeyError), inner:
            raise KeyError
        assert Rows.current() is outer
    assert Rows.current() is None


def test_contexts_belong_to_their_thread() -> None:
    """A context that one thread opens is not seen by another."""
    seen: list[Rows | None] = []
    with Rows(torch.tensor([0]), 1):
        thread = threading.Thread(target=lambda: seen.append(Rows.current()))
        thread.start()
        thread.join()
    assert seen == [None]


@pytest.mark.parametrize(
    ("patient", "count", "message"),
    [
        (torch.tensor([0, 2]), 2, r"outside \[0, 2\)"),
        (torch.tensor([-1]), 2, r"outside \[0, 2\)"),
        (torch.tensor([0.0]), 1, "torch.float32"),
        (torch.tensor([[0]]), 1, r"shape \(1, 1\)"),
    ],
)
def test_wrong_owners_are_refused(patient: Any, count: int, message: str) -> None:
    """Owners must be int64 of shape [N] in [0, count); the error says what they are, never whose."""
    with pytest.raises(ValueError, match=message):
        Rows(patient, count)


def test_a_context_for_another_number_of_sequences_is_refused() -> None:
    """Packing 2 sequences inside a context of 3 raises, naming both numbers."""
    with Rows(torch.tensor([0, 1, 1]), 2), pytest.raises(ValueError, match=r"3 sequences .* has 2"):
        Rows.of(_packed([2, 1]))


def _check_groups(rows: Rows, width: int) -> None:
    """Every row of every patient is handed out once, padding is zero or the patient's own last row."""
    numbered = torch.arange(1.0, len(rows) + 1)[:, None]
    seen = []
    for group in rows.groups(lambda steps: steps * width):
        taken, padded = group.take(numbered)[:, :, 0], group.take(numbered, zero_padding=True)[:, :, 0]
        assert taken.shape == padded.shape == (len(group.patients), group.steps)
        for patient, own, zeroed in zip(group.patients.tolist(), taken, padded, strict=True):
            mine = [float(i + 1) for i, p in enumerate(rows.patient.tolist()) if p == patient]
            assert sorted(x for x in zeroed.tolist() if x) == mine
            assert own[: len(mine)].tolist() == zeroed[: len(mine)].tolist()
            assert all(x == own[len(mine) - 1] for x in own[len(mine) :])
            seen.append(patient)
    assert sorted(seen) == sorted(set(rows.patient.tolist()))


@settings(deadline=None, max_examples=60)
@given(
    patient=st.lists(st.integers(0, 5), max_size=30),
    width=st.sampled_from([1, 1 << 17, 1 << 30]),
    times=st.integers(1, 3),
)
def test_groups_hand_out_each_patients_rows(patient: Any, width: int, times: int) -> None:
    """For any owners in any order and any chunk size, groups partition the rows by patient."""
    rows = Rows(torch.tensor(patient, dtype=torch.long), 6)
    _check_groups(rows, width)
    _check_groups(rows.repeat(times), width)
    assert rows.repeat(times).patient.tolist() == [p for p in patient for _ in range(times)]


@settings(deadline=None, max_examples=60)
@given(
    owner=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    unique=st.booleans(),
    steps=st.integers(1, 4),
    steps_first=st.booleans(),
    times=st.integers(1, 3),
    width=st.sampled_from([1, 1 << 17, 1 << 30]),
)
def test_a_grid_is_a_table_of_owners_by_other_means(
    owner: list[int], unique: bool, steps: int, steps_first: bool, times: int, width: int
) -> None:
    """A grid hands out, sums and repeats rows as the plain table of the same owners does."""
    series = torch.tensor(list(dict.fromkeys(owner)) if unique else owner)
    grid = Grid(series, 6, steps, steps_first=steps_first)
    table = Rows(grid.patient, 6)
    _check_groups(grid, width)
    _check_groups(grid.repeat(times), width)
    assert torch.equal(grid.repeat(times).patient, table.repeat(times).patient)
    values = torch.arange(2.0 * len(table)).view(-1, 2)
    assert torch.equal(grid.add_up(values), table.add_up(values))
    assert len(grid) == len(table)


def test_rows_of_no_sequences() -> None:
    """A packed batch of nothing has no rows, and hands out none."""
    rows = Rows.of_steps(Layout([]), None)
    assert len(rows) == 0
    assert list(rows.groups(lambda steps: steps)) == []
    assert Rows.joined([rows]).add_up(torch.zeros(0, 2)).shape == (0, 2)
