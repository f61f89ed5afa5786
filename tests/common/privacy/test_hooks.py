"""What the bookkeeping mode refuses, and what it leaves behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from opacus.layers import DPLSTM
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.nn import functional

from common.models.recurrent import GRU, LSTM
from common.privacy.bookkeeping import BookKeepingHooks, BookKeepingOptimizer
from common.privacy.rows import Rows


def _attach(network: nn.Module, **options: Any) -> tuple[BookKeepingHooks, BookKeepingOptimizer]:
    hooks = BookKeepingHooks(network, **{"loss_reduction": "sum", **options})
    optimizer = BookKeepingOptimizer(
        torch.optim.SGD(network.parameters(), lr=1.0), noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=1
    )
    return hooks, optimizer


class _Mixed(nn.Module):
    """A parameter of its own beside a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.gru = nn.Parameter(torch.ones(2)), GRU(2, 2)


def _tied() -> nn.Module:
    network = nn.ModuleDict({"codes": nn.Embedding(3, 2), "head": nn.Linear(2, 3)})
    network["head"].weight = network["codes"].weight
    return network


def _tied_within() -> nn.Module:
    layer = GRU(2, 2, num_layers=2)
    layer.weight_hh_l1 = layer.weight_hh_l0
    return layer


def _weight_norm() -> nn.Module:
    """A linear layer whose weight is made of two others, as torch's weight_norm leaves it."""
    layer = nn.Linear(2, 2)
    layer.weight_g, layer.weight_v = nn.Parameter(torch.ones(2, 1)), nn.Parameter(torch.ones(2, 2))
    del layer.weight
    return layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.LSTM(2, 2)), r"0 \(LSTM\).*use common.models.recurrent.LSTM"),
        (lambda: nn.GRU(2, 2), r"network \(GRU\).*use common.models.recurrent.GRU"),
        (lambda: nn.RNN(2, 2), "use common.models.recurrent.RNN"),
        (lambda: DPLSTM(2, 2), "use common.models.recurrent"),
        (lambda: nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False)), "mixes patients; use nn.LayerNorm"),
        (_tied, r"head \(Linear\) shares a parameter with codes \(Embedding\)"),
        (_tied_within, "shares a parameter"),
        (_Mixed, "recurrent layer beside parameters of its own"),
        (lambda: nn.Embedding(3, 2, max_norm=1.0), "max_norm"),
        (lambda: nn.Embedding(3, 2, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (lambda: nn.EmbeddingBag(3, 2, mode="max"), "mode='max'"),
        (_weight_norm, r"unknown parameters \['weight_g', 'weight_v'\]; remove weight_norm"),
    ],
)
def test_what_cannot_be_protected_is_refused(make: Callable[[], nn.Module], message: str) -> None:
    """Layers and parameters that would mix patients or escape the norm are refused at once, with the remedy."""
    with pytest.raises(ValueError, match=message):
        BookKeepingHooks(make(), loss_reduction="sum")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_first": False}, "batch_first=False"),
        ({"loss_reduction": "none"}, "loss_reduction='none'"),
    ],
)
def test_options_without_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    """Options that this mode cannot honour raise instead of being ignored."""
    with pytest.raises(ValueError, match=message):
        BookKeepingHooks(nn.Linear(2, 1), **options)


def test_modules_with_buffers_are_refused() -> None:
    """Buffers would leave a site without noise: Opacus's own check stays on."""
    with pytest.raises(NotImplementedError, match="buffers"):
        BookKeepingHooks(nn.Sequential(nn.InstanceNorm1d(2, affine=True, track_running_stats=True)))


def test_a_second_pair_of_hooks_is_refused() -> None:
    """A network, or a part of one, takes one book at a time."""
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    hooks, _ = _attach(network)
    with pytest.raises(ValueError, match="cleanup"):
        BookKeepingHooks(network[0])
    hooks.cleanup()
    BookKeepingHooks(network[0])


def test_the_validator_of_opacus_accepts_our_layers() -> None:
    """A network with our recurrent layers is valid to Opacus as it is."""
    network = nn.ModuleDict({"gru": GRU(2, 3), "lstm": LSTM(2, 3, bidirectional=True), "head": nn.Linear(3, 1)})
    assert ModuleValidator.validate(network, strict=True) == []


def test_rows_of_the_wrong_number_are_refused() -> None:
    """A module called with another number of rows than named raises, naming module and both numbers."""
    network = nn.ModuleDict({"head": nn.Linear(2, 1), "gru": GRU(2, 2)})
    _attach(network)
    with Rows(torch.tensor([0, 0, 1]), 2):
        with pytest.raises(ValueError, match=r"head \(Linear\) returned 4 rows but the open Rows names 3"):
            network["head"](torch.zeros(4, 2))
        with pytest.raises(ValueError, match=r"names 3 sequences but the packed batch has 5"):
            network["gru"](torch.zeros(6, 5, 2))
    assert all(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("name", ["head", "gru"])
def test_require_rows_refuses_modules_outside_a_context(name: str) -> None:
    """With require_rows every module must be told who owns its rows."""
    network = nn.ModuleDict({"head": nn.Linear(2, 1), "gru": GRU(2, 2)})
    _attach(network, require_rows=True)
    with pytest.raises(ValueError, match=rf"{name} .* outside `with Rows"):
        network[name](torch.zeros(3, 2))


def test_modules_that_disagree_on_the_number_of_patients_raise() -> None:
    """Rows of two and of three patients in one pass cannot be one batch."""
    network = nn.ModuleDict({"a": nn.Linear(2, 1), "b": nn.Linear(2, 1)})
    _, optimizer = _attach(network)
    with Rows(torch.tensor([0, 1]), 2):
        out = network["a"](torch.ones(2, 2))
    (out.sum() + network["b"](torch.ones(3, 2)).sum()).backward()
    with pytest.raises(ValueError, match=r"disagree on the number of patients: \[2, 3\]"):
        optimizer.step()


def test_a_step_that_nothing_led_up_to_raises() -> None:
    """No record and no declared empty batch: the step raises and changes nothing."""
    network = nn.Sequential(GRU(2, 2))
    _, optimizer = _attach(network)
    before = copy.deepcopy(network.state_dict())
    for evaluate in (lambda: None, lambda: network.eval()(torch.ones(3, 1, 2)), lambda: network.train()):
        evaluate()
        with pytest.raises(RuntimeError, match="nothing to clip"):
            optimizer.step()
    network(torch.ones(3, 1, 2))  # forward without backward leaves nothing behind either
    with pytest.raises(RuntimeError, match="nothing to clip"):
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize("stray", ["weight decay in the loss", "used functionally", "hooks disabled", "evaluation"])
def test_a_gradient_that_was_never_clipped_raises(stray: str) -> None:
    """A parameter that gets a .grad outside the book makes the step raise."""
    network: Any = nn.ModuleDict({"head": nn.Linear(2, 1), "gru": GRU(2, 2)})
    hooks, optimizer = _attach(network)
    x = torch.ones(3, 4, 2)
    if stray == "hooks disabled":
        hooks.disable_hooks()
        network["gru"](x)[0].sum().backward()
        hooks.enable_hooks()
    if stray == "evaluation":
        network["gru"].eval()(x)[0].sum().backward()
    loss = network["head"](x).sum()
    if stray == "weight decay in the loss":
        loss = loss + network["head"].weight.square().sum()
    if stray == "used functionally":
        loss = loss + functional.linear(x, network["head"].weight).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="never clipped"):
        optimizer.step()


def test_zero_grad_between_steps_is_required_and_always_sets_none() -> None:
    """A second step without zero_grad raises; zero_grad(set_to_none=False) sets None all the same."""
    network = nn.Linear(2, 1)
    _, optimizer = _attach(network)
    network(torch.ones(3, 2)).sum().backward()
    optimizer.step()
    network(torch.ones(3, 2)).sum().backward()
    with pytest.raises(RuntimeError, match=r"zero_grad\(\) was not called"):
        optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is None for p in network.parameters())
    network(torch.ones(3, 2)).sum().backward()
    optimizer.step()


def test_a_second_pass_before_the_clip_is_refused() -> None:
    """Two batches must not wait together: patient 0 of one is not patient 0 of the other."""
    for name, x in (("head", torch.ones(3, 2)), ("gru", torch.ones(3, 1, 2))):
        network = nn.ModuleDict({"head": nn.Linear(2, 1), "gru": GRU(2, 2)})
        _, optimizer = _attach(network)
        network["head"](torch.ones(3, 2)).sum().backward()
        with pytest.raises(RuntimeError, match=rf"{name} .*waits to be clipped"):
            network[name](x)
        optimizer.accumulate()
        network[name](x)


def test_a_second_backward_pass_through_a_recurrent_layer_raises() -> None:
    """Gate gradients overwrite the gates, so one forward pass allows one backward pass; plain training allows more."""
    layer, x = GRU(2, 2), torch.ones(3, 1, 2)
    loss = layer(x)[0].sum()
    loss.backward(retain_graph=True)
    loss.backward()
    layer.zero_grad()
    _attach(layer)
    loss = layer(x)[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        loss.backward()


def test_an_input_changed_in_place_raises() -> None:
    """A module's input that is overwritten before backward is noticed: its gradient would be another."""
    network = nn.Linear(2, 1)
    _attach(network)
    x = torch.ones(3, 2)
    loss = network(x).sum()
    x.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


def test_an_output_changed_in_place_raises() -> None:
    """What backward sends to a module is noted at its output, which must therefore not be overwritten."""
    network = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True))
    _attach(network)
    with pytest.raises(RuntimeError, match="modified inplace"):
        network(torch.ones(4, 2))


class _TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.scale * x + y


def test_unknown_modules_with_two_inputs_are_refused() -> None:
    """Opacus's functorch path silently drops inputs after the first; here that raises."""
    network = _TwoInputs()
    _, optimizer = _attach(network)
    network(torch.ones(3, 2), torch.ones(3, 2)).sum().backward()
    with pytest.raises(ValueError, match="called with 2 inputs"):
        optimizer.step()


@pytest.mark.parametrize(
    ("answer", "message"),
    [(lambda x: (x, x), r"network \(_Answers\) returned tuple"), (lambda x: x.bfloat16(), "returned torch.bfloat16")],
)
def test_an_output_that_norms_are_no_bounds_for_is_refused(answer: Callable[[Tensor], Any], message: str) -> None:
    """Several outputs, of which one could escape, and types coarser than the norms' rounding raise; nothing freezes."""
    network = _Answers(answer)
    BookKeepingHooks(network, loss_reduction="sum")
    with pytest.raises(ValueError, match=message):
        network(torch.ones(3, 2))
    assert network.scale.requires_grad


class _Answers(nn.Module):
    """A module with a parameter that answers whatever the test says."""

    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.scale, self.answer = nn.Parameter(torch.ones(2)), answer

    def forward(self, x: Tensor) -> Any:
        return self.answer(x * self.scale)


def test_a_single_example_is_refused() -> None:
    """A linear layer on one vector has no rows that could belong to patients."""
    network = nn.Linear(2, 3)
    _, optimizer = _attach(network)
    network(torch.ones(2)).sum().backward()
    with pytest.raises(ValueError, match="single example"):
        optimizer.step()


def test_partly_frozen_recurrent_layers_are_refused_and_frozen_ones_ignored() -> None:
    """A recurrent layer is trained whole or not at all; frozen, it passes gradients on and records nothing."""
    for frozen_before in (True, False):
        network = nn.ModuleDict({"below": nn.Linear(2, 2), "gru": GRU(2, 2)})
        network["gru"].requires_grad_(not frozen_before)
        hooks, optimizer = _attach(network)
        network["gru"].requires_grad_(False)
        with Rows(torch.arange(4), 4):
            below = network["below"](torch.ones(4, 2)).expand(3, 4, 2)
            network["gru"](below)[0].sum().backward()
        assert len(hooks.book.gradients().parts) == 1
        optimizer.step()
    network["gru"].weight_ih_l0.requires_grad_(True)
    with pytest.raises(ValueError, match="freeze all of them or none"):
        network["gru"](torch.ones(3, 4, 2))


@pytest.mark.parametrize("name", ["noise_multiplier", "max_grad_norm", "expected_batch_size"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_numbers_out_of_range_are_refused(name: str, value: float) -> None:
    """A negative or non-finite noise multiplier, bound or divisor raises, naming it and the value."""
    network = nn.Linear(2, 1)
    BookKeepingHooks(network)
    options: dict[str, Any] = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": 1.0, name: value}
    with pytest.raises(ValueError, match=f"{name}={value}"):
        BookKeepingOptimizer(torch.optim.SGD(network.parameters(), lr=0.1), **options)


def test_parameters_without_hooks_are_refused() -> None:
    """An optimizer over a parameter that no book covers, or over two networks, raises."""
    hooked, other, bare = nn.Linear(2, 1), nn.Linear(2, 1), nn.Linear(2, 1)
    BookKeepingHooks(hooked)
    BookKeepingHooks(other)
    options: dict[str, Any] = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": 1.0}
    with pytest.raises(ValueError, match="2 of the optimizer's 4 trained parameters"):
        BookKeepingOptimizer(torch.optim.SGD([*hooked.parameters(), *bare.parameters()], lr=0.1), **options)
    with pytest.raises(ValueError, match="several networks"):
        BookKeepingOptimizer(torch.optim.SGD([*hooked.parameters(), *other.parameters()], lr=0.1), **options)


def test_coarse_matrix_products_are_refused() -> None:
    """Products of fewer digits than float32 would make norms too small: the step raises."""
    network = nn.Linear(2, 1)
    _, optimizer = _attach(network)
    network(torch.ones(3, 2)).sum().backward()
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(RuntimeError, match='set_float32_matmul_precision\\("highest"\\)'):
            optimizer.step()
    finally:
        torch.set_float32_matmul_precision("highest")


def test_noise_must_keep_the_shape() -> None:
    """A noise function that returns another shape raises."""
    network = nn.Linear(2, 1)
    BookKeepingHooks(network)
    optimizer = BookKeepingOptimizer(
        torch.optim.SGD(network.parameters(), lr=0.1),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=1.0,
        noise=lambda flat, _: flat[:-1],
    )
    optimizer.empty_batch()
    with pytest.raises(ValueError, match=r"shape \(2,\); it must keep \(3,\)"):
        optimizer.step()


def test_cleanup_leaves_the_network_as_it_was() -> None:
    """After cleanup nothing of the book is left: the network trains, copies and saves like any other."""
    network = nn.ModuleDict({"gru": GRU(2, 2), "head": nn.Linear(2, 1), "odd": _TwoInputs()})
    before = {name: set(vars(module)) for name, module in network.named_modules()}
    hooks, _ = _attach(network)
    network["head"](network["gru"](torch.ones(3, 1, 2))[0]).sum().backward()
    assert all(p.grad is None for p in network.parameters())
    hooks.cleanup()
    for name, module in network.named_modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert set(vars(module)) - before[name] <= {"recorder"}
        assert getattr(module, "recorder", None) is None
    assert all(not hasattr(p, attribute) for p in network.parameters() for attribute in ("_book", "grad_sample"))
    copy.deepcopy(network)["head"](network["gru"](torch.ones(3, 1, 2))[0]).sum().backward()
    assert network["gru"].weight_ih_l0.grad is not None


def test_an_error_inside_a_module_does_not_freeze_it() -> None:
    """If a module's forward raises, its parameters want gradients again afterwards."""
    network = nn.Linear(2, 1)
    _attach(network)
    with pytest.raises(RuntimeError):
        network(torch.ones(3, 5))
    assert all(p.requires_grad for p in network.parameters())
