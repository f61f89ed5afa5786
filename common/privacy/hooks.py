"""Attaching a book to a network: every trainable module notes what its patients' gradients are made of.

Opacus forms a gradient per example inside a full backward hook. Here a module only notes its inputs and its output's
gradient. While it runs its parameters do not want gradients, so that autograd forms no weight gradient that nobody
reads; a `.grad` that is found at the step therefore means that a parameter was used outside its module's forward
(weight decay in the loss, a tied head), which is an error there, not a leak.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks
from opacus.grad_sample.functorch import prepare_layer
from opacus.layers.dp_rnn import DPRNNBase
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm

from common.models.layout import Layout
from common.models.recurrence import Tape
from common.models.recurrent import Recurrent
from common.privacy.book import Book, BookTape
from common.privacy.rows import Rows
from common.privacy.samplers import SAMPLERS, Use, own_parameters, runs_in_functorch

BOOK = "_book"  # attribute of a parameter by which the optimizer finds the book; Opacus marks parameters likewise


class BookKeepingHooks(GradSampleHooks):  # type: ignore[misc]  # Opacus has no types
    """Attaches a book to a network. `cleanup()` detaches it and leaves the network as it was.

    Args:
        m: the network. Recurrent layers must be common.models.recurrent's.
        batch_first: must be True; who owns a row is said by `Rows`, not by a dimension.
        loss_reduction: "sum", or "mean" if the loss is a mean over patients (Opacus's default).
        strict: refuse modules with buffers, as Opacus does.
        require_rows: refuse modules that are called outside a `Rows` context. Without it dimension 0 is the patient.

    Attributes:
        book: what the current pass left behind.

    Raises:
        ValueError: a module or parameter that cannot be protected; names it and the remedy.
        NotImplementedError: a module with buffers (from Opacus).

    Guarantee:
        While attached, a training pass gives a module's parameters no gradient but through the book, and rows that
        cannot be attributed to patients raise.
    """

    def __init__(
        self,
        m: nn.Module,
        *,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        strict: bool = True,
        require_rows: bool = False,
    ) -> None:
        if loss_reduction not in ("sum", "mean"):
            raise ValueError(f"loss_reduction={loss_reduction!r}; give 'sum' or 'mean'")
        self.book = Book(loss_reduction)
        self.require_rows = require_rows
        self._names = {module: f"{name or 'network'} ({type(module).__name__})" for name, module in m.named_modules()}
        self._withheld: dict[nn.Module, list[Parameter]] = {}
        super().__init__(m, batch_first=batch_first, loss_reduction=loss_reduction, strict=strict)

    def add_hooks(
        self, *, loss_reduction: str = "mean", batch_first: bool = True, force_functorch: bool = False
    ) -> None:
        """Called once, by the constructor."""
        del loss_reduction  # the book has it
        if not batch_first:
            raise ValueError("batch_first=False: put patients into dimension 0, or name the owners of rows with Rows")
        if force_functorch:
            raise ValueError("force_functorch=True: this mode exists to avoid it; use Opacus's mode 'functorch'")
        hooked = list(dict.fromkeys(self.iterate_submodules(self._module)))  # a module with two names is one module
        self._refuse_unprotected(hooked)
        handles = self.autograd_grad_sample_hooks = self._module.autograd_grad_sample_hooks = []
        for module in hooked:
            for parameter in own_parameters(module):
                setattr(parameter, BOOK, self.book)
            if isinstance(module, Recurrent):
                module.recorder = self._tapes  # a bound method: torch would register a module here as a child
                continue
            if runs_in_functorch(module):
                prepare_layer(module)
            handles.append(module.register_forward_pre_hook(self._withhold_parameters))
            handles.append(module.register_forward_hook(self._note_use, with_kwargs=True, always_call=True))
        self.enable_hooks()

    def remove_hooks(self) -> None:
        """Detaches the book."""
        for module in self._module.modules():
            if isinstance(module, Recurrent):
                module.recorder = None
        for parameter in self._module.parameters():
            parameter.__dict__.pop(BOOK, None)
        self.book.clear()
        super().remove_hooks()

    def set_grad_sample_to_none(self) -> None:
        """Opacus's name for forgetting what was noted."""
        self.book.clear()

    # Around every call of a module

    def _withhold_parameters(self, module: nn.Module, _inputs: tuple[Any, ...]) -> None:
        """Before it runs: its parameters do not want gradients."""
        trained = [p for p in own_parameters(module) if p.requires_grad]
        if trained and self.hooks_enabled and module.training and torch.is_grad_enabled():
            self.book.refuse_second_pass(self._names[module])
            self._withheld[module] = trained
            for parameter in trained:
                parameter.requires_grad_(False)

    def _note_use(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        """After it ran, or raised: they do again, and the book will be told what backward sends to the output."""
        trained = self._withheld.pop(module, None)
        for parameter in trained or ():
            parameter.requires_grad_(True)
        if trained is None or output is None:  # not a training pass, or forward raised
            return None
        name = self._names[module]
        if not isinstance(output, Tensor) or output.dtype not in (torch.float32, torch.float64):
            what = output.dtype if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"{name} returned {what}; a module with parameters must return one float32 or float64")
        rows = self._owners(name, output)
        inputs = tuple(t.detach() if isinstance(t, Tensor) else t for t in _in_order(module, args, named))
        versions = [t._version for t in inputs if isinstance(t, Tensor)]

        def note(gradient: Tensor) -> None:
            if versions != [t._version for t in inputs if isinstance(t, Tensor)]:
                raise RuntimeError(f"{name}: its input was changed in place before backward; use a copy")
            self.book.note(Use(module, name, inputs, gradient.detach(), rows))

        return _Tap.apply(output, self.book.anchor, note)  # type: ignore[no-untyped-call]  # torch's typing

    def _tapes(self, layer: Recurrent, layout: Layout, sorted_indices: Tensor | None) -> Callable[[str], Tape] | None:
        """What a recurrent layer asks for at the start of a training pass."""
        trained = {p.requires_grad for p in layer.parameters()}
        if not self.hooks_enabled or trained == {False}:
            return None
        name = self._names[layer]
        if len(trained) > 1:
            raise ValueError(f"{name}: some of its parameters are frozen; freeze all of them or none")
        self._require_rows(name)
        self.book.refuse_second_pass(name)
        rows = Rows.of_steps(layout, sorted_indices)
        return lambda suffix: BookTape(self.book, layer, suffix, rows)

    def _owners(self, name: str, output: Tensor) -> Rows:
        """Owner of each row of dimension 0."""
        self._require_rows(name)
        rows, given = Rows.current(), len(output) if output.dim() else 0
        if rows is None:
            return Rows.each(given, output.device)
        if len(rows) != given:
            raise ValueError(
                f"{name} returned {given} rows but the open Rows names {len(rows)}; open the right `with Rows(...)` "
                "(for packed data `with Rows.of(packed)`) around this call"
            )
        return rows.to(output.device)

    def _require_rows(self, name: str) -> None:
        if self.require_rows and Rows.current() is None:
            raise ValueError(f"{name} was called outside `with Rows(...)`, which require_rows=True asks for; open one")

    # What cannot be protected

    def _refuse_unprotected(self, hooked: list[nn.Module]) -> None:
        for module in self._module.modules():
            if isinstance(module, _BatchNorm):
                raise ValueError(f"{self._names[module]} mixes patients; use nn.LayerNorm or nn.GroupNorm")
        self._refuse_shared_parameters()
        for module in hooked:
            name = self._names[module]
            if isinstance(module, nn.RNNBase) and not isinstance(module, Recurrent):
                raise ValueError(
                    f"{name}: torch's kernels keep no gate gradients; use common.models.recurrent."
                    f"{type(module).__name__}, which loads the same state dict"
                )
            inner_recurrence = any(isinstance(child, nn.RNNBase) for child in module.modules())
            if runs_in_functorch(module) and inner_recurrence and not isinstance(module, Recurrent):
                raise ValueError(
                    f"{name} has a recurrent layer beside parameters of its own; move these into nn.Linear, "
                    "nn.LayerNorm, nn.Embedding or a module of their own"
                )
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                if module.max_norm is not None or module.scale_grad_by_freq:
                    raise ValueError(f"{name}: max_norm and scale_grad_by_freq mix patients; leave both unset")
                if isinstance(module, nn.EmbeddingBag) and module.mode == "max":
                    raise ValueError(f"{name}: mode='max' is not supported; use 'sum' or 'mean'")
            unknown = sorted(set(module._parameters) - {"weight", "bias"})
            if type(module) in SAMPLERS and unknown:
                raise ValueError(f"{name}: unknown parameters {unknown}; remove weight_norm and the like")

    def _refuse_shared_parameters(self) -> None:
        owner: dict[Parameter, nn.Module] = {}
        for module in self._module.modules():
            if isinstance(module, DPRNNBase):
                raise ValueError(f"{self._names[module]}: use common.models.recurrent in the bookkeeping mode")
            for parameter in module._parameters.values():
                if parameter is None or not parameter.requires_grad:
                    continue
                if parameter in owner:
                    raise ValueError(
                        f"{self._names[module]} shares a parameter with {self._names[owner[parameter]]}; the norm of "
                        "tied weights has a cross term: untie them, or reuse the module itself"
                    )
                if hasattr(parameter, BOOK):
                    raise ValueError(f"{self._names[module]} has hooks already; call cleanup() on them first")
                owner[parameter] = module


class _Tap(torch.autograd.Function):
    """The identity, which hands the gradient that passes through it to `note`."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, _anchor: Tensor, note: Callable[[Tensor], None]) -> Tensor:
        """The output; the anchor is there to want a gradient where nothing else does."""
        ctx.note = note
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        """The gradient, noted on its way."""
        ctx.note(gradient)
        return gradient if ctx.needs_input_grad[0] else None, None, None


def _in_order(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
    """The inputs of a call by position, up to the last one that was given."""
    if not named:
        return args
    bound = inspect.signature(module.forward).bind(*args, **named)
    given = set(bound.arguments)
    bound.apply_defaults()
    values = list(bound.arguments.items())
    while values[-1][0] not in given:
        values.pop()
    return tuple(value for _, value in values)
