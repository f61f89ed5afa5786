"""Training away from the CPU: on CUDA where there is one, and on a pretended device everywhere.

The pretended device computes on the CPU and refuses operations whose tensors are on two devices: it finds what would
stop on CUDA. Either way the numbers must be the CPU's, up to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from common.batching import Dataset
from common.models import recurrent
from common.models.dropout import LockedDropout
from common.models.layout import Layout
from common.models.network import build_network
from common.models.recurrent import set_backend
from common.privacy.bookkeeping import BookKeepingHooks, BookKeepingOptimizer
from common.privacy.rows import Rows
from common.training import local_optimizer, predict, train_round
from simulations.seeded import SeededRandomness
from tests.pretend_device import DEVICE, PretendDevice
from tests.small import as_sequences, made_up_patients, plan, small_study

backends = pytest.mark.parametrize("backend", ["blocked", "fused"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
PATIENTS = made_up_patients(21, 16)


@pytest.fixture(params=["pretended", "cuda"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A device that is not the CPU."""
    if request.param == "pretended":
        with PretendDevice():
            yield DEVICE
    elif torch.cuda.is_available():
        yield torch.device("cuda", 0)
    else:
        pytest.skip("torch finds no CUDA device on this machine")


def assert_same(away: Tensor, here: Tensor) -> None:
    """Equal to rounding: TF32, if it were on, would be off by 1e-3."""
    tolerance = 1e-10 if here.dtype == torch.float64 else 1e-5
    away, here = away.detach().cpu(), here.detach()
    assert float((away - here).abs().max()) <= tolerance * max(1.0, float(here.abs().max()))


def moved(given: Tensor | PackedSequence, device: torch.device) -> Any:
    """The same on `device`."""
    return given.to(device)  # type: ignore[arg-type]  # torch's stub of PackedSequence.to knows no devices


class Network(nn.Module):
    """All that notes in the book: lookups, linear, norm, recurrent, one with Opacus's sampler, one for functorch."""

    def __init__(self, cell: str) -> None:
        super().__init__()
        self.bags, self.table = nn.EmbeddingBag(7, 4, mode="mean"), nn.Embedding(7, 4, padding_idx=0)
        self.values, self.norm, self.shift = nn.Linear(3, 4), nn.LayerNorm(4), Shift(4)
        self.drop, self.groups = LockedDropout(0.3), nn.GroupNorm(2, 4)
        self.recurrence = getattr(recurrent, cell)(4, 5, num_layers=2, bidirectional=True)
        self.head = nn.Linear(10, 1)

    def forward(self, packed: PackedSequence, codes: Tensor, start: Tensor) -> Tensor:
        """Logits in the caller's order."""
        with Rows.of(packed):
            x = self.values(packed.data) + self.bags(codes, start) + self.table(codes[start])
            x = self.shift(self.groups(self.norm(x)))
        _, last = self.recurrence(self.drop(packed._replace(data=x)))
        h_n = last[0] if isinstance(last, tuple) else last
        logits: Tensor = self.head(torch.cat([h_n[-2], h_n[-1]], dim=1))[:, 0]
        return logits


class Shift(nn.Module):
    """A bias of its own, for which there is no sampler."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        """x, shifted."""
        return x + self.by


def clipped_sum(network: nn.Module, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What would be noised: three sequences of two patients, one of which is not finite in a second micro-batch."""
    generator = torch.Generator().manual_seed(1)
    seen: list[Tensor] = []
    BookKeepingHooks(network, loss_reduction="sum", require_rows=True)
    optimizer = BookKeepingOptimizer(
        torch.optim.SGD(network.parameters(), lr=0.1),
        noise_multiplier=1.0,
        max_grad_norm=0.5,
        expected_batch_size=2.0,
        noise=lambda flat, _deviation: (seen.append(flat), flat)[1],  # type: ignore[func-returns-value]  # meant so
    )
    for spoilt in (False, True):
        sequences = [torch.randn(n, 3, generator=generator, dtype=torch.float64).to(dtype) for n in (2, 5, 3)]
        if spoilt:
            sequences[1][2] = float("nan")
        packed = moved(pack_sequence(sequences, enforce_sorted=False), device)
        codes, start = torch.arange(20, device=device) % 7, torch.arange(10, device=device) * 2
        with Rows(torch.tensor([0, 1, 0], device=device), 2):
            logits = network(packed, codes, start)
        logits.sum().backward()
        optimizer.accumulate()
    optimizer.step()
    return seen[0]


@dtypes
@backends
@pytest.mark.parametrize("cell", ["GRU", "LSTM", "RNN"])
def test_a_private_step_is_the_cpus(cell: str, backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """The clipped sum over every kind of module, and the weights after the step, equal those of the CPU."""
    torch.manual_seed(0)
    here = Network(cell).to(dtype)
    here.drop.eval()  # masks are drawn where the rows are, so they are not the CPU's
    set_backend(here, backend)
    away = copy.deepcopy(here).to(device)
    assert_same(clipped_sum(away, dtype, device), clipped_sum(here, dtype, torch.device("cpu")))
    for gone, stayed in zip(away.parameters(), here.parameters(), strict=True):
        assert_same(gone, stayed)


@dtypes
@backends
@pytest.mark.parametrize("cell", ["GRU", "LSTM", "RNN"])
def test_a_layer_is_the_cpus(cell: str, backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """Outputs, states and gradients, with initial states, packed and padded, equal those of the CPU."""
    torch.manual_seed(0)
    here: Any = getattr(recurrent, cell)(3, 4, num_layers=2, bidirectional=True, dtype=dtype, backend=backend)
    away = copy.deepcopy(here).to(device)
    packed = pack_sequence([torch.randn(n, 3, dtype=dtype) for n in (2, 5, 3)], enforce_sorted=False)
    start = torch.randn(4, 3, 4, dtype=dtype)
    for given in (packed, torch.randn(5, 3, 3, dtype=dtype)):
        results = []
        for layer, where in ((here, torch.device("cpu")), (away, device)):
            hx = (start.to(where), start.to(where)) if cell == "LSTM" else start.to(where)
            outputs, last = layer(moved(given, where), hx)
            rows = outputs.data if isinstance(outputs, PackedSequence) else outputs
            layer.zero_grad()
            (rows.sin().sum() + sum(state.cos().sum() for state in (last if cell == "LSTM" else [last]))).backward()
            results.append([rows, *(last if cell == "LSTM" else [last]), *(p.grad for p in layer.parameters())])
        for stayed, gone in zip(*results, strict=True):
            assert_same(gone, stayed)


@backends
@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn", "none"])
def test_a_round_and_its_predictions_are_the_cpus(cell: str, backend: str, device: torch.device) -> None:
    """A site's round (three steps, micro-batches, seeded noise) and predictions equal those of the CPU."""

    def trained(where: torch.device) -> tuple[list[Tensor], Tensor]:
        dataset = Dataset(as_sequences(PATIENTS), device=where)
        network = build_network(small_study(model={"cell": cell})).to(where)
        set_backend(network, backend)
        update = train_round(
            network,
            dataset,
            plan(),
            declared_patients=80,
            steps=3,
            optimizer=local_optimizer("fedavg-one-step", network, 1.0),
            randomness=SeededRandomness(5, "north", 1, 1),
            max_rows=30,
        )
        return [torch.from_numpy(array) for array in update.values()], torch.from_numpy(predict(network, dataset))

    (update, risk), (update_here, risk_here) = trained(device), trained(torch.device("cpu"))
    for gone, stayed in zip(update, update_here, strict=True):
        assert_same(gone, stayed)
    # Evaluation is torch's own layer under torch's own settings, which on CUDA allow TF32.
    assert float((risk - risk_here).abs().max()) <= (0.0 if device == DEVICE else 1e-2)


def test_locked_masks_are_drawn_where_the_rows_are(device: torch.device) -> None:
    """LockedDropout, alone and between layers, runs away from the CPU."""
    packed = moved(pack_sequence([torch.ones(n, 3) for n in (2, 5, 3)], enforce_sorted=False), device)
    assert LockedDropout(0.5)(packed).data.device == device
    layer = recurrent.GRU(3, 4, num_layers=2, dropout=0.5, locked_dropout=True).to(device)
    outputs, _ = layer(packed)
    assert outputs.data.device == device


def test_the_pretended_device_refuses_tensors_on_two_devices() -> None:
    """An operation on a tensor here and one there is an error; a scalar from here, and a copy, are not."""
    with PretendDevice():
        away = torch.ones(3, device=DEVICE)
        with pytest.raises(AssertionError, match="two devices"):
            away + torch.ones(3)
        with pytest.raises(AssertionError, match="two devices"):
            away[torch.tensor([0])]
        assert (away + torch.tensor(1.0)).tolist() == [2.0, 2.0, 2.0]
        assert torch.equal(away.cpu(), torch.ones(3))


def test_a_layout_does_not_wait_for_the_device() -> None:
    """What the positions of a packed batch are is known without asking the device."""
    with PretendDevice() as pretended:
        layout = Layout([3, 2, 2, 1], DEVICE)
        positions = (layout.step, layout.sequence, layout.lengths, layout.last, layout.previous, layout.reverse)
        assert not pretended.waits
        assert [t.tolist() for t in positions[2:4]] == [[4, 3, 1], [7, 6, 2]]
        assert pretended.waits
