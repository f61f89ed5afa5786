"""Norms of per-patient gradients that are products, without writing the gradients out.

A linear map's gradient is, for one patient, G = sum_t a_t x_t' over the patient's rows t: a_t is what backward sent
to the map's output, x_t its input. With a bias, x_t has one more column, always 1. ||G||^2 has two forms:

    form the product:  G itself, entry by entry                      T G F multiplications
    Gram matrices:     sum over s, t of (a_s . a_t) (x_s . x_t)      T^2 (G + F) multiplications

(T rows, G outputs, F inputs; Goodfellow 2015, arXiv 1510.01799, for T = 1; Li et al. 2022, arXiv 2110.05679,
section 4, for the Gram form). The cheaper one is taken, per group of patients.

Floating point is where a norm stops being a bound. If a patient's rows cancel, the Gram form subtracts large numbers
to get a small one: in float32 it can come out as zero, or below, while G is not zero, and the patient would be
scaled up to a contribution without limit (measured: 11 times the clip bound, and 3,095 times in Opacus 1.6's ghost
mode, which does this). So:

- The Gram form is computed in float64, whatever the model's type. It is taken where T is small, and costs about a
  tenth of a private step more than in float32. Float32 with a slack was rejected: a slack that covers its worst
  case (hundreds of roundings in each dot product) would inflate ordinary norms by a thousandth.
- The product is formed in the model's type, where each entry is off by at most T u sum_t |a_t||x_t|, u = eps / 2
  (Higham 2002, section 3.1: for any order of summation).
- Both add a slack to the squared norm, in terms of the gross norm s = sum_t ||a_t|| ||x_t||, which no cancellation
  can shrink: 4 eps s^2, and more for T > 52. It covers the formed product's error up to the factor below. It also
  keeps the rounding of the clipped sum in bounds, which for a patient scaled by c is of the order of u c s: since
  norm >= 2 sqrt(eps) s, c s is at most C / (2 sqrt(eps)).

Guarantee:
    For any finite input, true norm <= reported norm x (1 + (85 + G/4) eps): 1 + 2.5e-5 in float32 for G = 512. That
    is the worst case over all roundings; ordinary rounding leaves the reported norm above the true one (tests).
    Non-finite rows, and products that overflow, give a norm that is not finite, never a small one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.privacy.rows import Group, Rows

EPS64 = torch.finfo(torch.float64).eps
SLACK = 4.0  # in units of eps
UNSLICED = 52  # rows up to which 4 eps cover the worst case of a formed product
GRAM_PRICE = 3.0  # a multiplication of the float64 Gram form in units of a formed product's (measured: 2.1 to 3.4)


@dataclass(frozen=True)
class Factor:
    """The right factor X of a product A'X, and which columns of A belong to it.

    Attributes:
        X: [N, F] inputs; None if only the bias is trained.
        first, last: columns of A, half open.
        bias: the map has a trained bias.
    """

    X: Tensor | None
    first: int
    last: int
    bias: bool

    @property
    def width(self) -> int:
        """F, without the bias."""
        return 0 if self.X is None else self.X.shape[1]


def squared_norms(rows: Rows, A: Tensor, factors: Sequence[Factor]) -> Tensor:
    """Upper bounds on each patient's sum over factors of ||A_p[:, first:last]' [X_p, 1]||^2.

    Args:
        rows: owner of each row.
        A: [N, columns] gradients with respect to the outputs.
        factors: factors may share columns of A; shared columns are multiplied once.

    Returns:
        [P] float64. Not finite for a patient with non-finite rows.
    """
    total = torch.zeros(rows.count, dtype=torch.float64, device=A.device)
    width = A.shape[1] + sum(factor.width for factor in factors)
    formed = sum((factor.last - factor.first) * factor.width for factor in factors)
    for group in rows.groups(width):
        if group.steps == 1:
            norms = _single(group, A, factors)
        elif GRAM_PRICE * group.steps * width < formed:
            norms = _gram(group, A, factors)
        else:
            norms = _formed(group, A, factors)
        total.index_add_(0, group.patients, norms)
    return total


def _single(group: Group, A: Tensor, factors: Sequence[Factor]) -> Tensor:
    """One row per patient: ||a||^2 (||x||^2 + 1), where nothing can cancel."""
    a = group.take(A)[:, 0].double().square()
    norms = a.new_zeros(len(a))
    for factor in factors:
        x = 0.0 if factor.X is None else group.take(factor.X)[:, 0].double().square().sum(1)
        norms += a[:, factor.first : factor.last].sum(1) * (x + factor.bias)
    return norms


def _gram(group: Group, A: Tensor, factors: Sequence[Factor]) -> Tensor:
    """Sum over s, t of (a_s . a_t) (x_s . x_t + 1), in float64."""
    a = group.take(A, zero_padding=True).double()
    cuts = sorted({cut for factor in factors for cut in (factor.first, factor.last)})
    pieces = {first: _self_product(a[:, :, first:last]) for first, last in itertools.pairwise(cuts)}
    norms = a.new_zeros(len(a))
    for factor in factors:
        aa = sum(piece for first, piece in pieces.items() if factor.first <= first < factor.last)
        assert isinstance(aa, Tensor)
        xx = aa.new_zeros(()) if factor.X is None else _self_product(group.take(factor.X).double())
        xx = xx + factor.bias
        gross = (aa * xx).diagonal(dim1=1, dim2=2).clamp(min=0).sqrt().sum(1)
        rounding = (A.shape[1] + factor.width + group.steps**2) * EPS64
        norms += (aa * xx).sum((1, 2)).clamp(min=0) + (_slack(group, A.dtype) + rounding) * gross.square()
    return norms


def _formed(group: Group, A: Tensor, factors: Sequence[Factor]) -> Tensor:
    """||G||^2 from G."""
    a = group.take(A, zero_padding=True)
    norms = torch.zeros(len(a), dtype=torch.float64, device=a.device)
    for factor in factors:
        a_f = a[:, :, factor.first : factor.last]
        x_squared = torch.zeros((), dtype=torch.float64, device=a.device)
        if factor.X is not None:
            x = group.take(factor.X)
            # x'a, not a'x: the wide side inside is faster. Entries are summed in two stages, the second in float64.
            product = torch.linalg.vector_norm(torch.bmm(x.transpose(1, 2), a_f), dim=2)
            norms += product.double().square().sum(1)
            x_squared = torch.linalg.vector_norm(x, dim=2).double().square()
        if factor.bias:
            norms += a_f.sum(1).double().square().sum(1)
        a_norm = torch.linalg.vector_norm(a_f, dim=2).double()
        gross = (a_norm * (x_squared + factor.bias).sqrt()).sum(1)
        norms += _slack(group, A.dtype) * gross.square()
    return norms


def _self_product(m: Tensor) -> Tensor:
    """[p, T, F] -> [p, T, T]."""
    return torch.bmm(m, m.transpose(1, 2))


def _slack(group: Group, dtype: torch.dtype) -> float:
    """What is added to a squared norm, in units of the squared gross norm."""
    return SLACK * torch.finfo(dtype).eps * max(1.0, (group.steps / UNSLICED) ** 2)
