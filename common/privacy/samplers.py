"""From what a module saw to the gradients of its parameters per patient: their norms, and any weighted sum.

A per-patient gradient is never written out where that can be avoided. It has one of three forms:

    ProductGradient   sum of a_t x_t' over the patient's rows       linear maps, recurrent layers
    LookupGradient    sum of rows by (patient, code)                embeddings
    SummedGradient    written out, one per patient                  small or unknown modules

A sampler turns all uses of a module in one pass into one of these; a module that was used twice simply has more rows.
`SAMPLERS` holds ours; any other module goes through Opacus's own samplers, or functorch.

A weight of exactly 0 leaves a patient out altogether: its rows are zeroed, not multiplied, because 0 x NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from opacus.grad_sample import GradSampleHooks
from opacus.grad_sample.functorch import ft_compute_per_sample_gradient
from torch import Tensor, nn
from torch.nn import Parameter

from common.models.recurrence import CELLS
from common.models.recurrent import Recurrent
from common.privacy.norms import Factor, SquaredNorms
from common.privacy.products import LinearMap, ProductGradient, only_present
from common.privacy.rows import Rows


@dataclass(frozen=True)
class Use:
    """One call of a module in a training pass.

    Attributes:
        module: what was called.
        name: where it stands in the network, for errors.
        inputs: its positional inputs.
        gradient: dL/d output, [rows, ..].
        rows: owner of each row of dimension 0.
    """

    module: nn.Module
    name: str
    inputs: tuple[Any, ...]
    gradient: Tensor
    rows: Rows


@dataclass(frozen=True)
class Strand:
    """One pass of one layer and direction of a recurrent layer.

    Attributes:
        layer: the recurrent layer.
        suffix: of its parameters' names, such as "_l0_reverse".
        A: [N, gates x H] gate gradients.
        X: [N, D] inputs.
        H: [N, H] previous states.
        rows: owner of each packed row.
        memory: the buffer that A lies in, to be reused.
    """

    layer: Recurrent
    suffix: str
    A: Tensor
    X: Tensor
    H: Tensor
    rows: Rows
    memory: Tensor


class PatientGradient(Protocol):
    """The gradients of some parameters, one per patient."""

    def squared_norms(self) -> SquaredNorms:
        """Per patient; not finite for a patient with non-finite rows."""

    def weighted_sum(self, weights: Tensor) -> dict[Parameter, Tensor]:
        """Sum over patients of weight [P] times gradient, per parameter, float64. Weight 0 leaves out."""


@dataclass(frozen=True)
class LookupGradient:
    """Rows of a table: row `code` of its gradient is the sum of the values with that code, for each patient.

    patient, code: [M] int64; values: [M, E].
    """

    table: Parameter
    patient: Tensor
    count: int
    code: Tensor
    values: Tensor

    @cached_property
    def _pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """The (patient, code) that occur, [K] each, and the sum of their values [K, E] float64."""
        codes = len(self.table)
        pair, position = torch.unique(self.patient * codes + self.code, return_inverse=True)
        total = self.values.new_zeros(len(pair), self.values.shape[1], dtype=torch.float64)
        total.index_add_(0, position, self.values.double())
        return pair // codes, pair % codes, total

    def squared_norms(self) -> SquaredNorms:
        """Per patient. Summed in float64, here and below, so that cancellation costs nothing: net is gross."""
        patient, _, total = self._pairs
        norms = total.new_zeros(self.count).index_add_(0, patient, total.square().sum(1))
        return SquaredNorms(norms, norms)

    def weighted_sum(self, weights: Tensor) -> dict[Parameter, Tensor]:
        """Sum of weight times gradient, per parameter."""
        patient, code, total = self._pairs
        w = weights[patient]
        weighted = only_present(w != 0, total) * w[:, None]
        return {self.table: weighted.new_zeros(self.table.shape).index_add_(0, code, weighted)}


@dataclass(frozen=True)
class SummedGradient:
    """Gradients written out: [P, *shape] float64 for each parameter."""

    count: int
    gradients: dict[Parameter, Tensor]

    def squared_norms(self) -> SquaredNorms:
        """Per patient; net is gross."""
        parts = [g.reshape(self.count, p.numel()).square().sum(1) for p, g in self.gradients.items()]
        norms = torch.stack(parts).sum(0)
        return SquaredNorms(norms, norms)

    def weighted_sum(self, weights: Tensor) -> dict[Parameter, Tensor]:
        """Sum of weight times gradient, per parameter."""
        present = weights != 0
        return {p: torch.tensordot(weights, only_present(present, g), 1) for p, g in self.gradients.items()}


def recurrent(strands: Sequence[Strand]) -> PatientGradient:
    """One layer and direction: the input map and the hidden map, over shared gate columns."""
    layer, suffix = strands[0].layer, strands[0].suffix
    cell, unit = CELLS[layer.mode], layer.hidden_size
    A, X, H = (_joined(parts) for parts in zip(*((s.A, s.X, s.H) for s in strands), strict=True))

    def linear_map(name: str, inputs: Tensor, columns: tuple[int, int], order: Sequence[int]) -> LinearMap:
        bias = getattr(layer, f"bias_{name}{suffix}") if layer.bias else None
        factor = Factor(inputs, columns[0] * unit, columns[1] * unit, bias is not None)
        return LinearMap(factor, getattr(layer, f"weight_{name}{suffix}"), bias, order)

    maps = (
        linear_map("ih", X, cell.INPUT, cell.TORCH_INPUT),
        linear_map("hh", H, cell.HIDDEN, cell.TORCH_HIDDEN),
    )
    return ProductGradient(Rows.joined([s.rows for s in strands]), A, maps)


def linear(uses: Sequence[Use]) -> PatientGradient:
    """nn.Linear on [rows, .., F]; inner dimensions are further rows of the same owner."""
    module = uses[0].module
    assert isinstance(module, nn.Linear)
    rows, (X, A) = _flattened(uses, 1)
    weight, bias = _trained(module.weight), _trained(module.bias)
    factor = Factor(X if weight is not None else None, 0, A.shape[1], bias is not None)
    return ProductGradient(rows, A, [LinearMap(factor, weight, bias)])


def layer_norm(uses: Sequence[Use]) -> PatientGradient:
    """nn.LayerNorm: dL/d weight = normalised input x dL/d output, dL/d bias = dL/d output."""
    module = uses[0].module
    assert isinstance(module, nn.LayerNorm)
    rows, (x, g) = _flattened(uses, len(module.normalized_shape))
    gradients = {}
    if (weight := _trained(module.weight)) is not None:
        normalised = nn.functional.layer_norm(x, module.normalized_shape, eps=module.eps)
        gradients[weight] = rows.add_up(normalised * g)
    if (bias := _trained(module.bias)) is not None:
        gradients[bias] = rows.add_up(g)
    return SummedGradient(rows.count, gradients)


def embedding(uses: Sequence[Use]) -> PatientGradient:
    """nn.Embedding on codes [rows, ..]."""
    module = uses[0].module
    assert isinstance(module, nn.Embedding)
    rows, (values,) = _flattened(uses, 1, inputs=False)
    code = torch.cat([use.inputs[0].flatten() for use in uses])
    return _lookup(module, rows.patient, rows.count, code, values)


def embedding_bag(uses: Sequence[Use]) -> PatientGradient:
    """nn.EmbeddingBag (sum, mean) on codes [M] with offsets [rows], or codes [rows, k]; weights per code allowed."""
    module = uses[0].module
    assert isinstance(module, nn.EmbeddingBag)
    patients, codes, values = [], [], []
    for use in uses:
        given, offsets, weights = (*use.inputs, None, None)[:3]
        code, bags = given.flatten(), len(use.gradient)
        if offsets is None:
            size = torch.full((bags,), given.shape[1], device=code.device)
        else:
            size = torch.diff(offsets[:bags], append=offsets.new_tensor([len(code)]))
        bag = torch.repeat_interleave(torch.arange(bags, device=code.device), size)
        gradient = use.gradient
        if module.mode == "mean":
            counted = torch.ones_like(code) if module.padding_idx is None else code != module.padding_idx
            members = torch.zeros_like(size).index_add_(0, bag, counted.long())
            gradient = gradient / members.clamp(min=1)[:, None]
        patients.append(use.rows.patient[bag])
        codes.append(code)
        values.append(gradient[bag] if weights is None else gradient[bag] * weights.detach().reshape(-1, 1))
    return _lookup(module, torch.cat(patients), uses[0].rows.count, torch.cat(codes), torch.cat(values))


def fallback(uses: Sequence[Use]) -> PatientGradient:
    """Any other module: gradients per row from Opacus's sampler for its type, or functorch, added up per patient."""
    module, count = uses[0].module, uses[0].rows.count
    sampler = GradSampleHooks.GRAD_SAMPLERS.get(type(module), ft_compute_per_sample_gradient)
    trained = [p for p in own_parameters(module) if p.requires_grad]
    total: dict[Parameter, Tensor] = {}
    for use in uses:
        if sampler is ft_compute_per_sample_gradient and len(use.inputs) != 1:
            raise ValueError(
                f"{use.name} ({type(use.module).__name__}) was called with {len(use.inputs)} inputs; a module "
                "without a sampler of its own must have one: move its parameters into nn.Linear or nn.Embedding"
            )
        if len(use.gradient) == 0:
            per_row = {p: p.new_zeros(0, *p.shape) for p in trained}
        else:
            per_row = sampler(module, list(use.inputs), use.gradient)
        for p in trained:
            summed = use.rows.add_up(per_row[p])
            total[p] = total[p] + summed if p in total else summed
    return SummedGradient(count, total)


SAMPLERS: dict[type[nn.Module], Callable[[Sequence[Use]], PatientGradient]] = {
    nn.Linear: linear,
    nn.LayerNorm: layer_norm,
    nn.Embedding: embedding,
    nn.EmbeddingBag: embedding_bag,
}


def own_parameters(module: nn.Module) -> list[Parameter]:
    """What one use of a module accounts for: its own parameters; those of its children too if functorch runs it."""
    return list(module.parameters(recurse=runs_in_functorch(module)))


def runs_in_functorch(module: nn.Module) -> bool:
    """Neither we nor Opacus have a sampler for it."""
    return type(module) not in SAMPLERS and type(module) not in GradSampleHooks.GRAD_SAMPLERS


def _lookup(
    module: nn.Embedding | nn.EmbeddingBag, patient: Tensor, count: int, code: Tensor, values: Tensor
) -> LookupGradient:
    if module.padding_idx is not None:
        used = code != module.padding_idx
        patient, code, values = patient[used], code[used], values[used]
    table = module.weight
    assert isinstance(table, Parameter)
    return LookupGradient(table, patient, count, code, values)


def _flattened(uses: Sequence[Use], kept: int, *, inputs: bool = True) -> tuple[Rows, tuple[Tensor, ...]]:
    """Owners and the tensors (input, gradient) of all uses as [N, the last `kept` dimensions]."""
    rows, tensors = [], []
    for use in uses:
        if use.gradient.dim() <= kept:
            raise ValueError(
                f"{use.name} ({type(use.module).__name__}) was called on a single example of shape "
                f"{tuple(use.gradient.shape)}; give a batch, [rows, ..]"
            )
        rows.append(use.rows.repeat(use.gradient.shape[1 : use.gradient.dim() - kept].numel()))
        pair = (use.inputs[0], use.gradient) if inputs else (use.gradient,)
        tensors.append([tensor.flatten(0, -kept - 1) for tensor in pair])
    return Rows.joined(rows), tuple(_joined(parts) for parts in zip(*tensors, strict=True))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all parts, one part after the other; no copy of a single one."""
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def _trained(parameter: Tensor | None) -> Parameter | None:
    return parameter if isinstance(parameter, Parameter) and parameter.requires_grad else None
