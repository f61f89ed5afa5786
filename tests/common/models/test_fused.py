"""The fused backend gives what the blocked one gives: results, gradients, and what a private step is made of."""

from __future__ import annotations

import contextlib
import copy
import itertools
import pickle
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from common.models import fused, recurrence, recurrent
from common.models.layout import Layout
from common.models.recurrent import Recurrent, set_backend
from tests.common.privacy.cases import altered, loss_over, make_cohort, twins
from tests.oracles import FLOAT32, FLOAT64, book_keeping_sum, check_private_sum, patient_gradients

KINDS: dict[str, dict[str, Any]] = {"GRU": {}, "LSTM": {}, "RNN": {}, "ReLU": {"nonlinearity": "relu"}}
FEATURES, HIDDEN, LENGTHS, STEPS = 3, 4, (2, 5, 1, 3), 5
kinds = pytest.mark.parametrize("kind", KINDS)


def layer_of(kind: str, features: int = FEATURES, hidden: int = HIDDEN, **options: Any) -> Recurrent:
    name = "RNN" if kind == "ReLU" else kind
    layer: Recurrent = getattr(recurrent, name)(features, hidden, **KINDS[kind], **options)
    return layer


class Page:
    """A tape that only remembers."""

    def __init__(self) -> None:
        self.anchor = torch.zeros((), requires_grad=True)
        self.kept: tuple[Tensor, ...] = ()

    def lend(self, rows: int, columns: int, like: Tensor) -> Tensor:
        return like.new_full((rows, columns), float("nan"))

    def keep(self, gates: Tensor, inputs: Tensor, states: Tensor) -> None:
        assert not self.kept
        self.kept = (gates.detach().clone(), inputs.detach().clone(), states.detach().clone())


class Recording:
    """A recorder that keeps a page for every layer and direction."""

    def __init__(self) -> None:
        self.pages: dict[str, Page] = {}

    def __call__(self, layer: Recurrent, layout: Layout, sorted_indices: Tensor | None) -> Any:
        return lambda suffix: self.pages.setdefault(suffix, Page())


def passed(
    layer: Recurrent, backend: str, given: Tensor | PackedSequence, states: list[Tensor] | None, *, private: bool
) -> list[Tensor]:
    """All outputs; the gradients of a fixed function of them; A, X, H of every layer and direction if private."""
    layer = copy.deepcopy(layer)
    layer.backend = backend
    recording = Recording()
    layer.recorder = recording if private else None
    x = (given.data if isinstance(given, PackedSequence) else given).clone().requires_grad_()
    starts = [state.clone().requires_grad_() for state in states or []]
    hx = None if states is None else tuple(starts) if layer.mode == "LSTM" else starts[0]
    torch.manual_seed(5)  # the same dropout masks
    outputs, last = layer(given._replace(data=x) if isinstance(given, PackedSequence) else x, hx)
    results = [outputs.data if isinstance(outputs, PackedSequence) else outputs]
    results += list(last) if isinstance(last, tuple) else [last]
    generator = torch.Generator().manual_seed(6)
    weights = [torch.randn(r.shape, generator=generator, dtype=r.dtype) for r in results]
    torch.stack([(r * w).sum() for r, w in zip(results, weights, strict=True)]).sum().backward()
    wanted = [x, *starts[: 2 if layer.mode == "LSTM" else 1], *layer.parameters()]
    assert all(p.grad is None for p in layer.parameters()) == private
    gradients = [t.grad for t in wanted if t.grad is not None]
    kept = [tensor for suffix in sorted(recording.pages) for tensor in recording.pages[suffix].kept]
    assert len(kept) == (3 * len(layer.all_weights) if private else 0)
    return [t.detach() for t in [*results, *gradients, *kept]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("private", [False, True], ids=["ordinary", "private"])
@kinds
def test_results_gradients_and_records_are_those_of_the_blocked_backend(
    kind: str, private: bool, dtype: torch.dtype
) -> None:
    """For every option and form of input: outputs, states, all gradients, and A, X, H in the same columns."""
    options = itertools.product([1, 2], [False, True], [True, False], [False, True], [True, False])
    for layers, bidirectional, bias, with_states, ragged in options:
        torch.manual_seed(0)
        dropout = 0.5 if layers > 1 else 0.0
        layer = layer_of(kind, num_layers=layers, bidirectional=bidirectional, bias=bias, dropout=dropout, dtype=dtype)
        given = (
            pack_sequence([torch.randn(n, FEATURES, dtype=dtype) for n in LENGTHS], enforce_sorted=False)
            if ragged
            else torch.randn(STEPS, len(LENGTHS), FEATURES, dtype=dtype)
        )
        shape = (layers * (1 + bidirectional), len(LENGTHS), HIDDEN)
        states = [torch.randn(shape, dtype=dtype) for _ in range(2)] if with_states else None
        ours = passed(layer, "fused", given, states, private=private)
        wanted = passed(layer, "blocked", given, states, private=private)
        for mine, theirs in zip(ours, wanted, strict=True):
            assert mine.shape == theirs.shape
            largest = max(1.0, float(theirs.abs().max()))
            assert float((mine - theirs).abs().max()) <= (1e-6 if dtype == torch.float32 else 1e-12) * largest


@kinds
def test_gradients_agree_with_finite_differences(kind: str) -> None:
    """Gradients pass gradcheck: unsorted packed batch, two layers, both directions, initial states included."""
    torch.manual_seed(1)
    layer = layer_of(kind, 2, 2, num_layers=2, bidirectional=True, dtype=torch.float64, backend="fused")
    packed = pack_sequence([torch.randn(n, 2, dtype=torch.float64) for n in (1, 3)], enforce_sorted=False)
    states = [torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    states = states if kind == "LSTM" else states[:1]

    def outputs(data: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        hx, parameters = rest[: len(states)], rest[len(states) :]
        named = dict(zip((name for name, _ in layer.named_parameters()), parameters, strict=True))
        given = packed._replace(data=data)
        out, last = torch.func.functional_call(layer, named, (given, hx if kind == "LSTM" else hx[0]))
        return (out.data, *(last if isinstance(last, tuple) else (last,)))

    data = packed.data.clone().requires_grad_()
    assert torch.autograd.gradcheck(outputs, (data, *states, *layer.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("num_layers", "bidirectional"), [(1, False), (2, True)])
@pytest.mark.parametrize("cell", ["GRU", "LSTM", "RNN"])
def test_clipped_sums_are_those_of_the_autograd_loop(
    cell: str, num_layers: int, bidirectional: bool, dtype: torch.dtype
) -> None:
    """On the fused backend the private step's norms and clipped sums are the oracle's, one patient not finite."""
    cohort = altered(make_cohort(3, 5, dtype), 2, lambda values: values * float("inf"))
    ours, theirs = twins(cell, ("last", "mean"), 4, dtype, num_layers=num_layers, bidirectional=bidirectional)
    set_backend(ours, "fused")
    loss = loss_over(cohort)
    gradients = patient_gradients(theirs.parameters(), lambda patient: loss(theirs, [patient]), range(len(cohort)))
    clip = float(gradients.norm(dim=1).nanmedian())
    tolerance = FLOAT32 if dtype == torch.float32 else FLOAT64
    check_private_sum(book_keeping_sum(ours, loss, clip), gradients, clip, tolerance)


@kinds
def test_an_overflow_stays_in_its_sequence(kind: str) -> None:
    """Where a projection overflows, what is kept of that sequence is not finite, and of the others as it was."""
    torch.manual_seed(2)
    layer = layer_of(kind)
    with torch.no_grad():
        nn.init.constant_(next(layer.parameters()), 10.0)
    x = torch.randn(STEPS, 3, FEATURES)
    broken = x.clone()
    broken[2, 1] = torch.finfo(torch.float32).max
    calm, upset = (passed(layer, "fused", given, None, private=True) for given in (x, broken))
    kept, upset_kept = (torch.cat(results[-3:], dim=1).view(STEPS, 3, -1) for results in (calm, upset))
    assert not upset_kept[:, 1].isfinite().all()
    torch.testing.assert_close(upset_kept[:, [0, 2]], kept[:, [0, 2]])


def test_a_private_pass_goes_back_once() -> None:
    """A second backward pass through one private forward pass raises; an ordinary pass may go back again."""
    layer = layer_of("GRU", backend="fused")
    outputs, _ = layer(torch.randn(STEPS, 2, FEATURES))
    first, second = (torch.autograd.grad(outputs.sum(), [*layer.parameters()], retain_graph=True)[1] for _ in range(2))
    assert torch.equal(first, second)
    layer.recorder = Recording()
    outputs, _ = layer(torch.randn(STEPS, 2, FEATURES))
    outputs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        outputs.sum().backward()


@pytest.mark.parametrize("what", ["input", "output", "weight"])
def test_changes_in_place_before_backward_raise(what: str) -> None:
    """An input, output or weight that was overwritten before the backward pass is noticed, not used."""
    layer = layer_of("GRU", backend="fused")
    x = torch.randn(STEPS, 2, FEATURES)
    outputs, _ = layer(x)
    total = outputs.sum()
    with torch.no_grad():
        {"input": x, "output": outputs, "weight": layer.weight_ih_l0}[what].mul_(2)
    with pytest.raises(RuntimeError, match=r"in-?place"):
        total.backward()


@kinds
def test_a_batch_of_no_sequences_works(kind: str) -> None:
    """Zero sequences, which torch's kernels refuse, give empty outputs."""
    layer = layer_of(kind, num_layers=2, bidirectional=True, backend="fused")
    outputs, _ = layer(torch.zeros(STEPS, 0, FEATURES))
    assert outputs.shape == (STEPS, 0, 2 * HIDDEN)


def test_the_backend_is_kept_by_copies_and_is_no_state() -> None:
    """Copies and pickles keep the backend; state dicts do not have it; a pickle from before there was one is auto."""
    layer = layer_of("LSTM", backend="fused")
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.backend == "fused"
    assert list(layer.state_dict()) == list(nn.LSTM(FEATURES, HIDDEN).state_dict())
    del layer.__dict__["_backend"]
    assert pickle.loads(pickle.dumps(layer)).backend == "auto"


def test_set_backend_reaches_every_recurrent_layer() -> None:
    """set_backend sets it on all layers of a network, wherever they stand; an unknown name is refused."""
    network = nn.ModuleDict({"a": layer_of("GRU"), "b": nn.Sequential(layer_of("RNN"), nn.Linear(1, 1))})
    set_backend(network, "fused")
    assert [m.backend for m in network.modules() if isinstance(m, Recurrent)] == ["fused", "fused"]
    with pytest.raises(ValueError, match="backend='cudnn'; give one of auto, blocked, fused"):
        set_backend(network, "cudnn")
    with pytest.raises(ValueError, match="backend='cudnn'"):
        layer_of("GRU", backend="cudnn")


@pytest.mark.parametrize(
    ("backend", "cudnn", "expected"),
    [("auto", False, "blocked"), ("auto", True, "fused"), ("blocked", True, "blocked"), ("fused", False, "fused")],
)
def test_auto_is_fused_where_cudnn_can_be_used(
    backend: str, cudnn: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` is fused where cuDNN takes the input, else blocked; the other two are what they say."""
    ran: list[str] = []

    def noting(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            ran.append(name)
            return run(*args)

        return noted

    for name, module in (("blocked", recurrence), ("fused", fused)):
        monkeypatch.setattr(module, "run", noting(name, module.run))
    monkeypatch.setattr(fused, "usable", lambda x: cudnn)
    layer_of("GRU", backend=backend)(torch.randn(STEPS, 2, FEATURES))
    assert ran == [expected]


def test_cudnn_is_not_usable_on_a_cpu() -> None:
    """On a CPU `auto` is blocked."""
    assert not fused.usable(torch.zeros(1))


def _tf32_allowed() -> bool:
    cudnn: Any = torch.backends.cudnn
    return bool(cudnn.rnn.fp32_precision == "tf32" if hasattr(cudnn, "conv") else cudnn.allow_tf32)


def test_tf32_is_off_within_and_as_it_was_after() -> None:
    """On CUDA, TF32 is off while a kernel runs, and as it was afterwards, also after an error; on a CPU untouched."""
    on_cuda: Any = SimpleNamespace(is_cuda=True)
    before = _tf32_allowed()
    with contextlib.suppress(KeyError), fused._full_precision(on_cuda):
        assert not _tf32_allowed()
        raise KeyError
    assert _tf32_allowed() == before
    with fused._full_precision(torch.zeros(1)):
        assert _tf32_allowed() == before


def test_both_passes_run_without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward and the backward kernel both run inside the block that turns TF32 off."""
    inside = False
    seen: list[bool] = []

    @contextlib.contextmanager
    def watched(x: Tensor) -> Iterator[None]:
        nonlocal inside
        inside = True
        yield
        inside = False

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **options: Any) -> Any:
            seen.append(inside)
            return function(*args, **options)

        return noted

    monkeypatch.setattr(fused, "_full_precision", watched)
    monkeypatch.setattr(nn.GRU, "forward", noting(nn.GRU.forward))
    monkeypatch.setattr(torch.autograd, "grad", noting(torch.autograd.grad))
    layer_of("GRU", backend="fused")(torch.randn(STEPS, 2, FEATURES))[0].sum().backward()
    assert seen == [True, True]
