"""Opacus's own tests, as its wheel ships them, with our layers and our mode in place of its own.

- `dp_layers/dp_rnn_test.py` compares outputs and gradients of the recurrent layers with torch.nn's.
- `grad_samples/*_test.py` compare gradients per example with a loop over batches of one.

Both run as they are, with their own strategies; only the names of layers are bound to ours when the files are
executed, and `compute_opacus_grad_sample`, where their harness asks for gradients per example, is ours. The
bookkeeping mode keeps none, but a weighted sum whose weights are 1 for one patient and 0 for all others is that
patient's gradient.

Where Opacus's tests ask for something else than we promise:

- Batches whose patients are in dimension 1 (Linear, batch_first=False) are refused by this mode; patients are put into
  dimension 0 first, as its error says. Recurrent layers take both.
- Of unsorted packed input their harness expects gradients in sorted order, which is the defect D1 in its own test.
  Ours come in the caller's order and are sorted for it.
- Their `compare_gradients` of layers looks the gradients up in state dicts, which hold none: it compares weights. Ours
  are compared with torch.nn's in tests/common/models/test_recurrent.py.
- Modes ("hooks", "functorch", "ew") mean nothing here: each runs the bookkeeping mode again.
- Not run: DPMultiheadAttention (we have none), convolutions and instance norms (Opacus's own samplers run them, in our
  mode too; test_samplers.py has one of each kind).
"""

from __future__ import annotations

import importlib.util
import sys
import unittest
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus import layers as opacus_layers
from opacus.tests.grad_samples import common as harness
from opacus.utils import per_sample_gradients_utils as reference
from opacus.utils.packed_sequences import _gen_packed_data
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from common.models import recurrent
from common.privacy.bookkeeping import BookKeepingHooks
from common.privacy.rows import Rows

OUR_LAYERS = {"DPRNN": recurrent.RNN, "DPGRU": recurrent.GRU, "DPLSTM": recurrent.LSTM}
THEIR_LAYERS = {name: getattr(opacus_layers, name) for name in OUR_LAYERS}
GRAD_SAMPLE_TESTS = {
    "dp_rnn_test": "RNN_test",
    "linear_test": "Linear_test",
    "embedding_test": "Embedding_test",
    "embedding_bag_test": "Embedding_bag_test",
    "layer_norm_test": "LayerNorm_test",
    "group_norm_test": "GroupNorm_test",
    "rms_norm_test": "RMSNorm_test",
}

# Opacus's harness opens subTests inside of @given: then a failure is reported for the example, not for the subtest.
pytestmark = pytest.mark.filterwarnings("ignore:subTest per-test-case reporting:hypothesis.errors.HypothesisWarning")


@pytest.fixture(autouse=True)
def _torch_settings() -> Iterator[None]:
    """Opacus's tests turn deterministic algorithms on and leave them on."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before)


def gradients_per_patient(
    x: Any, module: nn.Module, batch_first: bool = True, loss_reduction: str = "mean", grad_sample_mode: str = "hooks"
) -> dict[str, Tensor]:
    """What compute_opacus_grad_sample returns, {parameter's name: [P, *shape]}, from the bookkeeping mode."""
    if not batch_first and not any(isinstance(m, nn.RNNBase) for m in module.modules()):
        x = x.transpose(0, 1)
    network = reference.clone_module(module)
    hooks = BookKeepingHooks(network, loss_reduction=loss_reduction)
    reference.ModelWithLoss(network, loss_reduction)(x).backward()
    gradients = hooks.book.gradients()
    order = x.sorted_indices if isinstance(x, PackedSequence) else None
    patients = range(gradients.count) if order is None else order.tolist()
    alone = [gradients.weighted_sum(torch.eye(gradients.count, dtype=torch.float64)[patient]) for patient in patients]
    return {
        name: torch.stack([one[p] for one in alone]).to(p) if alone else p.new_zeros(0, *p.shape)
        for name, p in network.named_parameters()
    }


@pytest.fixture
def our_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opacus's harness asks us for gradients per example."""
    for module in (harness, reference):
        monkeypatch.setattr(module, "compute_opacus_grad_sample", gradients_per_patient)


@pytest.fixture
def with_our_layers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """Opens one of Opacus's test files afresh, with our layers under the names of Opacus's."""

    def execute(file: str, examples: int = 100) -> ModuleType:
        name = f"opacus.tests.{file}"
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)  # their harness pickles modules, which looks classes up by name
        settings.register_profile("before", settings.default)
        settings.register_profile("theirs", settings.default, max_examples=examples)
        with monkeypatch.context() as patch:
            for layer, ours in OUR_LAYERS.items():
                patch.setattr(opacus_layers, layer, ours)
            settings.load_profile("theirs")  # what their own settings do not name, the number of examples above all
            try:
                spec.loader.exec_module(module)
            finally:
                settings.load_profile("before")
        return module

    return execute


def _run(case: type[unittest.TestCase]) -> None:
    """Runs all tests of a unittest class."""
    result = unittest.TestResult()
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(case)
    assert suite.countTestCases() > 0
    suite.run(result)
    assert not result.skipped
    assert result.wasSuccessful(), "\n".join(text for _, text in result.failures + result.errors)


def test_opacus_tests_of_recurrent_layers_pass_with_ours(with_our_layers: Callable[..., ModuleType]) -> None:
    """Outputs and states of RNN, GRU and LSTM, and a backward pass, pass Opacus's own comparison with torch.nn."""
    _run(with_our_layers("dp_layers.dp_rnn_test").DPLSTM_test)


@pytest.mark.parametrize("file", GRAD_SAMPLE_TESTS)
def test_opacus_tests_of_gradients_per_example_pass_with_ours(
    file: str, our_gradients: None, with_our_layers: Callable[..., ModuleType]
) -> None:
    """Each patient's gradient passes Opacus's own comparison with a loop over batches of one."""
    _run(getattr(with_our_layers(f"grad_samples.{file}"), GRAD_SAMPLE_TESTS[file]))


@pytest.mark.full
@pytest.mark.parametrize("file", GRAD_SAMPLE_TESTS)
def test_opacus_tests_pass_with_ours_at_length(
    file: str, our_gradients: None, with_our_layers: Callable[..., ModuleType]
) -> None:
    """The same on 500 examples."""
    _run(getattr(with_our_layers(f"grad_samples.{file}", 500), GRAD_SAMPLE_TESTS[file]))


class _Headed(nn.Module):
    """A recurrent layer and a linear head: on the last state of each sequence, or on every step."""

    def __init__(self, layer: Any, *, every_step: bool) -> None:
        super().__init__()
        self.recurrence, self.every_step = layer, every_step
        self.head = nn.Linear(layer.hidden_size * (1 + layer.bidirectional * every_step), 2)

    def forward(self, x: Any) -> Any:
        states, last = self.recurrence(x)
        if not self.every_step:
            return self.head((last[0] if isinstance(last, tuple) else last)[-1])
        if not isinstance(states, PackedSequence):
            return self.head(states)
        with Rows.of(states):
            return states._replace(data=self.head(states.data))


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(list(OUR_LAYERS)),
    sequences=st.integers(1, 5),
    steps=st.integers(1, 6),
    num_layers=st.integers(1, 2),
    bias=st.booleans(),
    bidirectional=st.booleans(),
    every_step=st.booleans(),
)
def test_a_head_on_unsorted_packed_input_passes_the_harness_of_opacus(
    name: str, sequences: int, steps: int, num_layers: int, bias: bool, bidirectional: bool, every_step: bool
) -> None:
    """Recurrent layer and linear head on ragged, unsorted packed input give every patient's gradient."""
    layer = OUR_LAYERS[name](4, 5, num_layers=num_layers, bias=bias, bidirectional=bidirectional, batch_first=True)
    packed = _gen_packed_data(sequences, steps, 4, batch_first=True, sorted_=False)
    with mock.patch.object(reference, "compute_opacus_grad_sample", gradients_per_patient):
        harness.GradSampleHooks_test().run_test(packed, _Headed(layer, every_step=every_step), ew_compatible=False)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # Opacus, on inputs that are data
@pytest.mark.parametrize("name", OUR_LAYERS)
def test_the_harness_of_opacus_fails_its_own_layers_there(name: str) -> None:
    """D1: with Opacus's own layer and mode the same comparison fails on unsorted input, and passes on sorted."""
    network = _Headed(THEIR_LAYERS[name](4, 5, batch_first=True), every_step=False)
    torch.manual_seed(0)
    sequences = [torch.randn(n, 4) for n in (2, 5, 1, 4)]
    in_order = sorted(sequences, key=len, reverse=True)
    check = harness.GradSampleHooks_test()
    check.run_test_with_reduction(nn.utils.rnn.pack_sequence(in_order), network, loss_reduction="sum")
    unsorted = nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False)
    with pytest.raises(AssertionError, match=r"values do not match(.|\n)*head"):
        check.run_test_with_reduction(unsorted, network, loss_reduction="sum")
