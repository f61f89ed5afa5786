"""What privacy costs: a private training step in units of torch's plain one, and of Opacus's, as markdown tables.

    python -m tests.benchmarks.private_step
    python -m tests.benchmarks.private_step --threads 2 --repeats 31
    python -m tests.benchmarks.private_step --only opacus

A private step is forward, loss, backward, clip, sum, noise (torch's generator) and an SGD step; a plain step the same
without privacy, on torch.nn's layer. The network is recurrent layers and a linear head on the last state. Steps of
the kinds take turns in one process and medians are compared, because a machine's speed drifts; in brackets the ratio
of the fastest steps. Look at the load before you believe a number: on a busy machine only ratios mean anything, and
with two threads not even those.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import opacus
import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.layers import DPGRU, DPLSTM
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

from common.models import recurrent
from common.privacy.bookkeeping import BookKeepingHooks, BookKeepingOptimizer
from common.privacy.rows import Rows

Step = Callable[[], None]
CELLS = ("GRU", "LSTM")
OPACUS = {"GRU": DPGRU, "LSTM": DPLSTM}


@dataclass(frozen=True)
class Shape:
    """B sequences of T steps (ragged: exponential lengths of mean 20, at most T) with D inputs; H hidden units."""

    name: str
    B: int
    T: int
    D: int
    H: int
    ragged: bool = False
    layers: int = 1
    bidirectional: bool = False
    repeats: int = 7  # the large ones take long enough

    def inputs(self) -> Tensor | PackedSequence:
        """The batch, the same for every step."""
        generator = torch.Generator().manual_seed(1)
        if not self.ragged:
            return torch.randn(self.T, self.B, self.D, generator=generator)
        lengths = torch.empty(self.B).exponential_(1 / 20, generator=generator).ceil().clamp(1, self.T)
        sequences = [torch.randn(int(n), self.D, generator=generator) for n in lengths]
        return pack_sequence(sequences, enforce_sorted=False)

    def padded(self) -> Tensor:
        """The batch with every sequence padded to the longest, as is usual where packing is not used."""
        x = self.inputs()
        return pad_packed_sequence(x)[0] if isinstance(x, PackedSequence) else x


SMALL = Shape("padded B64 T48 D76 H128", 64, 48, 76, 128, repeats=21)
LARGE = Shape("padded B256 T100 D64 H128", 256, 100, 64, 128)
RAGGED = Shape("ragged B256 D76 H128", 256, 100, 76, 128, ragged=True, repeats=15)
SHAPES = (
    SMALL,
    LARGE,
    replace(SMALL, name="same as the first, two layers", layers=2),
    replace(SMALL, name="same as the first, bidirectional", bidirectional=True),
    RAGGED,
)


class Network(nn.Module):
    """Recurrent layers and a linear head on the last state."""

    def __init__(self, layer: nn.Module, hidden: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(hidden, 1)

    def forward(self, x: Tensor | PackedSequence) -> Tensor:
        """Logits [B]."""
        _, last = self.layer(x)
        logits: Tensor = self.head((last[0] if isinstance(last, tuple) else last)[-1])[:, 0]
        return logits


def _network(cell: Callable[..., nn.Module], shape: Shape) -> Network:
    return Network(cell(shape.D, shape.H, num_layers=shape.layers, bidirectional=shape.bidirectional), shape.H)


def _step(network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor | PackedSequence, B: int) -> Step:
    labels, owners = torch.randint(0, 2, (B,)).float(), Rows(torch.arange(B), B)

    def step() -> None:
        optimizer.zero_grad()
        with owners:
            logits = network(x)
        nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum").backward()
        optimizer.step()

    return step


def plain_step(cell: str, shape: Shape, *, padded: bool = False) -> Step:
    """torch.nn's layer without privacy."""
    network = _network(getattr(nn, cell), shape)
    x = shape.padded() if padded else shape.inputs()
    return _step(network, torch.optim.SGD(network.parameters(), lr=0.01), x, shape.B)


def private_step(cell: str, shape: Shape) -> Step:
    """Ours."""
    network = _network(getattr(recurrent, cell), shape)
    BookKeepingHooks(network, loss_reduction="sum", require_rows=True)
    sgd = torch.optim.SGD(network.parameters(), lr=0.01)
    private = BookKeepingOptimizer(sgd, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=shape.B)
    return _step(network, private, shape.inputs(), shape.B)


def hooks_step(cell: str, shape: Shape) -> Step:
    """Opacus's own layer in its hooks mode."""
    network = GradSampleModule(_network(OPACUS[cell], shape), batch_first=True, loss_reduction="sum")
    sgd = torch.optim.SGD(network.parameters(), lr=0.01)
    private = DPOptimizer(sgd, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=shape.B)
    return _step(network, private, shape.inputs(), shape.B)


def ghost_step(cell: str, shape: Shape) -> Step:
    """Opacus's own layer in its ghost clipping mode: two backward passes, no gradients per example."""
    network = GradSampleModuleFastGradientClipping(
        _network(OPACUS[cell], shape), batch_first=True, loss_reduction="sum", max_grad_norm=1.0
    )
    sgd = torch.optim.SGD(network.parameters(), lr=0.01)
    private = DPOptimizerFastGradientClipping(
        sgd, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=shape.B, loss_reduction="sum"
    )
    criterion = nn.BCEWithLogitsLoss(reduction="sum")
    loss_of = DPLossFastGradientClipping(network, private, criterion, loss_reduction="sum")
    x, labels = shape.inputs(), torch.randint(0, 2, (shape.B, 1)).float()

    def step() -> None:
        private.zero_grad()
        loss_of(network(x)[:, None], labels).backward()
        private.step()

    return step


def interleaved(steps: list[Step], repeats: int) -> list[list[float]]:
    """Milliseconds of each step, taking turns, after two unmeasured turns."""
    times: list[list[float]] = [[] for _ in steps]
    for turn in range(repeats + 2):
        for step, measured in zip(steps, times, strict=True):
            start = time.perf_counter()
            step()
            if turn >= 2:
                measured.append(1000 * (time.perf_counter() - start))
    return times


def _row(name: str, cell: str, one: list[float], other: list[float]) -> str:
    """A line of the table: median milliseconds of both, and their ratio."""
    medians = statistics.median(one), statistics.median(other)
    return (
        f"| {name} | {cell} | {medians[0]:.1f} | {medians[1]:.1f} | "
        f"**{medians[0] / medians[1]:.2f}** ({min(one) / min(other):.2f}) |"
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or "unknown processor"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, help="measured steps of each kind (default: 7 to 21, by shape)")
    parser.add_argument("--only", choices=("plain", "opacus"), help="one table alone; that of Opacus takes minutes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    print(
        f"{datetime.date.today().isoformat()}, {_processor()} ({os.cpu_count()} CPUs, load {load}, "
        f"{torch.backends.cpu.get_cpu_capability()}), {args.threads} thread(s), Python {platform.python_version()}, "
        f"torch {torch.__version__}, Opacus {opacus.__version__}"
    )
    if args.only != "opacus":
        against_plain(args.repeats)
    if args.only != "plain":
        against_opacus(min(args.repeats or 2, 2))


def against_plain(repeats: int | None) -> None:
    """Private steps in units of plain ones."""
    print("\n| batch | cell | private ms | plain ms | private / plain |\n|---|---|---|---|---|")
    for cell in CELLS:
        for shape in SHAPES:
            kinds = {"": plain_step(cell, shape)}
            if shape.ragged:
                kinds = {", plain packed": kinds[""], ", plain padded": plain_step(cell, shape, padded=True)}
            private, *plain = interleaved([private_step(cell, shape), *kinds.values()], repeats or shape.repeats)
            for kind, times in zip(kinds, plain, strict=True):
                print(_row(shape.name + kind, cell, private, times), flush=True)


def against_opacus(repeats: int) -> None:
    """Opacus's steps in units of private ones."""
    print("\n| batch | cell | Opacus ms | private ms | Opacus / private |\n|---|---|---|---|---|")
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # Opacus, on inputs that are data
    for cell in CELLS:
        for shape in (SMALL, LARGE):
            steps = [private_step(cell, shape), hooks_step(cell, shape), ghost_step(cell, shape)]
            private, hooks, ghost = interleaved(steps, repeats)
            print(_row(f"{shape.name}, hooks", cell, hooks, private), flush=True)
            print(_row(f"{shape.name}, ghost", cell, ghost, private), flush=True)


if __name__ == "__main__":
    main()
