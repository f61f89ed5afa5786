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
With u = eps / 2 of the model's type, the Gram form of ||G||^2 is off by at most (G + F + 6) u s^2, and the formed G
by at most T u s (Higham 2002, section 3.1, for any order of summation; terms are products of float32 numbers, a GRU's
of up to three sums, and are added up in float64). So:

- Where a norm comes out smaller than s / 8, the product is formed in float64. Rows that merely differ do not get there
  (random rows: s / 2 to s / 8 for up to 300 steps), rows that cancel do. Rejected: adding a multiple of s^2 instead,
  which inflates exactly the norms of patients whose sequences disagree; and float64 always, a fifth of a step slower.
  Time then depends a little on the data, as it does on the batch's size; no guarantee covers time.
- The same where a patient has a row of norm above 2^30. Its partner may then be so small that the partner's square
  underflows to 0 in float32 and takes norm and s with it, while the product is not small: weights that a hostile
  server can choose. Below 2^30, what underflows is below 1e-13 an entry.
- No norm is reported smaller than s / 512. The clipped sum is rounded in proportion to c s, c the patient's clip
  factor; so c s <= 512 C, and a patient that cancels cannot blow up the rounding of the sum.

Guarantee:
    For any finite input, true norm <= reported norm x (1 + r), with r at most 16 (G + F + 6) eps by the Gram form and
    (4 T + G / 4) eps by the product: both below 1.3e-3 in float32 for G + F = 640, T = 2,000. For rows that cancel, r
    is at most 256 T eps of float64. That is the worst case over all roundings; roundings cancel, and tests see 1e-6.
    Non-finite rows, and products that overflow, give a norm that is not finite, never a small one.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.linalg import vector_norm

from common.privacy.rows import Group, Rows

DOUBTFUL = 1 / 8  # of the gross norm: for a smaller norm the product is formed in float64
FLOOR = 1 / 512  # of the gross norm: no norm is reported smaller
LARGE = 2.0**30  # no honest row's norm reaches it; its partner may be so small that its square underflows
GRAM_PRICE = 1.4  # a multiplication of the Gram form, in those of a formed product (measured: 1.0 to 1.4)


class SquaredNorms(NamedTuple):
    """Squared norms [P] float64 of each patient's gradient, and of what it would be if no rows cancelled (at least)."""

    net: Tensor
    gross: Tensor

    @classmethod
    def zero(cls, count: int, device: torch.device) -> Self:
        """Of `count` patients without rows."""
        return cls(*torch.zeros(2, count, dtype=torch.float64, device=device))

    def add(self, patients: Tensor, others: SquaredNorms) -> None:
        """Adds those of other parameters [p], in place, at the patients [p] that they belong to."""
        self.net.index_add_(0, patients, others.net)
        self.gross.index_add_(0, patients, others.gross)

    def at(self, patients: Tensor) -> SquaredNorms:
        """Of these patients [p], a copy."""
        return SquaredNorms(self.net[patients], self.gross[patients])

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


@dataclass(frozen=True)
class PatientRows:
    """The rows of some patients side by side: a [p, T, columns] of A, xs [p, T, F] of each factor's X."""

    a: Tensor
    xs: Sequence[Tensor | None]

    @classmethod
    def of(cls, group: Group, A: Tensor, factors: Sequence[Factor]) -> Self:
        """Those of a group. What pads a patient with fewer rows has zeros in `a`."""
        xs = [None if factor.X is None else group.take(factor.X) for factor in factors]
        return cls(group.take(A, zero_padding=True), xs)

    def double(self, which: Tensor) -> PatientRows:
        """Some of the patients, in float64."""
        return PatientRows(self.a[which].double(), [None if x is None else x[which].double() for x in self.xs])


class Measured(NamedTuple):
    """Squared norms of some patients, and which of them [p] need float64: see the module docstring."""

    norms: SquaredNorms
    doubtful: Tensor


def squared_norms(rows: Rows, A: Tensor, factors: Sequence[Factor]) -> SquaredNorms:
    """Each patient's sum over factors of ||A_p[:, first:last]' [X_p, 1]||^2.

    Args:
        rows: owner of each row.
        A: [N, columns] gradients with respect to the outputs.
        factors: factors may share columns of A; shared columns are multiplied once.

    Returns:
        Net and gross, [P] each; not finite for a patient with non-finite rows.
    """
    total = SquaredNorms.zero(rows.count, A.device)
    for group in rows.groups(width(A, factors)):
        total.add(group.patients, cheapest(PatientRows.of(group, A, factors), factors))
    return total


def width(A: Tensor, factors: Sequence[Factor]) -> int:
    """Numbers in a row of A and of every X."""
    return A.shape[1] + sum(factor.width for factor in factors)


def entries(factors: Sequence[Factor]) -> int:
    """Numbers in one patient's product, without biases."""
    return sum((factor.last - factor.first) * factor.width for factor in factors)


def cheapest(rows: PatientRows, factors: Sequence[Factor]) -> SquaredNorms:
    """Squared norms [p] by the form that costs less here, in float64 where that is needed."""
    steps = rows.a.shape[1]
    by_gram = steps == 1 or GRAM_PRICE * steps * width(rows.a[0], factors) < entries(factors)
    norms, doubtful = measure_gram(rows, factors) if by_gram else measure_product(rows, factors, form(rows, factors))
    which = doubtful.nonzero()[:, 0]
    if len(which):
        exact = rows.double(which)
        norms.net[which], norms.gross[which] = measure_product(exact, factors, form(exact, factors)).norms
    return norms


def measure_gram(rows: PatientRows, factors: Sequence[Factor]) -> Measured:
    """Sum over s, t of (a_s . a_t) (x_s . x_t + 1); each term in the type of the rows, their sum in float64."""
    a = rows.a
    cuts = sorted({cut for factor in factors for cut in (factor.first, factor.last)})
    pieces = {first: _dot_products(a[:, :, first:last]) for first, last in itertools.pairwise(cuts)}
    net, alone = a.new_zeros(len(a), dtype=torch.float64), a.new_zeros(a.shape[:2], dtype=torch.float64)
    largest = a.new_zeros(len(a))
    for factor, x in zip(factors, rows.xs, strict=True):
        aa = functools.reduce(torch.add, (p for first, p in pieces.items() if factor.first <= first < factor.last))
        xx = None if x is None else _dot_products(x)
        for products in (aa, xx):
            if products is not None:
                largest = torch.maximum(largest, products.diagonal(dim1=1, dim2=2).amax(1))
        terms = aa * (float(factor.bias) if xx is None else xx.add_(1) if factor.bias else xx)
        net += terms.sum((1, 2), dtype=torch.float64).clamp(min=0)
        alone += terms.diagonal(dim1=1, dim2=2)
    return _judged(net, alone, largest)


def form(rows: PatientRows, factors: Sequence[Factor]) -> list[Tensor | None]:
    """Each factor's product x'a [p, F, columns], in the type of the rows: faster than a'x, its wide side last."""
    return [
        None if x is None else torch.bmm(x.transpose(1, 2), rows.a[:, :, factor.first : factor.last])
        for factor, x in zip(factors, rows.xs, strict=True)
    ]


def measure_product(rows: PatientRows, factors: Sequence[Factor], products: Sequence[Tensor | None]) -> Measured:
    """||G||^2 from G = sum_t a_t [x_t, 1]', its products formed already."""
    a = rows.a
    column_sums = a.sum(1).double() if any(factor.bias for factor in factors) else None
    net, inputs = a.new_zeros(len(a), dtype=torch.float64), a.new_zeros(a.shape[:2], dtype=torch.float64)
    outputs = _squares(a)
    largest = outputs.amax(1)
    for factor, x, product in zip(factors, rows.xs, products, strict=True):
        if x is not None and product is not None:
            net += _squares(product).sum(1)
            of_x = _squares(x)
            inputs += of_x
            largest = torch.maximum(largest, of_x.amax(1))
        if factor.bias and column_sums is not None:
            net += column_sums[:, factor.first : factor.last].square().sum(1)
            inputs += 1
    return _judged(net, outputs * inputs, largest)  # at least: a factor may belong to some columns only


def _judged(net: Tensor, alone: Tensor, largest: Tensor) -> Measured:
    """From net [p], the squared norms [p, T] of each row's own product, and the largest squared norm [p] of a row.

    A NaN is not large: it makes the norm NaN by itself.
    """
    gross = alone.sqrt().sum(1).square()
    return Measured(SquaredNorms(net, gross), (net < gross * DOUBTFUL**2) | (largest > LARGE**2))


def _dot_products(m: Tensor) -> Tensor:
    """Of all pairs of rows: [p, T, F] -> [p, T, T]."""
    return torch.bmm(m, m.transpose(1, 2))


def _squares(m: Tensor) -> Tensor:
    """Squared norms of rows: [.., F] -> [..], float64 from here on."""
    norms: Tensor = vector_norm(m, dim=-1)
    return norms.double().square()
