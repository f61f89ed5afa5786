"""Opacus's grad-sample mode "bookkeeping": one backward pass, norms per patient, the clipped sum from what was kept.

    hooks = BookKeepingHooks(network, loss_reduction="sum", require_rows=True)
    optimizer = BookKeepingOptimizer(torch.optim.SGD(network.parameters(), lr=0.1), noise_multiplier=1.0,
                                     max_grad_norm=1.0, expected_batch_size=q * declared_patients, noise=add_noise)
    optimizer.zero_grad()
    with Rows(patient_of_sequence, n_patients):
        loss = losses(network(batch))               # one number per sequence
    loss.sum().backward()
    optimizer.step()                                # clip, sum, noise, divide, step

Opacus's private step forms every example's gradient, or runs backward twice; this one does neither (Bu et al. 2023,
arXiv 2210.00038). It extends Opacus instead of replacing it: its hooks, optimizer, engine, validator, accountants,
schedulers and batch memory manager stay in use. What is overridden here, and why:

- Optimizer. Opacus's `pre_step` steps without clipping or noise if it finds no gradient samples. Here a step that no
  backward pass led up to raises; an empty Poisson batch is declared by `empty_batch()` and noised like any other.
- Engine. Opacus's factory silently falls back to its plain optimizer for a mode that it does not know.

Trained parameters are what Opacus takes them to be: those of the optimizer that want gradients. One that no module
noted, because this pass did not use it, has gradient zero and gets its noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from opacus import PrivacyEngine
from opacus.grad_sample import AbstractGradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from common.privacy.book import Book
from common.privacy.hooks import BOOK, BookKeepingHooks

__all__ = ["BookKeepingEngine", "BookKeepingHooks", "BookKeepingModule", "BookKeepingOptimizer", "clip_weights"]

# (clipped sum over all parameters [d] float64, standard deviation) -> noised sum [d]
Noise = Callable[[Tensor, float], Tensor]


def clip_weights(norms: Tensor, clip: float, dtype: torch.dtype) -> Tensor:
    """The factor [P] that brings each patient's gradient to a norm of at most `clip`.

    min(1, clip / norm), and 0 for a patient whose norm is not finite, or so large that the factor underflows. Opacus
    adds 1e-6 to the norm so as not to divide by zero; here clip / 0 is infinite and the minimum 1, and nothing is
    added. Instead the quotient is lowered by 8 eps of the model's type (9.5e-7 in float32), because factor and
    factor x row are rounded in that type.

    Args:
        norms: [P] float64 upper bounds.
        clip: C.
        dtype: the model's type.

    Guarantee:
        weight x norm <= clip for every patient, also after weight and weighted rows are rounded to `dtype`.
    """
    lowered = clip / norms * (1 - 8 * torch.finfo(dtype).eps)
    representable = norms.isfinite() & (lowered >= torch.finfo(dtype).tiny)  # below, rounding could double a factor
    return torch.where(representable, lowered.clamp(max=1.0), 0.0)


class BookKeepingOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus has no types
    """DPOptimizer that clips from the book instead of from gradients per example.

    Args:
        optimizer: torch optimizer over parameters of one network that has BookKeepingHooks.
        noise_multiplier: sigma; the noise's standard deviation is sigma x max_grad_norm. 0 draws no noise.
        max_grad_norm: C, bound on the norm of a patient's contribution to the sum.
        expected_batch_size: what the noised sum is divided by, a public number; unused for loss_reduction="sum".
        loss_reduction: "mean" divides, "sum" does not.
        generator, secure_mode: Opacus's, for noise=None; see DPOptimizer.
        noise: called once per step with the clipped sum of all parameters, flat in the optimizer's order, float64,
            and the standard deviation; returns the noised sum. None: Opacus's own noise.

    Raises:
        ValueError: a number out of range, or a parameter that no hooks cover.

    Guarantee:
        - Adding or removing one patient changes the sum that is noised by at most C, up to the rounding stated in
          norms.py and products.py; also a patient whose gradient is huge, cancels, or is not finite. The last counts
          as zero and leaves the others' sum as it is.
        - Every step adds noise once, over all trained parameters, whatever the batch was.
        - The sum is float64 and grows by whole micro-batches: how a batch is cut changes it by rounding only, as long
          as no patient is cut.
        - Nothing but the noised sum reaches the wrapped optimizer: a stray `.grad` raises.

    An error between `accumulate()` and `step()` leaves part of a batch in the sum: build a new optimizer then.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float | None,
        loss_reduction: str = "mean",
        generator: torch.Generator | None = None,
        secure_mode: bool = False,
        noise: Noise | None = None,
    ) -> None:
        _check("noise_multiplier", noise_multiplier, noise_multiplier >= 0, ">= 0")
        _check("max_grad_norm", max_grad_norm, max_grad_norm > 0, "> 0")
        if expected_batch_size is not None:
            _check("expected_batch_size", expected_batch_size, expected_batch_size > 0, "> 0")
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
            loss_reduction=loss_reduction,
            generator=generator,
            secure_mode=secure_mode,
        )
        self.noise = noise
        self.book = _book_of(self.params)
        self._accumulated = self._declared_empty = False

    # What a training loop calls

    def accumulate(self) -> None:
        """Clips what is pending and adds it to the running sum, without a step: one micro-batch of a larger batch.

        `zero_grad()` then keeps the running sum, as after a skipped step in Opacus.
        """
        self.clip_and_accumulate()
        self._is_last_step_skipped = True

    def empty_batch(self) -> None:
        """Declares that this step's Poisson sample has no patients: `step()` then noises a sum of zero."""
        self._declared_empty = True

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: ARG002 (Opacus's argument)
        """Forgets what is pending, and sets `.grad` to None always: a zero would look like a stray gradient."""
        self.book.clear()
        if not self._is_last_step_skipped:
            self._forget_sum()
        self.original_optimizer.zero_grad(set_to_none=True)

    # What Opacus calls

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:  # noqa: ARG002 (Opacus's argument)
        """Clips what is pending; unless this step is virtual, adds noise and divides. True: go on and step."""
        if self.book or not self._accumulated:
            self.clip_and_accumulate()
        self._is_last_step_skipped = bool(self._check_skip_next_step())
        if self._is_last_step_skipped:
            return False
        self.add_noise()
        self.scale_grad()
        if self.step_hook:
            self.step_hook(self)
        self._forget_sum()
        return True

    def clip_and_accumulate(self) -> None:
        """Adds the pending patients' clipped gradients to each parameter's `summed_grad`, in float64."""
        if not self.book and not self._declared_empty:
            raise RuntimeError(
                "nothing to clip: run forward and backward in training mode first, or declare an empty Poisson batch "
                "with empty_batch()"
            )
        params = self.params
        if any(p.grad is not None for p in params):
            raise RuntimeError(
                "a parameter has a .grad that was never clipped: it was used outside its own module's forward, or "
                "zero_grad() was not called since the last step"
            )
        with torch.no_grad():
            sums = self._clipped_sums() if self.book else {}
            for p in params:
                clipped = sums[p] if p in sums else torch.zeros_like(p, dtype=torch.float64)
                p.summed_grad = clipped if p.summed_grad is None else p.summed_grad + clipped
        self.book.clear()
        self._accumulated, self._declared_empty = True, False

    def add_noise(self) -> None:
        """Noises the sum over all parameters, once, into `.grad`."""
        params, deviation = self.params, self.noise_multiplier * self.max_grad_norm
        if self.noise is None:
            for p in params:
                p.summed_grad = p.summed_grad.to(p.dtype)  # Opacus draws noise in the type of the sum
            super().add_noise()
            return
        flat = torch.cat([p.summed_grad.flatten() for p in params])
        noised = self.noise(flat, deviation) if self.noise_multiplier > 0 else flat
        if noised.shape != flat.shape:
            raise ValueError(f"noise returned shape {tuple(noised.shape)}; it must keep {tuple(flat.shape)}")
        for p, part in zip(params, torch.split(noised, [p.numel() for p in params]), strict=True):
            p.grad = part.view_as(p).to(p)

    @property
    def accumulated_iterations(self) -> int:
        """One: micro-batches are parts of one batch."""
        return 1

    @property
    def grad_samples(self) -> list[Tensor]:
        """Raises: there are none, and Opacus's own code would take an empty list for "nothing private"."""
        raise RuntimeError("grad_samples: the bookkeeping mode keeps no gradients per example")

    def _clipped_sums(self) -> dict[Parameter, Tensor]:
        gradients = self.book.gradients()
        coarsest = torch.float32 if any(p.dtype == torch.float32 for p in self.params) else torch.float64
        return gradients.clipped_sum(lambda norms: clip_weights(norms, self.max_grad_norm, coarsest))

    def _forget_sum(self) -> None:
        for p in self.params:
            p.summed_grad = None
        self._accumulated = self._declared_empty = False


class BookKeepingModule(BookKeepingHooks, AbstractGradSampleModule):  # type: ignore[misc]  # Opacus has no types
    """The network wrapped, which is what Opacus's engine returns by default; prefixes state dict keys by `_module.`."""

    def __init__(self, m: nn.Module, **options: Any) -> None:
        nn.Module.__init__(self)
        BookKeepingHooks.__init__(self, m, **options)
        self.grad_accumulation_hook = None


class BookKeepingEngine(PrivacyEngine):  # type: ignore[misc]  # Opacus has no types
    """Opacus's engine with one more mode: make_private(..., grad_sample_mode="bookkeeping").

    For users of Opacus. Its loader takes the sampling rate and the divisor from the true number of patients, and its
    generator is not cryptographic; wardround itself uses hooks and optimizer with its own sampler, plan and noise.
    """

    def _prepare_model(
        self, module: nn.Module, *, grad_sample_mode: str = "hooks", wrap_model: bool = True, **options: Any
    ) -> Any:
        if grad_sample_mode != "bookkeeping":
            return super()._prepare_model(module, grad_sample_mode=grad_sample_mode, wrap_model=wrap_model, **options)
        self.validate(module=module, optimizer=None, data_loader=None)
        options.pop("max_grad_norm", None)  # meant for ghost modes
        return (BookKeepingModule if wrap_model else BookKeepingHooks)(module, **options)

    def _prepare_optimizer(
        self,
        *,
        optimizer: Optimizer,
        distributed: bool = False,
        clipping: str = "flat",
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: str = "hooks",
        **options: Any,
    ) -> Any:
        if grad_sample_mode != "bookkeeping":
            return super()._prepare_optimizer(
                optimizer=optimizer,
                distributed=distributed,
                clipping=clipping,
                noise_generator=noise_generator,
                grad_sample_mode=grad_sample_mode,
                **options,
            )
        if distributed or clipping != "flat":
            raise ValueError(f"distributed={distributed}, clipping={clipping!r}: use 'flat' clipping in one process")
        inner = optimizer.original_optimizer if isinstance(optimizer, DPOptimizer) else optimizer
        generator = self.secure_rng if self.secure_mode else noise_generator
        return BookKeepingOptimizer(inner, generator=generator, secure_mode=self.secure_mode, **options)


def _check(name: str, value: float, holds: bool, bound: str) -> None:
    if not (math.isfinite(value) and holds):
        raise ValueError(f"{name}={value}; give a finite number {bound}")


def _book_of(params: list[Parameter]) -> Book:
    """The one book that covers all parameters."""
    books = [getattr(p, BOOK, None) for p in params]
    if not books or any(book is None for book in books):
        raise ValueError(
            f"{books.count(None)} of the optimizer's {len(books)} trained parameters are covered by no "
            "BookKeepingHooks; attach hooks to the network that has them, or freeze them"
        )
    if any(book is not books[0] for book in books):
        raise ValueError("the optimizer's parameters belong to several networks with hooks; give each its optimizer")
    assert isinstance(books[0], Book)
    return books[0]
