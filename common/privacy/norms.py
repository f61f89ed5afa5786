"""Norms of per-patient gradients that are products, without keeping the gradients.

A linear map's gradient is, for one patient, G = sum_t a_t x_t' over the patient's rows t: a_t is what backward sent
to the map's output, x_t its input. With a bias, x_t has one more column, always 1. ||G||^2 has two forms:

    form the product:  G itself, entry by entry                      T G F multiplications
    Gram matrices:     sum over s, t of (a_s . a_t) (x_s . x_t)      T^2 (G + F) multiplications

(T rows, G outputs, F inputs; Goodfellow 2015, arXiv 1510.01799, for T = 1; Li et al. 2022, arXiv 2110.05679,
section 4, for the Gram form). The cheaper one is taken, per group of patients.

Floating point is where a norm stops being a bound. If a patient's rows cancel, the Gram form subtracts large numbers
to get a small one: in float32 it can come out as zero, or below, while G is not zero, and the patient is then scaled
up to a contribution without limit (Opacus 1.6's ghost mode does this: 3,095 times the clip bound, measured). Against
that stands the gross norm s = sum_t ||a_t|| ||x_t||, the sum of the rows' own norms, which no cancellation shrinks.
With u = eps / 2 of the model's type, the Gram form of ||G||^2 is off by at most (G + F + 2) u s^2, and the formed G
by at most T u s (Higham 2002, section 3.1, for any order of summation). So:

- Where a norm comes out smaller than s / 8, the product is formed in float64. Rows that merely differ do not get there
  (random rows: s / 2 to s / 8 for up to 300 steps), rows that cancel do. Rejected: adding a multiple of s^2 instead,
  which inflates exactly the norms of patients whose sequences disagree; and float64 always, a fifth of a step slower.
  Time then depends a little on the data, as it does on the batch's size; no guarantee covers time.
- The same where an entry of a patient's rows is above 2^30. Its partner may then be so small that the partner's square
  underflows to 0 in float32 and takes norm and s with it, while the product is not small: weights that a hostile
  server can choose. Below 2^30, what underflows is below 1e-13 an entry.
- No norm is reported smaller than s / 512. The clipped sum is rounded in proportion to c s, c the patient's clip
  factor; so c s <= 512 C, and a patient that cancels cannot blow up the rounding of the sum.

Guarantee:
    For any finite input, true norm <= reported norm x (1 + r), with r at most 16 (G + F + 2) eps by the Gram form and
    (4 T + G / 4) eps by the product: both below 1.3e-3 in float32 for G + F = 640, T = 2,000. For rows that cancel, r
    is at most 256 T eps of float64. That is the worst case over all roundings; roundings cancel, and tests see 1e-6.
    Non-finite rows, and products that overflow, give a norm that is not finite, never a small one.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from common.privacy.rows import Rows

DOUBTFUL = 1 / 8  # of the gross norm: for a smaller norm the product is formed in float64
FLOOR = 1 / 512  # of the gross norm: no norm is reported smaller
LARGE = 2.0**30  # no honest gradient or input reaches it; its partner may be so small that its square underflows
GRAM_PRICE = 1.4  # a multiplication of the Gram form, in those of a formed product (measured: 1.0 to 1.4)


class SquaredNorms(NamedTuple):
    """Squared norms [P] float64 of each patient's gradient, and of what it would be if no rows cancelled (at least)."""

    net: Tensor
    gross: Tensor

    def bounds(self) -> Tensor:
        """[P] norms that are safe to clip by."""
        return torch.maximum(self.net, self.gross * FLOOR**2).sqrt()


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


def squared_norms(rows: Rows, A: Tensor, factors: Sequence[Factor]) -> SquaredNorms:
    """Each patient's sum over factors of ||A_p[:, first:last]' [X_p, 1]||^2.

    Args:
        rows: owner of each row.
        A: [N, columns] gradients with respect to the outputs.
        factors: factors may share columns of A; shared columns are multiplied once.

    Returns:
        Net and gross, [P] each; not finite for a patient with non-finite rows.
    """
    zeros = torch.zeros(rows.count, dtype=torch.float64, device=A.device)
    total = SquaredNorms(zeros, zeros.clone())
    width = A.shape[1] + sum(factor.width for factor in factors)
    formed = sum((factor.last - factor.first) * factor.width for factor in factors)
    some_large = any(_has_large(tensor) for tensor in [A, *(factor.X for factor in factors)])
    for group in rows.groups(width):
        a = group.take(A, zero_padding=True)
        xs = [None if factor.X is None else group.take(factor.X) for factor in factors]
        cheaper = group.steps == 1 or GRAM_PRICE * group.steps * width < formed
        form = _by_gram if cheaper else _by_product
        net, gross = form(a, xs, factors)
        in_doubt = net < gross * DOUBTFUL**2
        if some_large:
            in_doubt |= functools.reduce(torch.logical_or, [_is_large(m) for m in [a, *xs] if m is not None])
        doubtful = in_doubt.nonzero()[:, 0]
        if len(doubtful):
            exact = [None if x is None else x[doubtful].double() for x in xs]
            net[doubtful], gross[doubtful] = _by_product(a[doubtful].double(), exact, factors)
        total.net.index_add_(0, group.patients, net)
        total.gross.index_add_(0, group.patients, gross)
    return total


def _by_gram(a: Tensor, xs: Sequence[Tensor | None], factors: Sequence[Factor]) -> SquaredNorms:
    """Sum over s, t of (a_s . a_t) (x_s . x_t + 1). a: [p, T, columns], x: [p, T, F]."""
    cuts = sorted({cut for factor in factors for cut in (factor.first, factor.last)})
    pieces = {first: _dot_products(a[:, :, first:last]) for first, last in itertools.pairwise(cuts)}
    net, alone = a.new_zeros(len(a), dtype=torch.float64), a.new_zeros(a.shape[:2], dtype=torch.float64)
    for factor, x in zip(factors, xs, strict=True):
        aa = [piece for first, piece in pieces.items() if factor.first <= first < factor.last]
        xx = factor.bias if x is None else _dot_products(x) + factor.bias
        terms = functools.reduce(torch.add, aa) * xx
        net += terms.sum((1, 2)).clamp(min=0)
        alone += terms.diagonal(dim1=1, dim2=2)
    return SquaredNorms(net, alone.sqrt().sum(1).square())


def _by_product(a: Tensor, xs: Sequence[Tensor | None], factors: Sequence[Factor]) -> SquaredNorms:
    """||G||^2 from G = sum_t a_t [x_t, 1]', in the type of `a`. a: [p, T, columns], x: [p, T, F]."""
    column_sums = a.sum(1).double() if any(factor.bias for factor in factors) else None
    net, inputs = a.new_zeros(len(a), dtype=torch.float64), a.new_zeros(a.shape[:2], dtype=torch.float64)
    for factor, x in zip(factors, xs, strict=True):
        columns = slice(factor.first, factor.last)
        if x is not None:
            product = torch.bmm(x.transpose(1, 2), a[:, :, columns])  # x'a: faster than a'x, its wide side last
            net += _squares(product).sum(1)
            inputs += _squares(x)
        if factor.bias and column_sums is not None:
            net += column_sums[:, columns].square().sum(1)
            inputs += 1
    alone = _squares(a) * inputs  # at least: a factor may belong to some columns only
    return SquaredNorms(net, alone.sqrt().sum(1).square())


def _has_large(tensor: Tensor | None) -> bool:
    """Whether any entry of a tensor of rows is large; one pass, so that the usual case pays no more."""
    return tensor is not None and tensor.numel() > 0 and not bool(torch.stack(tensor.aminmax()).abs().max() <= LARGE)


def _is_large(m: Tensor) -> Tensor:
    """Which patients have a large entry: [p, T, F] -> [p]. A NaN is not large: it makes the norm NaN by itself."""
    return m.flatten(1).abs().amax(1) > LARGE if m[0].numel() else m.new_zeros(len(m), dtype=torch.bool)


def _dot_products(m: Tensor) -> Tensor:
    """Of all pairs of rows: [p, T, F] -> [p, T, T], float64 from here on."""
    return torch.bmm(m, m.transpose(1, 2)).double()


def _squares(m: Tensor) -> Tensor:
    """Squared norms of rows: [.., F] -> [..], float64 from here on."""
    norms: Tensor = vector_norm(m, dim=-1)
    return norms.double().square()
