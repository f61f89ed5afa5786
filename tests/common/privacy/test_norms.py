"""Norms are upper bounds in floating point, by either form, whatever the rows are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.privacy import norms
from common.privacy.norms import FLOOR, Factor, squared_norms
from common.privacy.rows import Rows

FORMS = {"Gram": 0.0, "product": 1e9}  # prices of the Gram form that make it always or never the cheaper one
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def _exact(rows: Rows, A: Tensor, factors: list[Factor]) -> tuple[Tensor, Tensor]:
    """Norm and gross norm [P] of the products, written out in float64.

    The gross norm is the largest that either form may report: each row's outputs, all columns, by all of its inputs.
    """
    net, gross = torch.zeros(rows.count, dtype=torch.float64), torch.zeros(rows.count, dtype=torch.float64)
    for patient in range(rows.count):
        mine = rows.patient == patient
        inputs = torch.zeros(int(mine.sum()), dtype=torch.float64)
        for factor in factors:
            a = A[mine, factor.first : factor.last].double()
            ones = torch.ones(len(a), int(factor.bias), dtype=torch.float64)
            x = torch.cat([*([] if factor.X is None else [factor.X[mine].double()]), ones], dim=1)
            net[patient] += (a.t() @ x).square().sum()
            inputs += x.square().sum(1)
        gross[patient] = (A[mine].double().norm(dim=1) * inputs.sqrt()).sum()
    return net.sqrt(), gross


def _check(rows: Rows, A: Tensor, factors: list[Factor]) -> None:
    """Norms within [true (1 - 1e-6), true (1 + 3e-5)], or the floor where rows cancel below it."""
    below, above = (1e-6, 3e-5) if A.dtype == torch.float32 else (1e-12, 1e-9)
    reported = squared_norms(rows, A, factors).bounds()
    true, gross = _exact(rows, A, factors)
    assert bool((reported >= true * (1 - below)).all()), float((reported / true).min())
    assert bool((reported <= torch.maximum(true, gross * FLOOR) * (1 + above)).all()), float((reported / true).max())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**20),
    patients=st.integers(1, 5),
    most=st.integers(1, 40),
    widths=st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 6)),
    bias=st.booleans(),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_norms_of_random_rows(
    dtype: str, form: str, seed: int, patients: int, most: int, widths: tuple[int, int, int], bias: bool, scale: float
) -> None:
    """Two maps that share columns, as a GRU's do, rows of patients mixed: norms are the true ones to rounding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norms, "GRAM_PRICE", FORMS[form])
        generator = torch.Generator().manual_seed(seed)
        n = int(torch.randint(1, most * patients + 1, (), generator=generator))
        rows = Rows(torch.randint(0, patients, (n,), generator=generator), patients)
        inputs, states, unit = widths

        def draw(width: int) -> Tensor:
            values = torch.randn(n, width, generator=generator, dtype=torch.float64) * scale
            return values.to(DTYPES[dtype])

        A = draw(4 * unit)
        factors = [Factor(draw(inputs), 0, 3 * unit, bias), Factor(draw(states), unit, 4 * unit, bias)]
        _check(rows, A, factors)
        _check(rows, A, [Factor(None, 0, unit, True), Factor(draw(inputs), unit, 4 * unit, False)])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [3, 96])
@pytest.mark.parametrize("difference", [1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 0.0])
def test_norms_of_rows_that_cancel(
    dtype: str, form: str, width: int, difference: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows whose products cancel to any degree, down to nothing: the reported norm is never below the true one."""
    monkeypatch.setattr(norms, "GRAM_PRICE", FORMS[form])
    generator = torch.Generator().manual_seed(width)
    patients, half = 40, 8
    a = torch.randn(patients, half, width, generator=generator)
    x = torch.randn(patients, half, width, generator=generator)
    x_again = x * (1 + difference * torch.randn(x.shape, generator=generator))
    A, X = (torch.cat(pair, 1).flatten(0, 1).to(DTYPES[dtype]) for pair in ((a, -a), (x, x_again)))
    rows = Rows(torch.arange(patients).repeat_interleave(2 * half), patients)
    _check(rows, A, [Factor(X, 0, width, False)])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_norms_that_are_not_finite_stay_with_their_patient(
    form: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN, infinity or overflow in one patient's row gives a norm beyond float32, and changes no other."""
    monkeypatch.setattr(norms, "GRAM_PRICE", FORMS[form])
    torch.manual_seed(0)
    rows = Rows(torch.tensor([0, 1, 2, 0, 1, 2, 2, 1, 2]), 3)
    A, X = torch.randn(9, 4), torch.randn(9, 5)
    before = squared_norms(rows, A, [Factor(X, 0, 4, True)]).bounds()
    A[4, 2] = X[4, 3] = value
    after = squared_norms(rows, A, [Factor(X, 0, 4, True)]).bounds()
    assert (after < torch.finfo(torch.float32).max).tolist() == [True, False, True]
    assert torch.equal(after[[0, 2]], before[[0, 2]])


def test_patients_without_rows_have_norm_zero() -> None:
    """A patient that owns no row has a gradient of norm zero."""
    rows = Rows(torch.tensor([2, 2]), 4)
    bounds = squared_norms(rows, torch.ones(2, 1), [Factor(torch.ones(2, 1), 0, 1, False)]).bounds()
    assert bounds.tolist() == [0.0, 0.0, 2.0, 0.0]


@pytest.mark.parametrize(("steps", "width"), [(1, 64), (60, 512), (200, 512)])
@pytest.mark.parametrize("swapped", [False, True])
def test_rows_whose_squares_underflow_keep_their_norm(steps: int, width: int, swapped: bool) -> None:
    """Tiny gradients times huge inputs, whose squares are 0 and fine in float32, have the norm of their product."""
    a, x = torch.full((steps, width), 2.5e-23), torch.full((steps, width), 1e19)
    if swapped:
        a, x = x, a
    rows = Rows(torch.zeros(steps, dtype=torch.int64), 1)
    reported = float(squared_norms(rows, a, [Factor(x, 0, width, False)]).bounds())
    true = float((a.double().T @ x.double()).norm())
    assert true * (1 - 1e-6) <= reported <= true * (1 + 1e-6)
