"""Clipping in one pass over the rows, or in two: the same sum, and never a patient too much in it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from common.privacy import products
from common.privacy import rows as rows_module
from common.privacy.bookkeeping import clip_weights
from common.privacy.norms import Factor, PatientRows, Products, SquaredNorms
from common.privacy.products import LinearMap, ProductGradient
from common.privacy.rows import Rows

H, D, CLIP = 3, 2, 0.7
PRICES = {"two passes": math.inf, "as it comes": products.SINGLE_PASS, "one pass": 0.0}


def gru_like(rows: Rows, A: Tensor, X: Tensor, states: Tensor) -> ProductGradient:
    """Two maps that share the columns H to 3H of A [N, 4H]."""
    names = ((X, 0, 3 * H), (states, H, 4 * H))
    maps = [
        LinearMap(
            Factor(inputs, first, last, True),
            nn.Parameter(torch.zeros(last - first, inputs.shape[1], dtype=A.dtype)),
            nn.Parameter(torch.zeros(last - first, dtype=A.dtype)),
        )
        for inputs, first, last in names
    ]
    return ProductGradient(rows, A, maps)


def flat(sums: dict[nn.Parameter, Tensor]) -> Tensor:
    return torch.cat([total.flatten() for total in sums.values()])


def weigh(norms: Tensor) -> Tensor:
    return clip_weights(norms, CLIP, torch.float32)


def clipped(gradient: ProductGradient, rest: SquaredNorms, price: float) -> tuple[Tensor, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "SINGLE_PASS", price)
        weights, sums = gradient.clipped_sum(rest, weigh)
    return weights, flat(sums)


def cases(seed: int, patients: int, longest: int, kinds: list[str]) -> tuple[ProductGradient, SquaredNorms]:
    """Patients of 0 to `longest` rows, mixed; a kind makes one special. Other parameters have norms of their own."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, longest + 1, (patients,), generator=generator)
    owner = torch.repeat_interleave(torch.arange(patients), counts)
    owner = owner[torch.randperm(len(owner), generator=generator)]
    A, X = torch.randn(len(owner), 4 * H, generator=generator), torch.randn(len(owner), D, generator=generator)
    states = torch.randn(len(owner), H, generator=generator)
    for patient, kind in enumerate(kinds[:patients]):
        mine = (owner == patient).nonzero()[:, 0]
        half = len(mine) // 2
        if kind == "nan" and len(mine):
            A[mine[0], 0] = math.nan
        elif kind == "huge":
            A[mine] *= 1e30
        elif kind == "cancels" and half:
            A[mine[half : 2 * half]] = -A[mine[:half]]
            X[mine[half : 2 * half]] = X[mine[:half]] * (1 + 1e-5)
            states[mine[half : 2 * half]] = states[mine[:half]]
            A[mine[2 * half :]] = 0
    net = torch.rand(patients, dtype=torch.float64, generator=generator)
    return gru_like(Rows(owner, patients), A, X, states), SquaredNorms(net, net.clone())


some = given(
    seed=st.integers(0, 10**6),
    patients=st.integers(1, 9),
    longest=st.sampled_from([1, 4, 12, 40]),
    kinds=st.lists(st.sampled_from(["usual", "nan", "huge", "cancels"]), max_size=9),
)


@some
@settings(deadline=None, max_examples=150)
def test_one_pass_gives_what_two_give(seed: int, patients: int, longest: int, kinds: list[str]) -> None:
    """Weights and sum do not depend on who is formed, measured and added in one go, beyond rounding."""
    gradient, rest = cases(seed, patients, longest, kinds)
    total = gradient.squared_norms()
    weights = weigh(SquaredNorms(total.net + rest.net, total.gross + rest.gross).bounds())
    expected = flat(gradient.weighted_sum(weights))
    scale = max(float(expected.norm()), CLIP)
    for price in PRICES.values():
        found_weights, found = clipped(gradient, rest, price)
        torch.testing.assert_close(found_weights, weights, rtol=5e-5, atol=0)
        assert float((found - expected).norm()) <= 1e-4 * scale


@some
@settings(deadline=None, max_examples=100)
def test_no_patient_is_more_than_the_clip(seed: int, patients: int, longest: int, kinds: list[str]) -> None:
    """Each patient alone contributes at most C, also huge, cancelling and broken ones; a broken one nothing."""
    gradient, rest = cases(seed, patients, longest, kinds)
    maps = [m.factor.X for m in gradient.maps]
    assert maps[0] is not None
    assert maps[1] is not None
    for patient in range(patients):
        mine = (gradient.rows.patient == patient).nonzero()[:, 0]
        alone = gru_like(Rows(torch.zeros_like(mine), 1), gradient.A[mine], maps[0][mine], maps[1][mine])
        for price in PRICES.values():
            _, total = clipped(alone, rest.at(torch.tensor([patient])), price)
            assert float(total.norm()) <= CLIP * (1 + 1e-6)
            if len(mine) and not gradient.A[mine].isfinite().all():
                assert not total.any()


def test_the_larger_module_is_formed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With enough rows a patient's product is formed once for norm and sum, not once for each."""
    gradient, rest = cases(1, 3, 40, [])
    formed: list[int] = []
    form = products.form

    def counted(rows: PatientRows, factors: list[Factor]) -> Products:
        formed.append(len(rows.a))
        return form(rows, factors)

    monkeypatch.setattr(products, "SINGLE_PASS", 0.0)
    monkeypatch.setattr(products, "form", counted)
    monkeypatch.setattr(products, "cheapest", pytest.fail)
    gradient.clipped_sum(rest, weigh)
    assert sum(formed) == int((torch.bincount(gradient.rows.patient, minlength=3) > 0).sum())


def test_a_patient_of_very_many_rows_is_added_up_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than LONGEST are never one float32 product for the sum: norms first, then rows; the same sum."""
    gradient, rest = cases(1, 6, 40, ["usual"] * 6)
    weights, expected = clipped(gradient, rest, PRICES["two passes"])
    formed: list[int] = []
    form = products.form

    def counted(rows: products.PatientRows, factors: list[Factor]) -> list[Tensor | None]:
        formed.append(rows.a.shape[1])
        return form(rows, factors)

    monkeypatch.setattr(products, "form", counted)
    monkeypatch.setattr(products, "LONGEST", 9)
    monkeypatch.setattr(rows_module, "FLOATS_PER_CHUNK", 1)  # each patient a group of its own
    found_weights, found = clipped(gradient, rest, PRICES["one pass"])
    lengths = gradient.rows.patient.bincount(minlength=6).tolist()
    assert sorted(formed) == sorted(length for length in lengths if 0 < length <= 9)
    assert max(lengths) > 9
    torch.testing.assert_close(found_weights, weights, rtol=5e-5, atol=0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
