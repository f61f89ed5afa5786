"""Locked dropout: one mask per sequence, and clipping that stays per patient."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence, pad_sequence

from common.models import dropout
from common.models.dropout import LockedDropout
from common.models.recurrent import GRU, LSTM, set_backend
from common.privacy.rows import Rows
from tests.oracles import FLOAT32, FLOAT64, book_keeping_sum, check_private_sum, patient_gradients

FEATURES, HIDDEN, P = 4, 3, 0.4


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The same masks for the same seed, and nothing changed afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def sequences_of(lengths: Sequence[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randn(n, FEATURES, generator=generator, dtype=torch.float64).to(dtype) for n in lengths]


lengths_in_any_order = st.lists(st.integers(1, 6), min_size=1, max_size=6)


@settings(deadline=None, max_examples=40)
@given(lengths=lengths_in_any_order, seed=st.integers(0, 2**16))
def test_packed_and_padded_sequences_get_the_same_masks(lengths: list[int], seed: int) -> None:
    """In any order, packed, padded either way or alone: the same generator state leaves out the same features."""
    layer, sequences = LockedDropout(P), sequences_of(lengths)
    with seeded(seed):
        packed = layer(pack_sequence(sequences, enforce_sorted=False))
    from_packed, _ = pad_packed_sequence(packed)
    with seeded(seed):
        padded = layer(pad_sequence(sequences))
    with seeded(seed):
        batch_first = LockedDropout(P, batch_first=True)(pad_sequence(sequences, batch_first=True))
    assert torch.equal(from_packed, padded)
    assert torch.equal(padded.transpose(0, 1), batch_first)
    with seeded(seed):
        alone = layer(sequences[0])
    assert torch.equal(alone, padded[: lengths[0], 0])  # the first sequence draws first


@settings(deadline=None, max_examples=40)
@given(lengths=lengths_in_any_order, seed=st.integers(0, 2**16), scale=st.sampled_from([1.0, -1e6]))
def test_a_mask_holds_for_all_steps_and_does_not_see_values(lengths: list[int], seed: int, scale: float) -> None:
    """Every step of a sequence has the same features left out or scaled by 1 / (1 - p), whatever their values are."""
    ones = pack_sequence([torch.ones(n, FEATURES) for n in lengths], enforce_sorted=False)
    with seeded(seed):
        masks, _ = pad_packed_sequence(LockedDropout(P)(ones), batch_first=True)
    for n, mask in zip(lengths, masks, strict=True):
        assert torch.equal(mask[:n], mask[0].expand(n, FEATURES))
        assert ((mask[0] == 0) | (mask[0] == torch.tensor(1 / (1 - P)))).all()
    sequences = [scale * values for values in sequences_of(lengths)]
    with seeded(seed):
        got, _ = pad_packed_sequence(LockedDropout(P)(pack_sequence(sequences, enforce_sorted=False)), batch_first=True)
    assert torch.equal(got, pad_sequence(sequences, batch_first=True) * masks)


def test_masks_differ_between_sequences_and_keep_the_expectation() -> None:
    """Over 100,000 sequences entries are left out independently with probability p, and the mean stays."""
    n = 100_000
    with seeded(1):
        masks = LockedDropout(P)(torch.ones(1, n, FEATURES))[0].double()
    deviation = (P / (1 - P) / n) ** 0.5  # of the mean of a feature's masks
    assert (masks.mean(0) - 1).abs().max() < 5 * deviation
    between = (masks[:-1] - 1).T @ (masks[1:] - 1) / n  # covariance of neighbours in the batch
    assert between.abs().max() < 5 * P / (1 - P) / n**0.5
    between_features = (masks - 1).T @ (masks - 1) / n - torch.eye(FEATURES) * P / (1 - P)
    assert between_features.fill_diagonal_(0).abs().max() < 5 * P / (1 - P) / n**0.5


@pytest.mark.parametrize("layer", [LockedDropout(P).eval(), LockedDropout(0.0)], ids=["evaluation", "p=0"])
def test_nothing_is_left_out_in_evaluation(layer: LockedDropout) -> None:
    """In evaluation, and for p = 0, the output is the input, packed or not."""
    packed = pack_sequence(sequences_of([2, 3]), enforce_sorted=False)
    assert layer(packed) is packed
    assert layer(packed.data) is packed.data


def test_all_is_left_out_for_p_1() -> None:
    """For p = 1 the output is zero, not NaN."""
    assert torch.equal(LockedDropout(1.0)(torch.ones(2, 3, FEATURES)), torch.zeros(2, 3, FEATURES))


def test_no_sequences_are_masked_as_well() -> None:
    """A batch of no sequences, packed or padded, passes."""
    empty = PackedSequence(torch.zeros(0, FEATURES), torch.zeros(0, dtype=torch.int64))
    assert LockedDropout(P)(empty).data.shape == (0, FEATURES)
    assert LockedDropout(P)(torch.zeros(5, 0, FEATURES)).shape == (5, 0, FEATURES)


def test_wrong_options_and_inputs_are_refused() -> None:
    """A p that is no probability and an input of the wrong rank raise, naming what was given."""
    for p in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"p={p}"):
            LockedDropout(p)
    with pytest.raises(ValueError, match="1 dimensions"):
        LockedDropout(P)(torch.zeros(3))


# Between the layers of RNN, GRU and LSTM


def _stacked(layer: nn.RNNBase) -> list[nn.RNNBase]:
    """One-layer layers of torch.nn with the weights of a deep one."""
    single = []
    for depth in range(layer.num_layers):
        width = layer.input_size if depth == 0 else layer.hidden_size * (1 + layer.bidirectional)
        one = getattr(nn, layer.mode)(width, layer.hidden_size, bidirectional=layer.bidirectional)
        own = {n.replace(f"_l{depth}", "_l0"): p for n, p in layer.state_dict().items() if f"_l{depth}" in n}
        one.load_state_dict(own)
        single.append(one.to(layer.weight_ih_l0.dtype))
    return single


@pytest.mark.parametrize("backend", ["blocked", "fused"])
@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize("kind", [GRU, LSTM])
def test_between_layers_it_is_locked_dropout_on_the_states(
    kind: type[GRU | LSTM], with_gradients: bool, backend: str
) -> None:
    """dropout=p with locked_dropout=True is LockedDropout(p) between one-layer layers, also without gradients."""
    layer = kind(FEATURES, HIDDEN, num_layers=3, bidirectional=True, dropout=P, locked_dropout=True, backend=backend)
    stack = _stacked(layer)
    for batch in (
        pack_sequence(sequences_of([2, 4, 1]), enforce_sorted=False),
        torch.stack(sequences_of([4, 4, 4]), dim=1),
    ):
        with seeded(7), torch.set_grad_enabled(with_gradients):
            outputs, _ = layer(batch)
        with seeded(7), torch.no_grad():
            expected = batch
            for depth, one in enumerate(stack):
                expected = one(LockedDropout(P)(expected) if depth else expected)[0]
        got, wanted = (t.data if isinstance(t, PackedSequence) else t for t in (outputs, expected))
        torch.testing.assert_close(got.detach(), wanted, rtol=0, atol=1e-6)


def test_between_layers_evaluation_and_copies() -> None:
    """In evaluation nothing is left out; copies and pickles keep the option; state dicts are torch.nn's."""
    layer = GRU(FEATURES, HIDDEN, num_layers=2, dropout=P, locked_dropout=True)
    plain = nn.GRU(FEATURES, HIDDEN, num_layers=2)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(5, 2, FEATURES)
    assert torch.equal(layer.eval()(x)[0], plain(x)[0])
    assert copy.deepcopy(layer).locked_dropout
    assert pickle.loads(pickle.dumps(layer)).locked_dropout


# Privacy: given the masks, each patient's gradient is its own


class Locked(nn.Module):
    """Inputs masked, two layers with a mask between them, mean of states -> logit."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dropout = LockedDropout(P)
        self.recurrence = GRU(FEATURES, HIDDEN, num_layers=2, bidirectional=True, dropout=P, locked_dropout=True)
        self.head = nn.Linear(2 * HIDDEN, 1)
        self.to(dtype)

    def forward(self, packed: PackedSequence) -> Tensor:
        """Logits in the caller's order."""
        states, lengths = pad_packed_sequence(self.recurrence(self.dropout(packed))[0], batch_first=True)
        logits: Tensor = self.head(states.sum(1) / lengths[:, None])[:, 0]
        return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("backend", ["blocked", "fused"])
def test_clipped_sums_are_those_of_the_autograd_loop(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given each sequence's masks, norms, clipped sum and the effect of removing a patient are the oracle's."""
    torch.manual_seed(3)
    owner = torch.tensor([0, 1, 1, 2, 3, 3, 3])  # patient of each sequence
    sequences = sequences_of([3, 5, 1, 4, 2, 5, 3], dtype)
    labels = torch.tensor([1, 0, 1, 1, 0, 0, 1], dtype=dtype)
    masks = {w: dropout.draw_masks(len(owner), w, P, labels) for w in (FEATURES, 2 * HIDDEN)}
    present: list[int] = []
    monkeypatch.setattr(dropout, "draw_masks", lambda n, width, p, like: masks[width][present])

    network = Locked(dtype)
    set_backend(network, backend)
    stack, head = nn.ModuleList(_stacked(network.recurrence)), copy.deepcopy(network.head)

    def private_loss(network: nn.Module, patients: Sequence[int]) -> Tensor:
        """All sequences of these patients, the last one first."""
        present[:] = [s for s in reversed(range(len(owner))) if int(owner[s]) in patients]
        place = torch.tensor([list(patients).index(int(owner[s])) for s in present])
        with Rows(place, len(patients)):
            logits = network(pack_sequence([sequences[s] for s in present], enforce_sorted=False))
        return nn.functional.binary_cross_entropy_with_logits(logits, labels[present], reduction="sum")

    def loss_of(patient: int) -> Tensor:
        """One sequence after another, on torch's own layers."""
        losses = []
        for s in (owner == patient).nonzero()[:, 0].tolist():
            states, _ = stack[0](sequences[s] * masks[FEATURES][s])
            states, _ = stack[1](states * masks[2 * HIDDEN][s])
            logit = head(states.mean(0))[0]
            losses.append(nn.functional.binary_cross_entropy_with_logits(logit, labels[s]))
        return torch.stack(losses).sum()

    gradients = patient_gradients([*stack.parameters(), *head.parameters()], loss_of, range(4))
    clip = float(gradients.norm(dim=1).median())
    tolerance = FLOAT32 if dtype == torch.float32 else FLOAT64
    check_private_sum(book_keeping_sum(network, private_loss, clip), gradients, clip, tolerance)
