"""Slow and obviously right: a loop over patients with torch's own autograd on torch's own modules.

`patient_gradients` is the definition that everything private is measured against. `check_private_sum` is the harness:
given a way to get clipped sums of a set of patients, it checks all that the clipped sum promises. Whatever is added
to the private step later (heads, options, other clipping code) is checked by giving it to this one function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, unpack_sequence

from common.privacy.bookkeeping import BookKeepingHooks, BookKeepingOptimizer

# The patients that take part, in order -> their clipped sum, flat over parameters, and their norms (None: not kept).
PrivateSum = Callable[[Sequence[int]], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Tolerance:
    """How far floating point may be from the oracle.

    Attributes:
        total: norm of the clipped sum's error, relative to the norm of the oracle's sum, or of its largest term
            where that is larger (patients may cancel).
        below, above: of a norm, relative to that of the gradient that is added up: within [1 - below, 1 + above].
        removal: excess over C of the change of the sum when a patient leaves, relative to C.
        passes: what forward and backward passes in this type may change a gradient by, relative to its norm; it comes
            on top where sums and norms are compared with the oracle's. torch's own layers are up to 8e-6 off in
            float32 (1,500 networks like those of tests/common/privacy/cases.py, against float64).
    """

    total: float
    below: float
    above: float
    removal: float
    passes: float = 0.0


FLOAT32 = Tolerance(total=1e-5, below=1e-6, above=3e-5, removal=1e-5, passes=1e-5)
FLOAT64 = Tolerance(total=1e-9, below=1e-12, above=1e-9, removal=1e-9, passes=1e-9)


def patient_gradients(
    parameters: Iterable[nn.Parameter], loss_of: Callable[[int], Tensor], patients: Iterable[int]
) -> Tensor:
    """[P, d] float64: each patient's gradient of its own loss, from one backward pass per patient.

    Args:
        parameters: of a network made of torch.nn's modules.
        loss_of: a patient's index -> its scalar loss, computed from its records alone.
        patients: indices.
    """
    parameters = list(parameters)
    rows = []
    for patient in patients:
        loss = loss_of(patient)
        zeros = [torch.zeros_like(p) for p in parameters]
        grads = torch.autograd.grad(loss, parameters, allow_unused=True) if loss.requires_grad else zeros
        parts = [z if g is None else g for g, z in zip(grads, zeros, strict=True)]
        rows.append(torch.cat([part.flatten().double() for part in parts]))
    return torch.stack(rows) if rows else torch.zeros(0, sum(p.numel() for p in parameters), dtype=torch.float64)


def clipped_sum(gradients: Tensor, clip: float) -> Tensor:
    """[d]: each gradient [P, d] brought to norm <= clip, then added up; one that is not finite counts as zero."""
    total = torch.zeros(gradients.shape[1], dtype=torch.float64)
    for gradient in gradients:
        norm = gradient.norm()
        if torch.isfinite(norm):
            total += gradient * min(1.0, clip / max(float(norm), 1e-300))
    return total


def check_private_sum(
    private_sum: PrivateSum,
    gradients: Tensor,
    clip: float,
    tolerance: Tolerance,
    removed: Iterable[int] | None = None,
) -> Tensor:
    """Asserts what a clipped sum promises, and returns the sum over all patients.

    - The sum over all patients is the oracle's.
    - Norms are upper bounds, and close to the true ones.
    - Removing any one patient moves the sum by at most C.

    Args:
        private_sum: computes the clipped sum of the patients that it is given.
        gradients: [P, d] the oracle's gradients of patients 0 .. P-1, float64.
        clip: C.
        tolerance: see Tolerance.
        removed: patients whose removal is tried; all if not given.
    """
    patients = list(range(len(gradients)))
    total, norms = private_sum(patients)
    expected = clipped_sum(gradients, clip)
    largest = max([float(clipped_sum(gradients[[patient]], clip).norm()) for patient in patients], default=0.0)
    error = float((total - expected).norm()) / max(largest, float(expected.norm()), 1e-30)
    assert error <= tolerance.total + tolerance.passes, f"clipped sum is off by {error:.2e} relative"

    if norms is not None:
        check_norms(norms, gradients, tolerance.below + tolerance.passes, tolerance.above + tolerance.passes)

    for patient in patients if removed is None else removed:
        without, _ = private_sum([other for other in patients if other != patient])
        moved = float((total - without).norm())
        assert moved <= clip * (1 + tolerance.removal), f"removing a patient moved the sum by {moved / clip!r} C"
    return total


def check_norms(norms: Tensor, gradients: Tensor, below: float, above: float) -> None:
    """Asserts that norms [P] are those of gradients [P, d], within [1 - below, 1 + above], or not finite either."""
    for norm, gradient in zip(norms.tolist(), gradients, strict=True):
        true = float(gradient.norm())
        if math.isfinite(true):
            assert true * (1 - below) <= norm <= true * (1 + above) + 1e-30, (
                f"norm {norm!r} reported for {true!r}, ratio {norm / max(true, 1e-300) - 1:.2e}"
            )
        else:
            assert not math.isfinite(norm), "a gradient that is not finite has a finite norm"


def summed_gradients(
    network: nn.Module, loss: Callable[[nn.Module, Sequence[int]], Tensor], patients: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Each patient's gradient [P, d] as the private step adds it up, and the norms [P] by which it is clipped.

    The weighted sum whose weights are 1 for one patient and 0 for all others.
    """
    hooks = BookKeepingHooks(network, loss_reduction="sum", require_rows=True)
    loss(network, patients).backward()
    gradients = hooks.book.gradients()
    alone = [gradients.weighted_sum(weights) for weights in torch.eye(len(patients), dtype=torch.float64)]
    norms = gradients.norms()
    hooks.cleanup()
    return torch.stack([torch.cat([part.flatten() for part in one.values()]) for one in alone]), norms


def book_keeping_sum(
    network: nn.Module,
    loss: Callable[[nn.Module, Sequence[int]], Tensor],
    clip: float,
    micro_batch_of: Callable[[int], int] = lambda patient: 0,
) -> PrivateSum:
    """The private sum of wardround's own step: hooks, backward passes, the sum as the noise would see it.

    Args:
        network: built from common.models.recurrent and torch.nn.
        loss: (network, patients) -> summed loss of these patients, naming the owners of rows by `Rows`.
        clip: C.
        micro_batch_of: a patient's index -> the number of the micro-batch that holds it.
    """

    def private_sum(patients: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        hooks = BookKeepingHooks(network, loss_reduction="sum", require_rows=True)
        seen: list[Tensor] = []

        def no_noise(flat: Tensor, deviation: float) -> Tensor:
            assert deviation == clip
            seen.append(flat.clone())
            return flat

        optimizer = BookKeepingOptimizer(
            torch.optim.SGD(network.parameters(), lr=0.0),
            noise_multiplier=1.0,
            max_grad_norm=clip,
            expected_batch_size=1.0,
            noise=no_noise,
        )
        norms: dict[int, Tensor] = {}
        numbers = sorted({micro_batch_of(patient) for patient in patients})
        for number in numbers:
            present = [patient for patient in patients if micro_batch_of(patient) == number]
            loss(network, present).backward()
            norms.update(zip(present, hooks.book.gradients().norms(), strict=True))
            if number != numbers[-1]:
                optimizer.accumulate()
        if not patients:
            optimizer.empty_batch()
        optimizer.step()
        optimizer.zero_grad()
        hooks.cleanup()
        return seen[0], torch.stack([norms[patient] for patient in patients]) if patients else None

    return private_sum


def distance_from_kink(layer: nn.RNN, given: PackedSequence) -> float:
    """The smallest argument of a ReLU, in absolute value, in a network of torch's over these sequences.

    Where it is within rounding of zero, two right implementations may take different slopes.
    """
    closest = float("inf")
    names = ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if layer.bias else ()))
    directions = ("", "_reverse") if layer.bidirectional else ("",)
    for x in unpack_sequence(given):
        for depth in range(layer.num_layers):
            outputs = []
            for direction in directions:
                W, U, *biases = (getattr(layer, f"{name}_l{depth}{direction}") for name in names)
                h, states = x.new_zeros(layer.hidden_size), []
                for row in x.flip(0) if direction else x:
                    argument = W @ row + U @ h + sum(biases)
                    closest = min(closest, float(argument.abs().min()))
                    h = argument.relu()
                    states.append(h)
                outputs.append(torch.stack(states[::-1] if direction else states))
            x = torch.cat(outputs, dim=1)
    return closest
