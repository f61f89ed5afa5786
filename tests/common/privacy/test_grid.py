"""The private step over the grid of networks and batches that it must serve, against the autograd loop.

`check` says all that must hold of a case, and `Case` what varies; `.ci/run` draws hundreds of cases, `.ci/full`
thousands. A new option of the private core becomes a field of `Case`, a new way to run the recurrence a name in
`cases.BACKENDS`.

Whether torch's outputs equal ours option by option, dropout and initial states included, is asked in
tests/common/models/test_recurrent.py; layers other than these in test_samplers.py.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from common.models.recurrent import set_backend
from tests.common.privacy.cases import (
    BACKENDS,
    CELLS,
    HEADS,
    POOLINGS,
    Cohort,
    Diagnosis,
    in_float64,
    loss_over,
    make_cohort,
    twins,
)
from tests.oracles import (
    FLOAT32,
    FLOAT64,
    book_keeping_sum,
    check_norms,
    check_private_sum,
    distance_from_kink,
    patient_gradients,
    summed_gradients,
)

TOLERANCES = {torch.float32: FLOAT32, torch.float64: FLOAT64}


@dataclass(frozen=True)
class Case:
    """One network and one batch.

    Attributes:
        seed: of the weights, the records and their order.
        cell, num_layers, bidirectional, bias, pooling, head: see Diagnosis.
        dtype: of weights and records.
        patients: how many.
        sequences: at most this many of each patient.
        ragged: sequences differ in length.
        micro_batches: patients are dealt to at most this many, whole.
        share: the clip, in medians of the patients' norms.
    """

    seed: int
    cell: str
    num_layers: int
    bidirectional: bool
    bias: bool
    pooling: tuple[str, ...]
    head: str
    dtype: torch.dtype
    patients: int
    sequences: int
    ragged: bool
    micro_batches: int
    share: float

    def micro_batch_of(self, patient: int) -> int:
        """Which micro-batch holds a patient: at random, and the same one whoever else takes part."""
        generator = torch.Generator().manual_seed(self.seed + 1000 * patient)
        return int(torch.randint(self.micro_batches, (), generator=generator))


CASES = st.builds(
    Case,
    seed=st.integers(0, 2**16),
    cell=st.sampled_from((*CELLS, "ReLU")),
    num_layers=st.integers(1, 3),
    bidirectional=st.booleans(),
    bias=st.booleans(),
    pooling=st.sampled_from(POOLINGS),
    head=st.sampled_from(HEADS),
    dtype=st.sampled_from(list(TOLERANCES)),
    patients=st.integers(1, 3),
    sequences=st.sampled_from([1, 4]),
    ragged=st.booleans(),
    micro_batches=st.integers(1, 3),
    share=st.floats(0.3, 3.0),
)


def check(case: Case, backend: str) -> None:
    """Asserts all that must hold of the private step, whatever the case.

    - Norms are upper bounds on the gradients that are added up, and close to theirs.
    - Clipped sum, norms and removal of a patient are as `check_private_sum` says, for the batch cut into micro-batches.
      The oracle computes in float64, from the same weights and records.
    - The cut changes the sum by rounding only.
    - State dicts go to torch.nn and back, and the outputs stay.
    """
    network, twin = twins(
        case.cell,
        case.pooling,
        case.seed,
        case.dtype,
        num_layers=case.num_layers,
        bidirectional=case.bidirectional,
        bias=case.bias,
        head=case.head,
    )
    set_backend(network, backend)
    everyone, tolerance = range(case.patients), TOLERANCES[case.dtype]
    cohort = make_cohort(case.seed, case.patients, case.dtype, steps=8, sequences=case.sequences, ragged=case.ragged)
    loss, exact_loss = loss_over(cohort, case.seed), loss_over(in_float64(cohort), case.seed)
    exact = copy.deepcopy(twin).double()
    if case.cell == "ReLU" and case.dtype == torch.float32:
        assume(_distance_from_kink(exact, in_float64(cohort)) > 1e-5)

    gradients = patient_gradients(exact.parameters(), lambda patient: exact_loss(exact, [patient]), everyone)
    summed, norms = summed_gradients(network, loss, everyone)
    check_norms(norms, summed, tolerance.below, tolerance.above)

    clip = case.share * (float(gradients.norm(dim=1).median()) or 1.0)
    cut = check_private_sum(book_keeping_sum(network, loss, clip, case.micro_batch_of), gradients, clip, tolerance)

    whole, _ = book_keeping_sum(network, loss, clip)(everyone)
    assert float((cut - whole).norm()) <= tolerance.total * max(clip, float(whole.norm()))

    _check_interchange(network, twin, cohort)


def _check_interchange(network: Diagnosis, twin: Diagnosis, cohort: Cohort) -> None:
    """Weights that went to torch.nn come back unchanged, and both networks compute the same with them."""
    records = [record for patient in cohort for record in patient]
    mine, theirs = network(records), twin(records)
    rounding = 100 * torch.finfo(mine.dtype).eps
    torch.testing.assert_close(mine, theirs, rtol=rounding, atol=rounding)
    sent = {name: value.clone() for name, value in twin.state_dict().items()}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    network.load_state_dict(sent)
    assert list(network.state_dict()) == list(sent)
    assert torch.equal(network(records), mine)


def _distance_from_kink(twin: Diagnosis, cohort: Cohort) -> float:
    """Of the recurrent layer of torch's network, over the records of all patients."""
    seen: list[PackedSequence] = []

    def look(_layer: nn.Module, given: tuple[PackedSequence, ...]) -> None:
        seen.append(given[0])

    handle = twin.recurrence.register_forward_pre_hook(look)
    with torch.no_grad():
        twin([record for patient in cohort for record in patient])
        handle.remove()
        return distance_from_kink(twin.recurrence, seen[0])


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=200)
@given(case=CASES)
def test_the_private_step_over_the_grid(backend: str, case: Case) -> None:
    """200 cases of the grid: sum, norms, removal, micro-batches and state dicts are as `check` says."""
    check(case, backend)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=2000)
@given(case=CASES)
def test_the_private_step_over_the_grid_at_length(backend: str, case: Case) -> None:
    """2,000 cases of the grid, as above."""
    check(case, backend)
