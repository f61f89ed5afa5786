"""Gradients that are products of rows, sum over t of a_t x_t': clipped and added up, each formed at most once.

The clipped sum needs every patient's norm first, over all parameters. For all modules but one it is therefore two
passes: norms, then a product of weighted rows. The last one, the largest, can do with one: by then only its own norm
is missing, so a patient's product is formed, measured, weighted and added while it is in the cache. That saves the
second product, a fifth of a step. It is worth it for patients with enough rows (`SINGLE_PASS`); for short ones the
Gram form of the norm and one product over everybody's rows is cheaper than to form many products of a few rows each.

Sums are float64, also for a float32 model: products of at most `ROWS_PER_SUM` rows, or patients, in the model's type,
added up in float64. With u = eps / 2 the error is at most (n + 2) u times the sum over patients of c s, s the gross
norm of norms.py and n the larger of ROWS_PER_SUM and a patient's own rows, `LONGEST` at most (Higham 2002, section
3.1): the worst case, whatever the size of the batch. What tests see is about sqrt of that: for 2,500 equal patients
9e-7 C for each, and 6e-6 C when one of them is taken away. Longer blocks are faster (256 rows: 4 % of a step of 64
sequences of 48 steps) and rounded more (2e-6 C for each by products; 1,024 rows: 2e-5 C when one is taken away); one
product in float32 gives 8e-6 C and 2e-4 C.

A weight of exactly 0 leaves a patient out altogether: its rows are zeroed, not multiplied, because 0 x NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from common.models.cells.cell import reorder
from common.privacy.norms import (
    GRAM_PRICE,
    Factor,
    Gross,
    PatientRows,
    Products,
    SquaredNorms,
    cheapest,
    entries,
    form,
    in_float64,
    measure,
    squared_norms,
    width,
)
from common.privacy.rows import Rows

ROWS_PER_SUM = 128  # of a product in the model's type, before it is added up in float64
LONGEST = 1024  # rows of a patient whose product is formed as a whole
SINGLE_PASS = 32  # what measuring and adding a formed product costs, in rows of forming it (measured: 9 to 50)


@dataclass(frozen=True)
class LinearMap:
    """Parameters whose gradient is A'X: a weight [G, F], a bias [G], either of them absent or frozen."""

    factor: Factor
    weight: Parameter | None
    bias: Parameter | None
    order: Sequence[int] = (0,)  # gate columns of A -> gate order of the parameters


@dataclass(frozen=True)
class ProductGradient:
    """sum over a patient's rows of a_t [x_t, 1]', for maps that share the rows and perhaps columns of A [N, G]."""

    rows: Rows
    A: Tensor
    maps: Sequence[LinearMap]

    def squared_norms(self) -> SquaredNorms:
        """Per patient, see norms.py."""
        return squared_norms(self.rows, self.A, self._factors)

    def weighted_sum(self, weights: Tensor) -> dict[Parameter, Tensor]:
        """Sum of weight times gradient, per parameter."""
        sums = _Sums(self.maps, self.A)
        sums.add_rows(self.A, [m.factor.X for m in self.maps], self.rows.spread(weights))
        return sums.by_parameter()

    def clipped_sum(
        self, rest: SquaredNorms, weigh: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, dict[Parameter, Tensor]]:
        """Weights [P] of all patients and the weighted sum, in one pass over the rows where that is cheaper.

        Args:
            rest: squared norms [P] of all other parameters' gradients.
            weigh: norms [p] over all parameters, as upper bounds -> weights [p], 0 for a norm that is not finite.
        """
        factors, sums = self._factors, _Sums(self.maps, self.A)
        gross = Gross.of(self.rows, self.A, factors)
        total = SquaredNorms(rest.net.clone(), rest.gross + gross.squares)
        done = torch.zeros(self.rows.count, dtype=torch.bool, device=self.A.device)
        weights = total.net.new_zeros(self.rows.count)
        for group in self.rows.groups(self._numbers):
            rows, patients = PatientRows.of(group, self.A, factors), group.patients
            products = form(rows, factors) if self._worth_forming(group.steps) else None
            net = cheapest(rows, factors) if products is None else measure(products, factors)
            which = gross.doubts(net, patients).nonzero()[:, 0]
            if len(which):
                doubtful = patients[which]
                exact, norms = in_float64(rows, which, factors)
                net[which], total.gross[doubtful] = norms.net, rest.gross[doubtful] + norms.gross
            total.net[patients] += net
            if products is None:
                continue
            mine = weights[patients] = weigh(total.at(patients).bounds())
            if len(which):
                sums.add_products(exact, mine[which])
                mine = mine.index_fill(0, which, 0)
            sums.add_products(products, mine)
            done[patients] = True
        if not bool(done.all()):
            weights = torch.where(done, weights, weigh(total.bounds()))
            left = self.rows.spread(~done)
            w, inputs = self.rows.spread(weights), [m.factor.X for m in self.maps]
            if bool(left.all()):
                sums.add_rows(self.A, inputs, w)
            else:
                which = left.nonzero()[:, 0]
                sums.add_rows(self.A[which], [None if X is None else X[which] for X in inputs], w[which])
        return weights, sums.by_parameter()

    @property
    def cost(self) -> int:
        """Multiplications of the weighted sum: which part it is worth to do last."""
        return len(self.A) * entries(self._factors)

    @property
    def _factors(self) -> list[Factor]:
        return [m.factor for m in self.maps]

    def _worth_forming(self, steps: int) -> bool:
        gram = GRAM_PRICE * steps**2 * width(self.A, self._factors)
        return steps <= LONGEST and gram > SINGLE_PASS * entries(self._factors)

    def _numbers(self, steps: int) -> int:
        """What one patient's rows take, with what is formed of them."""
        formed = entries(self._factors) if self._worth_forming(steps) else 0
        return steps * width(self.A, self._factors) + formed


class _Sums:
    """Running sums of the maps' gradients, float64."""

    def __init__(self, maps: Sequence[LinearMap], A: Tensor) -> None:
        self.maps = maps
        self.products = [A.new_zeros(m.factor.width, _outputs(m), dtype=torch.float64) for m in maps]
        self.biases = A.new_zeros(A.shape[1], dtype=torch.float64)
        self.any_bias = any(m.bias is not None for m in maps)

    def add_rows(self, A: Tensor, inputs: Sequence[Tensor | None], weights: Tensor) -> None:
        """Adds sum over rows n of w_n [x_n, 1] a_n': A [N, G], X [N, F], weights [N]."""
        present, w = weights != 0, weights.to(A.dtype)[:, None]
        A = only_present(present, A)
        if self.any_bias:
            _add_blocks(self.biases[None], w, A)
        for m, total, X in zip(self.maps, self.products, inputs, strict=True):
            if X is not None:
                # The narrow side is weighted and stands left: (wX)'A is faster than A'(wX) and than (wA)'X.
                _add_blocks(total, only_present(present, X), A[:, m.factor.first : m.factor.last], w)

    def add_products(self, products: Products, weights: Tensor) -> None:
        """Adds sum over patients of weight [p] times product."""
        present, w = weights != 0, weights.to(products.biases.dtype)[:, None]
        if self.any_bias:
            _add_blocks(self.biases[None], w, only_present(present, products.biases))
        for total, matrix in zip(self.products, products.matrices, strict=True):
            if matrix is not None:
                _add_blocks(total.view(1, -1), w, only_present(present, matrix).flatten(1))

    def by_parameter(self) -> dict[Parameter, Tensor]:
        """The sums in the shape and gate order of each parameter."""
        found: dict[Parameter, Tensor] = {}
        for m, total in zip(self.maps, self.products, strict=True):
            if m.weight is not None and m.factor.X is not None:
                found[m.weight] = reorder(total.t(), m.order)
            if m.bias is not None:
                found[m.bias] = reorder(self.biases[m.factor.first : m.factor.last], m.order)
        return found


def _outputs(m: LinearMap) -> int:
    return m.factor.last - m.factor.first


def only_present(present: Tensor, tensor: Tensor) -> Tensor:
    """The tensor with rows that are not present set to zero; a copy only if there are any."""
    if not tensor.is_cuda and bool(present.all()):  # to ask a GPU costs more than the copy
        return tensor
    return tensor.masked_fill(~present.view(-1, *[1] * (tensor.dim() - 1)), 0)


def _add_blocks(total: Tensor, X: Tensor, A: Tensor, weights: Tensor | None = None) -> None:
    """Adds to total [F, G] the sum over rows n of w_n x_n a_n': blocks in the type of X, added up in float64."""
    for start in range(0, len(A), ROWS_PER_SUM):
        block = slice(start, start + ROWS_PER_SUM)
        x = X[block] if weights is None else X[block] * weights[block]
        total += x.t() @ A[block]
