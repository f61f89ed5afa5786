"""The private step's clipped sum: what the guarantees of the bookkeeping mode say, against an autograd loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from common.models.recurrent import GRU
from common.privacy.bookkeeping import BookKeepingHooks, BookKeepingOptimizer, clip_weights
from common.privacy.rows import Rows
from tests.common.privacy.cases import CELLS, POOLINGS, altered, cancelling, loss_over, make_cohort, twins
from tests.oracles import (
    FLOAT32,
    FLOAT64,
    Tolerance,
    book_keeping_sum,
    check_private_sum,
    clipped_sum,
    patient_gradients,
)

DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, FLOAT32), (torch.float64, FLOAT64)], ids=["float32", "float64"]
)


def _optimizer(network: nn.Module, clip: float = 1.0, sigma: float = 0.0, **options: Any) -> BookKeepingOptimizer:
    defaults: dict[str, Any] = {"expected_batch_size": 1.0}
    return BookKeepingOptimizer(
        torch.optim.SGD(network.parameters(), lr=1.0),
        noise_multiplier=sigma,
        max_grad_norm=clip,
        **{**defaults, **options},
    )


@DTYPES
@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**16),
    patients=st.integers(1, 6),
    cell=st.sampled_from(CELLS),
    pooling=st.sampled_from(POOLINGS),
    num_layers=st.integers(1, 2),
    bidirectional=st.booleans(),
    share=st.floats(0.3, 3.0),
)
def test_clipped_sum_norms_and_sensitivity(
    dtype: torch.dtype,
    tolerance: Tolerance,
    seed: int,
    patients: int,
    cell: str,
    pooling: tuple[str, ...],
    num_layers: int,
    bidirectional: bool,
    share: float,
) -> None:
    """On random ragged batches in random order, 1 to 5 sequences per patient: sum, norms and removal as promised."""
    network, twin = twins(cell, pooling, seed, dtype, num_layers=num_layers, bidirectional=bidirectional)
    loss = loss_over(make_cohort(seed, patients, dtype), seed)
    gradients = patient_gradients(twin.parameters(), lambda p: loss(twin, [p]), range(patients))
    clip = share * float(gradients.norm(dim=1).median())
    check_private_sum(book_keeping_sum(network, loss, clip), gradients, clip, tolerance)


@DTYPES
@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 2**16),
    cell=st.sampled_from(CELLS),
    pooling=st.sampled_from(POOLINGS),
    change=st.sampled_from(["x1000", "x1e30", "nan", "inf", "one nan"]),
)
def test_extreme_patients_are_bounded_too(
    dtype: torch.dtype, tolerance: Tolerance, seed: int, cell: str, pooling: tuple[str, ...], change: str
) -> None:
    """A patient scaled by 1e3 or 1e30, or with NaN or infinity somewhere, moves the sum by at most C."""
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "x1000": lambda v: v * 1e3,
        "x1e30": lambda v: v * 1e30,
        "nan": lambda v: v * math.nan,
        "inf": lambda v: v * math.inf,
        "one nan": lambda v: torch.cat([v[:-1], v[-1:] * math.nan]),
    }
    network, twin = twins(cell, pooling, seed, dtype)
    loss = loss_over(altered(make_cohort(seed, 4, dtype), 1, changes[change]), seed)
    gradients = patient_gradients(twin.parameters(), lambda p: loss(twin, [p]), range(4))
    clip = 0.7 * float(gradients[[0, 2, 3]].norm(dim=1).median())
    check_private_sum(book_keeping_sum(network, loss, clip), gradients, clip, tolerance)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_patient_with_nan_leaves_the_others_alone(cell: str, bad: float) -> None:
    """The sum with a non-finite patient equals the sum without that patient."""
    network, _ = twins(cell, ("last", "mean"), 3, torch.float64)
    loss = loss_over(altered(make_cohort(3, 5, torch.float64), 2, lambda v: v * bad))
    private_sum = book_keeping_sum(network, loss, 0.1)
    with_patient, norms = private_sum(range(5))
    without, _ = private_sum([0, 1, 3, 4])
    assert norms is not None
    assert norms.isfinite().tolist() == [True, True, False, True, True]
    torch.testing.assert_close(with_patient, without, rtol=0, atol=1e-14)


@DTYPES
def test_micro_batches_give_the_sum_of_one_batch(dtype: torch.dtype, tolerance: Tolerance) -> None:
    """Cutting a batch between patients changes the update by rounding only."""
    updates = []
    for cuts in ([range(6)], [[0], [1, 2], [3, 4, 5]], [[p] for p in range(6)]):
        network, _ = twins("GRU", ("last",), 1, dtype)
        before = [p.detach().clone() for p in network.parameters()]
        hooks = BookKeepingHooks(network, loss_reduction="sum", require_rows=True)
        optimizer = _optimizer(network, clip=0.1)
        loss = loss_over(make_cohort(1, 6, dtype))
        for cut in cuts:
            loss(network, list(cut)).backward()
            optimizer.accumulate()
            optimizer.zero_grad()  # as a loop may do after each backward pass: keeps the running sum
        assert all(p.summed_grad.dtype == torch.float64 for p in optimizer.params)
        optimizer.step()
        hooks.cleanup()
        updates.append(
            torch.cat([(p.detach() - b).flatten() for p, b in zip(network.parameters(), before, strict=True)])
        )
    for update in updates[1:]:
        assert float((update - updates[0]).norm()) <= tolerance.total * float(updates[0].norm())


@pytest.mark.parametrize("width", [4, 64], ids=["by product", "by Gram"])
def test_patients_that_cancel_are_bounded(width: int) -> None:
    """400 patients whose 16 rows all but cancel: none contributes more than C (1 + 1e-4) to a float32 sum."""
    a, x = cancelling(400, 16, width, width)
    clip = 1e-3 * float((a.norm(dim=2) * x.norm(dim=2)).sum(1).median())
    network = nn.Linear(width, width)
    hooks = BookKeepingHooks(network, loss_reduction="sum", require_rows=True)
    with Rows(torch.arange(400).repeat_interleave(16), 400):
        out = network(x.flatten(0, 1))
    (out * a.flatten(0, 1)).sum().backward()
    gradients = hooks.book.gradients()
    weights = clip_weights(gradients.norms(), clip, torch.float32)
    exact = torch.einsum("ptg,ptf->pgf", a.double(), torch.cat([x, torch.ones_like(x[..., :1])], 2).double())
    assert float((weights * exact.flatten(1).norm(dim=1)).max()) <= clip
    for patient in range(400):
        alone = gradients.weighted_sum(weights * (torch.arange(400) == patient))
        assert math.sqrt(sum(float(s.square().sum()) for s in alone.values())) <= clip * (1 + 1e-4)
    hooks.cleanup()


def test_clip_weights_never_lift_a_patient_above_the_bound() -> None:
    """Weight times norm is at most C after rounding to float32; zero norms give 1, non-finite norms give 0."""
    norms = torch.cat([torch.logspace(-12, 12, 2001, dtype=torch.float64), torch.tensor([0.0, math.inf, math.nan])])
    weights = clip_weights(norms, 0.3, torch.float32)
    assert float((weights[:-3].float().double() * norms[:-3]).max()) <= 0.3
    assert weights[-3:].tolist() == [1.0, 0.0, 0.0]


def test_a_factor_too_small_to_be_represented_counts_as_zero() -> None:
    """Norms at which C / norm is subnormal in float32: rounded there, a factor could double, so it is 0."""
    norms = torch.logspace(36, 60, 2001, dtype=torch.float64)
    weights = clip_weights(norms, 0.3, torch.float32)
    assert float((weights.float().double() * norms).max()) <= 0.3
    assert float(weights[0]) > 0
    assert not weights[norms > 0.3 / torch.finfo(torch.float32).tiny].any()


class _Recorder:
    """Noise that adds a constant and remembers how it was called."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, float]] = []

    def __call__(self, flat: Tensor, deviation: float) -> Tensor:
        self.calls.append((flat.clone(), deviation))
        return flat + 1.0


def test_noise_is_added_once_to_everything_and_divided() -> None:
    """One call with the flat float64 sum of all parameters in the optimizer's order and sigma C; then the division."""
    network, twin = twins("LSTM", ("last",), 2, torch.float64)
    loss, noise = loss_over(make_cohort(2, 3, torch.float64)), _Recorder()
    gradients = patient_gradients(twin.parameters(), lambda p: loss(twin, [p]), range(3))
    before = torch.cat([p.detach().flatten() for p in network.parameters()])
    BookKeepingHooks(network, loss_reduction="sum", require_rows=True)
    optimizer = _optimizer(network, clip=0.2, sigma=1.5, expected_batch_size=2.5, noise=noise)
    loss(network, range(3)).backward()
    optimizer.step()
    ((flat, deviation),) = noise.calls
    assert flat.dtype == torch.float64
    assert deviation == pytest.approx(0.3)
    torch.testing.assert_close(flat, clipped_sum(gradients, 0.2), rtol=0, atol=1e-10)
    after = torch.cat([p.detach().flatten() for p in network.parameters()])
    torch.testing.assert_close(before - after, (flat + 1.0) / 2.5, rtol=0, atol=1e-12)


def test_no_noise_is_drawn_for_multiplier_zero() -> None:
    """With noise_multiplier 0 the noise function is not called."""
    network, noise = nn.Linear(2, 1), _Recorder()
    BookKeepingHooks(network, loss_reduction="sum")
    optimizer = _optimizer(network, sigma=0.0, noise=noise)
    network(torch.ones(3, 2)).sum().backward()
    optimizer.step()
    assert noise.calls == []


def test_an_empty_batch_steps_with_noise() -> None:
    """A declared empty batch noises a sum of zero and steps, whether or not a forward pass ran."""
    for forward in (False, True):
        network, noise = nn.Linear(2, 1), _Recorder()
        BookKeepingHooks(network, loss_reduction="sum")
        optimizer = _optimizer(network, sigma=1.0, noise=noise)
        before = network.weight.detach().clone()
        if forward:
            network(torch.zeros(0, 2)).sum().backward()
        else:
            optimizer.empty_batch()
        optimizer.step()
        ((flat, _),) = noise.calls
        assert not flat.any()
        torch.testing.assert_close(network.weight, before - 1.0)


def test_a_batch_of_no_patients_passes_through_every_layer() -> None:
    """Forward and backward on zero rows, through recurrent, linear, embedding, norm and functorch layers, give zero."""
    network = nn.ModuleDict({"gru": GRU(3, 4), "head": nn.Linear(4, 2), "norm": nn.LayerNorm(2), "odd": _Scale(2)})
    network["codes"], network["bag"] = nn.Embedding(5, 2), nn.EmbeddingBag(5, 2)
    BookKeepingHooks(network, loss_reduction="sum")
    optimizer = _optimizer(network)
    before = [p.detach().clone() for p in network.parameters()]
    none = torch.zeros(0, dtype=torch.long)
    _, last = network["gru"](torch.zeros(6, 0, 3))
    out = network["odd"](network["norm"](network["head"](last[0])))
    (out.sum() + network["codes"](none).sum() + network["bag"](none, none).sum()).backward()
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(network.parameters(), before, strict=True))


def test_a_parameter_that_the_pass_did_not_use_gets_noise_alone() -> None:
    """A trained parameter without any record has sum zero and is noised like the others."""
    network: Any = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)})
    noise = _Recorder()
    BookKeepingHooks(network, loss_reduction="sum")
    optimizer = _optimizer(network, sigma=1.0, noise=noise)
    unused = network["unused"].weight.detach().clone()
    network["used"](torch.ones(3, 2)).sum().backward()
    optimizer.step()
    ((flat, _),) = noise.calls
    assert flat[:3].any()
    assert not flat[3:].any()
    torch.testing.assert_close(network["unused"].weight, unused - 1.0)


class _Scale(nn.Module):
    """A module that neither we nor Opacus know."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.scale * x)
