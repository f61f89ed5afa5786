"""The recurrent layers are torch.nn's in all but how they are trained."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

from common.models import recurrent
from common.models.layout import Layout

KINDS: dict[str, dict[str, Any]] = {"GRU": {}, "LSTM": {}, "RNN": {}, "ReLU": {"nonlinearity": "relu"}}
FEATURES, HIDDEN, SEQUENCES, STEPS = 3, 4, 3, 5


def _layers(kind: str, **options: Any) -> tuple[nn.RNNBase, nn.RNNBase]:
    """Ours and torch's with the same weights."""
    name, options = "RNN" if kind == "ReLU" else kind, {**KINDS[kind], **options}
    ours = getattr(recurrent, name)(FEATURES, HIDDEN, **options)
    theirs = getattr(nn, name)(FEATURES, HIDDEN, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def _given(form: str, x: Tensor, batch_first: bool) -> Tensor | PackedSequence:
    """Sequences [B, T, D] in one of the forms that torch.nn takes."""
    if form == "unbatched":
        return x[0]
    if form == "padded":
        return x if batch_first else x.transpose(0, 1)
    lengths = [5, 3, 1] if form == "sorted" else [2, 5, 1]
    return pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=form == "sorted")


def _run(layer: nn.RNNBase, given: Tensor | PackedSequence, states: list[Tensor] | None) -> list[Tensor]:
    """All outputs, then the gradients of a fixed function of them. Packed in is packed out, in the same order."""
    torch.manual_seed(5)  # same dropout masks
    hx = None if states is None else tuple(states) if layer.mode == "LSTM" else states[0]
    outputs, last = layer(given, hx)
    if isinstance(given, PackedSequence):
        assert isinstance(outputs, PackedSequence)
        for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
            mine, wanted = getattr(outputs, name), getattr(given, name)
            assert mine is wanted is None or torch.equal(mine, wanted)
    results = [outputs.data if isinstance(outputs, PackedSequence) else outputs]
    results += list(last) if isinstance(last, tuple) else [last]
    generator = torch.Generator().manual_seed(6)
    loss = sum((r * torch.randn(r.shape, generator=generator, dtype=r.dtype)).sum() for r in results)
    x = given.data if isinstance(given, PackedSequence) else given
    wanted = [x, *layer.parameters(), *(states or [])[: 2 if layer.mode == "LSTM" else 1]]
    assert isinstance(loss, Tensor)
    return results + list(torch.autograd.grad(loss, wanted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("form", ["unbatched", "padded", "sorted", "unsorted"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_states_and_gradients_are_those_of_torch(kind: str, form: str, dtype: torch.dtype) -> None:
    """For every option and form of input, outputs, last states and all gradients equal torch.nn's to rounding."""
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    options = itertools.product([1, 2, 3], [False, True], [True, False], [True, False], [True, False])
    for layers, bidirectional, batch_first, bias, with_states in options:
        torch.manual_seed(0)
        ours, theirs = _layers(
            kind,
            num_layers=layers,
            bidirectional=bidirectional,
            batch_first=batch_first,
            bias=bias,
            dropout=0.5 if layers > 1 else 0.0,
            dtype=dtype,
        )
        x = torch.randn(SEQUENCES, STEPS, FEATURES, dtype=dtype)
        given = [_given(form, x, batch_first) for _ in range(2)]
        for g in given:
            (g.data if isinstance(g, PackedSequence) else g).requires_grad_()
        shape = (layers * (1 + bidirectional), *([] if form == "unbatched" else [SEQUENCES]), HIDDEN)
        states = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(2)] if with_states else None
        for mine, wanted in zip(_run(ours, given[0], states), _run(theirs, given[1], states), strict=True):
            assert mine.shape == wanted.shape
            largest = max(1.0, float(wanted.detach().abs().max()))
            assert float((mine - wanted).detach().abs().max()) <= tolerance * largest


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=7),
    kind=st.sampled_from(list(KINDS)),
    bidirectional=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_ragged_batches_equal_torch(lengths: list[int], kind: str, bidirectional: bool, seed: int) -> None:
    """For any lengths in any order, a packed batch gives torch.nn's outputs and gradients."""
    torch.manual_seed(seed)
    ours, theirs = _layers(kind, bidirectional=bidirectional, dtype=torch.float64)
    packed = pack_sequence([torch.randn(n, FEATURES, dtype=torch.float64) for n in lengths], enforce_sorted=False)
    packed.data.requires_grad_()
    for mine, wanted in zip(_run(ours, packed, None), _run(theirs, packed, None), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_agree_with_finite_differences(kind: str) -> None:
    """Gradients pass gradcheck: unsorted packed batch, two layers, both directions, initial states included."""
    torch.manual_seed(1)
    name, options = "RNN" if kind == "ReLU" else kind, KINDS[kind]
    layer = getattr(recurrent, name)(2, 2, num_layers=2, bidirectional=True, dtype=torch.float64, **options)
    packed = pack_sequence([torch.randn(n, 2, dtype=torch.float64) for n in (2, 3, 1)], enforce_sorted=False)
    states = [torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    states = states if kind == "LSTM" else states[:1]

    def outputs(data: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        hx, parameters = rest[: len(states)], rest[len(states) :]
        named = dict(zip((name for name, _ in layer.named_parameters()), parameters, strict=True))
        given = packed._replace(data=data)
        out, last = torch.func.functional_call(layer, named, (given, hx if kind == "LSTM" else hx[0]))
        return (out.data, *(last if isinstance(last, tuple) else (last,)))

    data = packed.data.clone().requires_grad_()
    assert torch.autograd.gradcheck(outputs, (data, *states, *layer.parameters()))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_are_interchangeable(kind: str, bias: bool) -> None:
    """Names, shapes and order of parameters are torch.nn's; weights load both ways, and the outputs go with them."""
    ours, theirs = _layers(kind, num_layers=2, bidirectional=True, bias=bias, dtype=torch.float64)
    assert [(n, p.shape) for n, p in ours.named_parameters()] == [(n, p.shape) for n, p in theirs.named_parameters()]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(STEPS, SEQUENCES, FEATURES, dtype=torch.float64)
    for giver, taker in ((ours, theirs), (theirs, ours)):
        with torch.no_grad():
            for parameter in giver.parameters():
                parameter.uniform_(-1, 1)
        assert not torch.allclose(taker(x)[0], giver(x)[0])
        taker.load_state_dict(giver.state_dict())
        torch.testing.assert_close(taker(x)[0], giver(x)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_torchs(kind: str) -> None:
    """In evaluation mode and without gradients the outputs are torch.nn's, bit for bit."""
    ours, theirs = _layers(kind)
    x = torch.randn(STEPS, SEQUENCES, FEATURES)
    with torch.no_grad():
        assert torch.equal(ours(x)[0], theirs(x)[0])
    assert torch.equal(ours.eval()(x)[0], theirs.eval()(x)[0])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_no_sequences_works(kind: str, training: bool) -> None:
    """Zero sequences, padded or packed, in training or evaluation, give empty outputs and zero gradients."""
    ours, _ = _layers(kind, num_layers=2, bidirectional=True)
    ours.train(training)
    packed = PackedSequence(torch.zeros(0, FEATURES), torch.zeros(0, dtype=torch.int64))
    for empty, shape in ((torch.zeros(STEPS, 0, FEATURES), (STEPS, 0, 2 * HIDDEN)), (packed, (0, 2 * HIDDEN))):
        outputs, last = ours(empty)
        h_n = last[0] if isinstance(last, tuple) else last
        rows = outputs.data if isinstance(outputs, PackedSequence) else outputs
        assert rows.shape == shape
        assert h_n.shape == (4, 0, HIDDEN)
        ours.zero_grad()
        (rows.sum() + h_n.sum()).backward()
        assert all(p.grad is None or not p.grad.any() for p in ours.parameters())


def test_changing_outputs_in_place_raises() -> None:
    """An output that was overwritten before the backward pass is noticed, not used."""
    ours, _ = _layers("GRU")
    outputs, _ = ours(torch.randn(STEPS, SEQUENCES, FEATURES))
    with pytest.raises(RuntimeError, match=r"in-?place"):
        outputs.mul_(2).sum().backward()


@pytest.mark.parametrize(
    ("given", "hx", "message"),
    [
        (torch.zeros(5, 2, FEATURES + 1), None, "input.size"),
        (torch.zeros(5), None, "1 dimensions; give 2"),
        (torch.zeros(5, 2, FEATURES), torch.zeros(1, 3, HIDDEN), r"shape \(1, 3, 4\); give \(1, 2, 4\)"),
        (torch.zeros(5, 2, FEATURES), (torch.zeros(1, 2, HIDDEN), torch.zeros(1, 2, HIDDEN)), "give one tensor"),
    ],
)
def test_wrong_inputs_are_refused(given: Tensor, hx: Any, message: str) -> None:
    """A wrong width, rank or initial state raises, naming what it is and what it must be."""
    ours, _ = _layers("GRU")
    with pytest.raises((ValueError, RuntimeError), match=message):
        ours(given, hx)


def test_projections_are_refused() -> None:
    """proj_size has no private backward pass and is refused when the layer is made."""
    with pytest.raises(ValueError, match="proj_size=2"):
        recurrent.LSTM(FEATURES, HIDDEN, proj_size=2)


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(1, 8), min_size=1, max_size=6))
def test_layout_says_where_rows_stand(lengths: list[int]) -> None:
    """Sequence, step, previous row, last row and reversal of a packed batch equal those read off a list of rows."""
    lengths = sorted(lengths, reverse=True)
    rows = [(t, b) for t in range(lengths[0]) for b in range(len(lengths)) if t < lengths[b]]
    layout = Layout([sum(n > t for n in lengths) for t in range(lengths[0])])
    assert layout.step.tolist() == [t for t, _ in rows]
    assert layout.sequence.tolist() == [b for _, b in rows]
    assert layout.lengths.tolist() == lengths
    assert layout.last.tolist() == [rows.index((n - 1, b)) for b, n in enumerate(lengths)]
    assert layout.reverse.tolist() == [rows.index((lengths[b] - 1 - t, b)) for t, b in rows]
    before = [b if t == 0 else len(lengths) + rows.index((t - 1, b)) for t, b in rows]
    assert layout.previous.tolist() == before
    for width, floats in ((1, 1), (3, 10), (2, 1000)):
        blocks = layout.blocks(width, floats)
        assert [t for block in blocks for t in range(layout.steps)[block.steps]] == list(range(layout.steps))
        assert [row for block in blocks for row in range(layout.rows)[block.rows]] == list(range(layout.rows))
