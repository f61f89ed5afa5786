"""The bookkeeping mode inside Opacus: equal results where Opacus is right, and documentation of where it is not."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from opacus import PrivacyEngine
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (
    GradSampleHooksFastGradientClipping,
    GradSampleModuleFastGradientClipping,
)
from opacus.layers import DPGRU, DPLSTM
from opacus.optimizers import DPOptimizer
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, TensorDataset

from common.models import recurrent
from common.privacy import bookkeeping
from common.privacy.bookkeeping import BookKeepingEngine, BookKeepingHooks, BookKeepingModule, BookKeepingOptimizer
from common.privacy.rows import Rows
from tests.common.privacy.cases import cancelling
from tests.oracles import FLOAT32, PrivateSum, Tolerance, check_private_sum, patient_gradients

FEATURES, HIDDEN, STEPS = 3, 4, 6
LOOSE = replace(FLOAT32, total=1e-4)  # Opacus adds 1e-6 to every norm
BOUNDS = Tolerance(total=math.inf, below=1e-6, above=math.inf, removal=1e-4)  # what privacy needs, and no more

pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),  # Opacus, on inputs that are data
    pytest.mark.filterwarnings("ignore:Secure RNG turned off:UserWarning"),  # PrivacyEngine() without secure_mode
]


class Last(nn.Module):
    """A recurrent layer and a linear head on its last state. `layer`: of torch, of Opacus or ours."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.recurrence, self.head = layer, nn.Linear(HIDDEN, 1)

    def forward(self, x: Any) -> Tensor:
        _, last = self.recurrence(x)
        logits: Tensor = self.head((last[0] if isinstance(last, tuple) else last)[-1])[:, 0]
        return logits


def _pair(kind: str, **options: Any) -> tuple[Last, Last]:
    """Ours and Opacus's with the same weights."""
    torch.manual_seed(0)
    ours = Last(getattr(recurrent, kind)(FEATURES, HIDDEN, batch_first=True, **options))
    theirs = Last({"GRU": DPGRU, "LSTM": DPLSTM}[kind](FEATURES, HIDDEN, batch_first=True, **options))
    theirs.recurrence.load_state_dict(ours.recurrence.state_dict())
    theirs.head.load_state_dict(ours.head.state_dict())
    return ours, theirs


def _weights(network: Any) -> dict[str, Tensor]:
    """Weights by torch.nn's names, which Opacus's layer gives in its own state dict only."""
    return {**network.recurrence.state_dict(), **network.head.state_dict()}


@pytest.fixture
def opacus_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opacus's clip factor, which adds 1e-6 to the norm, in place of ours, so that only rounding can differ."""
    monkeypatch.setattr(bookkeeping, "clip_weights", lambda norms, clip, _: (clip / (norms + 1e-6)).clamp(max=1.0))


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True}], ids=["plain", "2 layers, both ways"]
)
def test_several_steps_equal_those_of_opacus(
    kind: str, reduction: str, options: dict[str, Any], opacus_weights: None
) -> None:
    """Ten Adam steps without noise give the weights that Opacus's hooks mode gives, to rounding."""
    ours, theirs = _pair(kind, **options)
    shared: dict[str, Any] = {
        "noise_multiplier": 0.0,
        "max_grad_norm": 0.05,
        "expected_batch_size": 8,
        "loss_reduction": reduction,
    }
    BookKeepingHooks(ours, loss_reduction=reduction)
    wrapped = GradSampleModule(theirs, loss_reduction=reduction)
    steps = [
        (ours, BookKeepingOptimizer(torch.optim.Adam(ours.parameters(), lr=0.01), **shared)),
        (wrapped, DPOptimizer(torch.optim.Adam(wrapped.parameters(), lr=0.01), **shared)),
    ]
    for step in range(10):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, STEPS, FEATURES, generator=generator)
        y = torch.randint(0, 2, (8,), generator=generator).float()
        for network, optimizer in steps:
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(network(x), y, reduction=reduction).backward()
            optimizer.step()
    for name, value in _weights(ours).items():
        torch.testing.assert_close(value, _weights(theirs)[name], rtol=0, atol=1e-6)


def _trained(engine: PrivacyEngine, network: Last, options: dict[str, Any], split: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    data = TensorDataset(
        torch.randn(40, STEPS, FEATURES, generator=generator), torch.randint(0, 2, (40,), generator=generator).float()
    )
    parameters = list(network.parameters())
    if isinstance(network.recurrence, recurrent.GRU):  # Opacus's order of them (D6), so that noise meets its like
        w_ih, w_hh, b_ih, b_hh, *head = parameters
        parameters = [w_ih, b_ih, w_hh, b_hh, *head]
    torch.manual_seed(7)  # Opacus's loader draws from torch's global generator
    module, optimizer, loader = engine.make_private(
        module=network,
        optimizer=torch.optim.SGD(parameters, lr=0.1),
        data_loader=DataLoader(data, batch_size=8),
        noise_multiplier=0.7,
        max_grad_norm=0.1,
        noise_generator=torch.Generator().manual_seed(11),
        **options,
    )

    def epoch(batches: Any) -> None:
        for x, y in batches:
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(module(x), y).backward()
            optimizer.step()

    for _ in range(2):
        if split:
            with BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer) as batches:
                epoch(batches)
        else:
            epoch(loader)
    return list(_weights(network).values())


@pytest.mark.parametrize("split", [False, True], ids=["whole batches", "BatchMemoryManager"])
def test_the_engine_takes_the_new_mode(split: bool, opacus_weights: None) -> None:
    """make_private returns Opacus's triple; with the same generators weights and history equal its hooks mode's."""
    ours, theirs = _pair("GRU")
    engine, reference = BookKeepingEngine(), PrivacyEngine()
    mine = _trained(engine, ours, {"grad_sample_mode": "bookkeeping"}, split)
    wanted = _trained(reference, theirs, {}, split)
    assert engine.accountant.history == reference.accountant.history
    assert engine.get_epsilon(1e-5) == reference.get_epsilon(1e-5)
    wanted_by_name = dict(zip(_weights(theirs), wanted, strict=True))
    for name, value in zip(_weights(ours), mine, strict=True):
        torch.testing.assert_close(value, wanted_by_name[name], rtol=0, atol=1e-6)


def test_the_engine_wraps_or_not_and_refuses_what_it_cannot_do() -> None:
    """wrap_model chooses module or hooks; other modes stay Opacus's; per-layer clipping is refused."""
    data = DataLoader(TensorDataset(torch.zeros(8, STEPS, FEATURES)), batch_size=4)

    def make(network: nn.Module, **options: Any) -> object:
        return BookKeepingEngine().make_private(
            module=network,
            optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
            data_loader=data,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            **options,
        )[0]

    assert isinstance(make(_pair("GRU")[0], grad_sample_mode="bookkeeping"), BookKeepingModule)
    unwrapped = make(_pair("GRU")[0], grad_sample_mode="bookkeeping", wrap_model=False)
    assert isinstance(unwrapped, BookKeepingHooks)
    assert not isinstance(unwrapped, nn.Module)
    assert isinstance(make(_pair("GRU")[1]), GradSampleModule)
    with pytest.raises(ValueError, match="per_layer"):
        make(_pair("GRU")[0], grad_sample_mode="bookkeeping", clipping="per_layer")


WEIGHT_IN_LOSS = (1.0, -40.0, 0.2, 10.0, -0.05)  # patients whose gradients differ in size

# Known defects of Opacus 1.6, kept as documentation: our check must see them.


def _opacus_sum(network: Last, sequences: list[Tensor], clip: float, form: str) -> PrivateSum:
    """The clipped sum of Opacus's hooks mode. form: "padded" (sequences of one length), "sorted" or "unsorted"."""

    def private_sum(patients: Sequence[int]) -> tuple[Tensor, None]:
        wrapped = GradSampleModule(copy.deepcopy(network), loss_reduction="sum")
        optimizer = DPOptimizer(
            torch.optim.SGD(wrapped.parameters(), lr=0.0),
            noise_multiplier=0.0,
            max_grad_norm=clip,
            expected_batch_size=1,
            loss_reduction="sum",
        )
        chosen = sorted(patients, key=lambda p: -len(sequences[p])) if form == "sorted" else list(patients)
        records = [sequences[p] for p in chosen]
        batch = torch.stack(records) if form == "padded" else pack_sequence(records, enforce_sorted=form == "sorted")
        (wrapped(batch) * torch.tensor([WEIGHT_IN_LOSS[p] for p in chosen])).sum().backward()
        optimizer.step()
        return torch.cat([p.grad.flatten().double() for p in optimizer.params]), None

    return private_sum


def _opacus_records(lengths: tuple[int, ...]) -> tuple[Last, list[Tensor], Tensor, float]:
    """DPLSTM and a linear head, records of these lengths, the oracle's gradients [5, d], and their median norm."""
    torch.manual_seed(0)
    network = Last(DPLSTM(FEATURES, HIDDEN, batch_first=True))
    sequences = [torch.randn(n, FEATURES) for n in lengths]

    def loss_of(patient: int) -> Tensor:
        logits: Tensor = network(sequences[patient][None])
        return WEIGHT_IN_LOSS[patient] * logits[0]

    gradients = patient_gradients(network.parameters(), loss_of, range(5))
    return network, sequences, gradients, float(gradients.norm(dim=1).median())


@pytest.mark.parametrize(("form", "lengths"), [("sorted", (2, 5, 1, 4, 3)), ("padded", (4, 4, 4, 4, 4))])
def test_the_harness_passes_opacus_on_sorted_and_padded_input(form: str, lengths: tuple[int, ...]) -> None:
    """Opacus's DPLSTM and linear head pass the check that every private sum must pass, where its rows are in order."""
    network, sequences, gradients, clip = _opacus_records(lengths)
    check_private_sum(_opacus_sum(network, sequences, clip, form), gradients, clip, LOOSE)


def test_opacus_mixes_patients_on_packed_unsorted_input() -> None:
    """D1: the same check fails Opacus's DPLSTM and linear head on unsorted packed input.

    Recurrent gradients per example come back in sorted order, linear ones in the caller's, so that the norm of one
    patient clips the rows of another: a patient can move the sum by more than C.
    """
    network, sequences, gradients, clip = _opacus_records((2, 5, 1, 4, 3))
    mixed = _opacus_sum(network, sequences, clip, "unsorted")
    with pytest.raises(AssertionError, match="clipped sum is off"):
        check_private_sum(mixed, gradients, clip, LOOSE)
    with pytest.raises(AssertionError, match="removing a patient moved the sum"):
        check_private_sum(mixed, gradients, clip, BOUNDS)
    moved = [(mixed(range(5))[0] - mixed([q for q in range(5) if q != p])[0]).norm() for p in range(5)]
    assert float(max(moved)) > 1.5 * clip


def _ghost_sum(network: nn.Linear, X: Tensor, A: Tensor, clip: float) -> PrivateSum:
    """The clipped sum of Opacus's ghost mode, for a loss whose gradient at the layer's output is A [P, T, G]."""

    def private_sum(patients: Sequence[int]) -> tuple[Tensor, Tensor]:
        wrapped = GradSampleModuleFastGradientClipping(
            copy.deepcopy(network), loss_reduction="sum", max_grad_norm=clip, use_ghost_clipping=True
        )
        losses = (wrapped(X[list(patients)]) * A[list(patients)]).sum((1, 2))
        losses.sum().backward(retain_graph=True)
        norms, weights = wrapped.get_norm_sample(), wrapped.get_clipping_coef()
        wrapped.zero_grad()
        wrapped.disable_hooks()
        (weights * losses).sum().backward()
        return torch.cat([p.grad.flatten().double() for p in wrapped.parameters()]), norms

    return private_sum


def test_the_harness_passes_the_ghost_mode_of_opacus_where_no_rows_cancel() -> None:
    """Opacus's ghost mode of a linear layer passes the check on random rows."""
    generator = torch.Generator().manual_seed(0)
    A, X = (torch.randn(4, 16, 16, generator=generator) for _ in range(2))
    gradients = torch.einsum("ptg,ptf->pgf", A.double(), X.double()).flatten(1)
    clip = float(gradients.norm(dim=1).median())
    check_private_sum(_ghost_sum(nn.Linear(16, 16, bias=False), X, A, clip), gradients, clip, LOOSE)


def test_the_harness_fails_the_ghost_mode_of_opacus_where_rows_cancel() -> None:
    """D14: for rows that all but cancel, the check finds norms that are no bounds, and sums that move by many C."""
    A, X = cancelling(400, 16, 16, 16)
    gradients = torch.einsum("ptg,ptf->pgf", A.double(), X.double()).flatten(1)
    clip = float(gradients.norm(dim=1).median()) / 1000
    ghost = _ghost_sum(nn.Linear(16, 16, bias=False), X, A, clip)
    with pytest.raises(AssertionError, match=r"norm 0\.0 reported for"):
        check_private_sum(ghost, gradients, clip, BOUNDS)
    with pytest.raises(AssertionError, match=r"removing a patient moved the sum by \d{3,}"):
        check_private_sum(lambda patients: (ghost(patients)[0], None), gradients, clip, BOUNDS)


def test_opacus_ghost_norm_is_no_upper_bound_where_rows_cancel() -> None:
    """D14: for rows that all but cancel, Opacus's ghost norm of a linear layer can be 0; ours never is below the true.

    Its sampler clamps the negative result of a float32 Gram form to 0, so that the patient is not clipped at all.
    """
    torch.manual_seed(0)
    patients, half, width = 400, 8, 16
    a, x = torch.randn(patients, half, width), torch.randn(patients, half, width)
    A, X = torch.cat([a, -a], 1), torch.cat([x, x * (1 + 1e-4 * torch.randn_like(x))], 1)
    true = torch.einsum("ptg,ptf->pgf", A.double(), X.double()).flatten(1).norm(dim=1)
    layer = nn.Linear(width, width, bias=False)

    ghost = GradSampleHooksFastGradientClipping.NORM_SAMPLERS[nn.Linear](layer, [X], A)[layer.weight]
    assert int((ghost == 0).sum()) > 0
    assert float((true / ghost.double().clamp(min=1e-30)).max()) > 100

    hooks = BookKeepingHooks(layer, loss_reduction="sum")
    with Rows(torch.arange(patients), patients):
        out = layer(X)
    (out * A).sum().backward()
    assert bool((hooks.book.gradients().norms() >= true).all())
