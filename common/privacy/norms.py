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


@dataclass(frozen=True)
class Gross:
    """What tells whether a norm may be trusted.

    Attributes:
        squares: [P] float64 squared gross norms, or more: a row of A counts whole for every factor.
        large: [P] whether a row has a norm above LARGE. A NaN is not large: it makes the norm NaN by itself.
    """

    squares: Tensor
    large: Tensor

    @classmethod
    def of(cls, rows: Rows, A: Tensor, factors: Sequence[Factor]) -> Self:
        """Of all patients, in one pass over the rows as they stand."""
        alone, largest = _each_row(A, [factor.X for factor in factors], factors)
        return cls(rows.add_up(alone).square(), rows.add_up((largest > LARGE).double()) > 0)

    def doubts(self, net: Tensor, patients: Tensor) -> Tensor:
        """[p] whether the squared norms [p] of these patients need float64: see the module docstring."""
        return (net < self.squares[patients] * DOUBTFUL**2) | self.large[patients]


def squared_norms(rows: Rows, A: Tensor, factors: Sequence[Factor]) -> SquaredNorms:
    """Each patient's sum over factors of ||A_p[:, first:last]' [X_p, 1]||^2.

    Args:
        rows: owner of each row.
        A: [N, columns] gradients with respect to the outputs.
        factors: factors may share columns of A; shared columns are multiplied once.

    Returns:
        Net and gross, [P] each; not finite for a patient with non-finite rows.
    """
    gross, net = Gross.of(rows, A, factors), A.new_zeros(rows.count, dtype=torch.float64)
    for group in rows.groups(lambda steps: steps * width(A, factors)):
        of_patients, patients = PatientRows.of(group, A, factors), group.patients
        found = cheapest(of_patients, factors)
        which = gross.doubts(found, patients).nonzero()[:, 0]
        if len(which):
            _, exact = in_float64(of_patients, which, factors)
            found[which], gross.squares[patients[which]] = exact
        net[patients] = found
    return SquaredNorms(net, gross.squares)


def width(A: Tensor, factors: Sequence[Factor]) -> int:
    """Numbers in a row of A and of every X."""
    return A.shape[1] + sum(factor.width for factor in factors)


def entries(factors: Sequence[Factor]) -> int:
    """Numbers in one patient's product, without biases."""
    return sum((factor.last - factor.first) * factor.width for factor in factors)


@dataclass(frozen=True)
class Products:
    """The products of some patients, in the type of their rows.

    Attributes:
        matrices: [p, F, columns] x'a of each factor.
        biases: [p, all columns] sums of a.
    """

    matrices: Sequence[Tensor | None]
    biases: Tensor


def cheapest(rows: PatientRows, factors: Sequence[Factor]) -> Tensor:
    """Squared norms [p] float64, by the form that costs less here."""
    steps = rows.a.shape[1]
    if steps == 1 or GRAM_PRICE * steps * width(rows.a[0], factors) < entries(factors):
        return measure_gram(rows, factors)
    return measure(form(rows, factors), factors)


def measure_gram(rows: PatientRows, factors: Sequence[Factor]) -> Tensor:
    """Sum over s, t of (a_s . a_t) (x_s . x_t + 1); each term in the type of the rows, their sum in float64."""
    a = rows.a
    cuts = sorted({cut for factor in factors for cut in (factor.first, factor.last)})
    pieces = {first: _dot_products(a[:, :, first:last]) for first, last in itertools.pairwise(cuts)}
    net = a.new_zeros(len(a), dtype=torch.float64)
    for factor, x in zip(factors, rows.xs, strict=True):
        aa = functools.reduce(torch.add, (p for first, p in pieces.items() if factor.first <= first < factor.last))
        xx = None if x is None else _dot_products(x)
        terms = aa * (float(factor.bias) if xx is None else xx.add_(1) if factor.bias else xx)
        net += terms.sum((1, 2), dtype=torch.float64).clamp(min=0)
    return net


def form(rows: PatientRows, factors: Sequence[Factor]) -> Products:
    """Each factor's product x'a [p, F, columns]: faster than a'x, its wide side last."""
    matrices = [
        None if x is None else torch.bmm(x.transpose(1, 2), rows.a[:, :, factor.first : factor.last])
        for factor, x in zip(factors, rows.xs, strict=True)
    ]
    return Products(matrices, rows.a.sum(1))


def measure(products: Products, factors: Sequence[Factor]) -> Tensor:
    """||G||^2 [p] float64 of G = sum_t a_t [x_t, 1]', from its products."""
    of_biases = products.biases.double().square()
    net = of_biases.new_zeros(len(of_biases))
    for factor, matrix in zip(factors, products.matrices, strict=True):
        if matrix is not None:
            net += _squares(matrix).sum(1)
        if factor.bias:
            net += of_biases[:, factor.first : factor.last].sum(1)
    return net


def in_float64(rows: PatientRows, which: Tensor, factors: Sequence[Factor]) -> tuple[Products, SquaredNorms]:
    """Products and norms of those patients [p] whose norms are in doubt."""
    a, xs = rows.a[which].double(), [None if x is None else x[which].double() for x in rows.xs]
    products = form(PatientRows(a, xs), factors)
    alone, _ = _each_row(a, xs, factors)
    return products, SquaredNorms(measure(products, factors), alone.sum(1).square())


def _each_row(a: Tensor, xs: Sequence[Tensor | None], factors: Sequence[Factor]) -> tuple[Tensor, Tensor]:
    """Of each row, for a [.., columns] and xs [.., F]: norm of its own product, norm of the largest of its factors."""
    outputs = largest = _squares(a)
    inputs = torch.zeros_like(outputs)
    for factor, x in zip(factors, xs, strict=True):
        if x is not None:
            of_x = _squares(x)
            inputs += of_x
            largest = torch.maximum(largest, of_x)
        inputs += float(factor.bias)
    return (outputs * inputs).sqrt(), largest.sqrt()


def _dot_products(m: Tensor) -> Tensor:
    """Of all pairs of rows: [p, T, F] -> [p, T, T]."""
    return torch.bmm(m, m.transpose(1, 2))


def _squares(m: Tensor) -> Tensor:
    """Squared norms of rows: [.., F] -> [..], float64 from here on."""
    norms: Tensor = vector_norm(m, dim=-1)
    return norms.double().square()
