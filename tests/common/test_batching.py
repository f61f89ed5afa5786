"""Packed batches against a plain builder that walks over patients, stays and visits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.batching import Batch, Dataset
from common.models.network import build_network
from tests.small import CODES, STATICS, VALUES, Patient, Stay, Visit, as_sequences, made_up_patients, small_study

NUMBER = st.floats(-4, 4, width=32)
VISIT = st.builds(
    Visit,
    st.lists(NUMBER, min_size=VALUES, max_size=VALUES),
    st.lists(st.booleans(), min_size=VALUES, max_size=VALUES),
    NUMBER,
    st.lists(st.integers(0, CODES - 1), unique=True, max_size=CODES).map(sorted),
)
STAY = st.builds(
    Stay,
    st.lists(VISIT, min_size=1, max_size=5),
    st.lists(NUMBER, min_size=STATICS, max_size=STATICS),
    st.integers(0, 1),
)
PATIENTS = st.lists(st.lists(STAY, min_size=1, max_size=3), min_size=1, max_size=6)
examples = settings(deadline=None, max_examples=60)


def plain(patients: list[Patient], chosen: list[int], *, centre: float = 0.5) -> dict[str, Any]:
    """The packed batch of `chosen`, written down one number at a time."""
    numbered = [(i, stay) for i, patient in enumerate(patients) for stay in patient]
    stays = [
        (position, order, stay)
        for position, patient in enumerate(chosen)
        for order, (owner, stay) in enumerate(numbered)
        if owner == patient
    ]
    stays.sort(key=lambda item: -len(item[2].visits))  # stable
    packed: dict[str, Any] = {"dense": [], "sizes": [], "codes": [], "code_start": [], "sequence_of_row": []}
    last = dict.fromkeys(range(len(stays)), -1)
    for time in range(max((len(stay.visits) for _, _, stay in stays), default=0)):
        present = [s for s, (_, _, stay) in enumerate(stays) if len(stay.visits) > time]
        packed["sizes"].append(len(present))
        for s in present:
            stay = stays[s][2]
            visit = stay.visits[time]
            last[s] = len(packed["dense"])
            packed["dense"].append(
                [*visit.values, *(float(m) - centre for m in visit.measured), visit.gap, *stay.statics]
            )
            packed["code_start"].append(len(packed["codes"]))
            packed["codes"] += visit.codes
            packed["sequence_of_row"].append(s)
    packed["last_row"] = list(last.values())
    packed["length"] = [len(stay.visits) for _, _, stay in stays]
    packed["patient"] = [position for position, _, _ in stays]
    packed["order"] = [order for _, order, _ in stays]
    packed["label"] = [stay.label for _, _, stay in stays]
    packed["share"] = [1 / len(patients[chosen[position]]) for position, _, _ in stays]
    return packed


def content(batch: Batch) -> dict[str, Any]:
    """The same of a Batch."""
    named = {"sequence_of_row": batch.sequence_of_row(), "last_row": batch.last_row()}
    fields = ("dense", "sizes", "codes", "code_start", "length", "patient", "order", "label", "share")
    return {name: tensor.tolist() for name, tensor in {**{f: getattr(batch, f) for f in fields}, **named}.items()}


def float32(numbers: Any) -> NDArray[np.float32]:
    return np.array(numbers, np.float32)


@examples
@given(PATIENTS, st.randoms(use_true_random=False))
def test_a_batch_is_what_the_plain_builder_writes(patients: list[Patient], random: Any) -> None:
    """Rows, sizes, codes, owners, labels, shares and row indices of any patients in any order are the plain ones."""
    chosen = random.sample(range(len(patients)), random.randint(0, len(patients)))
    batch = Dataset(as_sequences(patients)).batch(np.array(chosen, np.int64))
    expected, found = plain(patients, chosen), content(batch)
    assert batch.n_patients == len(chosen)
    assert found.keys() == expected.keys()
    for name, numbers in expected.items():
        if name in ("dense", "share"):
            assert np.array_equal(float32(found[name]), float32(numbers)), name
        else:
            assert found[name] == numbers, name


def test_no_patients_give_an_empty_batch_that_a_network_accepts() -> None:
    """A batch of no patients has no rows, sequences or codes, and a network answers it with no logits."""
    batch = Dataset(as_sequences(made_up_patients(1, 3))).batch(np.empty(0, np.int64))
    assert (batch.n_sequences, batch.n_patients, len(batch.dense), len(batch.codes)) == (0, 0, 0, 0)
    assert batch.sizes.tolist() == batch.last_row().tolist() == batch.sequence_of_row().tolist() == []
    for cell in ("gru", "none"):
        assert build_network(small_study(model={"cell": cell}))(batch).shape == (0,)


def test_a_data_set_without_patients_has_only_empty_batches() -> None:
    """A site whose split is empty can be asked for its batches."""
    dataset = Dataset(as_sequences(made_up_patients(1, 2)).select([]))
    assert dataset.n_patients == 0
    assert dataset.batch(np.empty(0, np.int64)).n_sequences == 0
    assert list(dataset.micro_batches(np.arange(0), 10)) == []


def test_mask_is_centred_only_if_asked() -> None:
    """`centre_mask` subtracts one half from the mask columns and touches nothing else."""
    patients = made_up_patients(2, 4)
    plainly = Dataset(as_sequences(patients), centre_mask=False).batch(np.arange(4))
    assert np.array_equal(plainly.dense.numpy(), float32(plain(patients, [0, 1, 2, 3], centre=0)["dense"]))


def test_dense_inputs_and_labels_share_a_precision() -> None:
    """A float64 data set has float64 inputs, labels and shares, so that a float64 network runs on it."""
    batch = Dataset(as_sequences(made_up_patients(3, 4)), dtype=torch.float64).batch(np.arange(4))
    assert batch.dense.dtype == batch.label.dtype == batch.share.dtype == torch.float64


def test_shares_of_a_patient_add_up_to_one() -> None:
    """However many sequences a patient has, their weights sum to 1: the patient's loss is the mean."""
    batch = Dataset(as_sequences(made_up_patients(4, 30)), dtype=torch.float64).batch(np.arange(30))
    total = torch.zeros(30, dtype=torch.float64).index_add(0, batch.patient, batch.share)
    assert torch.allclose(total, torch.ones(30, dtype=torch.float64), atol=1e-12)


@examples
@given(PATIENTS, st.integers(1, 20), st.randoms(use_true_random=False))
def test_micro_batches_cover_every_patient_once_and_never_split_one(
    patients: list[Patient], max_rows: int, random: Any
) -> None:
    """Every chosen patient is in exactly one micro-batch with all sequences; only a patient alone exceeds the bound."""
    chosen = random.sample(range(len(patients)), random.randint(0, len(patients)))
    rows = {i: sum(len(stay.visits) for stay in patients[i]) for i in chosen}
    owner = [i for i, patient in enumerate(patients) for _ in patient]
    seen: list[int] = []
    patients_of_batches: list[set[int]] = []
    for batch in Dataset(as_sequences(patients)).micro_batches(np.array(chosen, np.int64), max_rows):
        seen += batch.order.tolist()
        patients_of_batches.append({owner[s] for s in batch.order.tolist()})
        assert batch.n_patients == len(patients_of_batches[-1]) >= 1
        assert len(batch.dense) <= max_rows or batch.n_patients == 1
        assert len(batch.dense) == sum(rows[i] for i in patients_of_batches[-1])
    assert sorted(seen) == [s for s, i in enumerate(owner) if i in rows]
    assert sum(map(len, patients_of_batches)) == len(chosen)


def test_micro_batches_are_as_few_as_the_bound_asks_for() -> None:
    """Patients of one row each fill every micro-batch but the last to the bound."""
    patients = made_up_patients(5, 23, most_stays=1, most_visits=1)
    dataset = Dataset(as_sequences(patients))
    assert [b.n_patients for b in dataset.micro_batches(np.arange(23), 10)] == [10, 10, 3]


@pytest.mark.parametrize("take", [Batch.last_row, Batch.sequence_of_row])
def test_row_indices_live_where_the_inputs_live(take: Callable[[Batch], torch.Tensor]) -> None:
    """Row indices are int64 and on the inputs' device, ready to index them."""
    batch = Dataset(as_sequences(made_up_patients(6, 5))).batch(np.arange(5))
    assert take(batch).dtype == torch.int64
    assert take(batch).device == batch.dense.device
