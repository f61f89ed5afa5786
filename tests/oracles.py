"""Slow and obviously right: a loop over patients with torch's own autograd on torch's own modules.

`patient_gradients` is the definition that everything private is measured against. `check_private_sum` is the harness:
given a way to get clipped sums of a set of patients, it checks all that the clipped sum promises. Whatever is added
to the private step later (heads, options, other clipping code) is checked by giving it to this one function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.privacy.bookkeeping import BookKeepingHooks, BookKeepingOptimizer

# The patients that take part, in order -> their clipped sum, flat over parameters, and their norms (None: not kept).
PrivateSum = Callable[[Sequence[int]], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Tolerance:
    """How far floating point may be from the oracle.

    Attributes:
        total: norm of the clipped sum's error, relative to the norm of the oracle's sum, or of its largest term
            where that is larger (patients may cancel).
        below, above: of a norm, relative to the true one: within [1 - below, 1 + above].
        removal: excess over C of the change of the sum when a patient leaves, relative to C.
    """

    total: float
    below: float
    above: float
    removal: float


FLOAT32 = Tolerance(total=1e-5, below=1e-6, above=3e-5, removal=1e-5)
FLOAT64 = Tolerance(total=1e-9, below=1e-12, above=1e-9, removal=1e-9)


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


def check_private_sum(private_sum: PrivateSum, gradients: Tensor, clip: float, tolerance: Tolerance) -> None:
    """Asserts what a clipped sum promises.

    - The sum over all patients is the oracle's.
    - Norms are upper bounds, and close to the true ones.
    - Removing any one patient moves the sum by at most C.

    Args:
        private_sum: computes the clipped sum of the patients that it is given.
        gradients: [P, d] the oracle's gradients of patients 0 .. P-1, float64.
        clip: C.
        tolerance: see Tolerance.
    """
    patients = list(range(len(gradients)))
    total, norms = private_sum(patients)
    expected = clipped_sum(gradients, clip)
    largest = max([float(clipped_sum(gradients[[patient]], clip).norm()) for patient in patients], default=0.0)
    error = float((total - expected).norm()) / max(largest, float(expected.norm()), 1e-30)
    assert error <= tolerance.total, f"clipped sum is off by {error:.2e} relative"

    if norms is not None:
        for norm, gradient in zip(norms.tolist(), gradients, strict=True):
            true = float(gradient.norm())
            if true == true and true != float("inf"):
                assert true * (1 - tolerance.below) <= norm <= true * (1 + tolerance.above) + 1e-30, (
                    f"norm {norm!r} reported for {true!r}, ratio {norm / max(true, 1e-300) - 1:.2e}"
                )
            else:
                assert not torch.isfinite(torch.tensor(norm)), "a gradient that is not finite has a finite norm"

    for patient in patients:
        without, _ = private_sum([other for other in patients if other != patient])
        moved = float((total - without).norm())
        assert moved <= clip * (1 + tolerance.removal), f"removing a patient moved the sum by {moved / clip!r} C"


def book_keeping_sum(network: nn.Module, loss: Callable[[nn.Module, Sequence[int]], Tensor], clip: float) -> PrivateSum:
    """The private sum of wardround's own step: hooks, one backward pass, the sum as the noise would see it.

    Args:
        network: built from common.models.recurrent and torch.nn.
        loss: (network, patients) -> summed loss of these patients, naming the owners of rows by `Rows`.
        clip: C.
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
        norms = None
        if patients:
            loss(network, patients).backward()
            norms = hooks.book.gradients().norms()
        else:
            optimizer.empty_batch()
        optimizer.step()
        optimizer.zero_grad()
        hooks.cleanup()
        return seen[0], norms

    return private_sum
