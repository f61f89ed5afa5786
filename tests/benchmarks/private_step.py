"""What privacy costs: a private training step in units of torch's plain one, and of Opacus's, as a markdown table.

    python -m tests.benchmarks.private_step
    python -m tests.benchmarks.private_step --threads 2 --repeats 31

A private step is forward, loss, backward, clip, sum, noise (torch's generator) and an SGD step; a plain step the same
without privacy, on torch.nn's layer. The network is one recurrent layer and a linear head on its last state. Steps of
the two kinds take turns in one process and medians are compared, because a machine's speed drifts; in brackets the
ratio of the fastest steps. Look at the load before you believe a number: on a busy machine only ratios mean anything,
and with two threads not even those.
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
from dataclasses import dataclass
from pathlib import Path

import opacus
import torch
from opacus.grad_sample import GradSampleModule
from opacus.layers import DPGRU, DPLSTM
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from common.models import recurrent
from common.privacy.bookkeeping import BookKeepingHooks, BookKeepingOptimizer
from common.privacy.rows import Rows

Step = Callable[[], None]
CELLS = ("GRU", "LSTM")


@dataclass(frozen=True)
class Shape:
    """B sequences of T steps (ragged: exponential lengths of mean 20, at most T) with D inputs; H hidden units."""

    name: str
    B: int
    T: int
    D: int
    H: int
    ragged: bool = False
    repeats: int = 7  # the large ones take long enough

    def inputs(self) -> Tensor | PackedSequence:
        """The batch, the same for every step."""
        generator = torch.Generator().manual_seed(1)
        if not self.ragged:
            return torch.randn(self.T, self.B, self.D, generator=generator)
        lengths = torch.empty(self.B).exponential_(1 / 20, generator=generator).ceil().clamp(1, self.T)
        sequences = [torch.randn(int(n), self.D, generator=generator) for n in lengths]
        return pack_sequence(sequences, enforce_sorted=False)


SHAPES = (
    Shape("padded B64 T48 D76 H128", 64, 48, 76, 128, repeats=21),
    Shape("padded B256 T100 D64 H128", 256, 100, 64, 128),
    Shape("ragged B256 D76 H128, against packed", 256, 100, 76, 128, ragged=True, repeats=15),
)


class Network(nn.Module):
    """A recurrent layer and a linear head on its last state."""

    def __init__(self, layer: nn.Module, hidden: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(hidden, 1)

    def forward(self, x: Tensor | PackedSequence) -> Tensor:
        """Logits [B]."""
        _, last = self.layer(x)
        logits: Tensor = self.head((last[0] if isinstance(last, tuple) else last)[-1])[:, 0]
        return logits


def _step(network: nn.Module, optimizer: torch.optim.Optimizer, shape: Shape) -> Step:
    x, labels = shape.inputs(), torch.randint(0, 2, (shape.B,)).float()
    owners = Rows(torch.arange(shape.B), shape.B)

    def step() -> None:
        optimizer.zero_grad()
        with owners:
            logits = network(x)
        nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum").backward()
        optimizer.step()

    return step


def plain_step(cell: str, shape: Shape) -> Step:
    """torch.nn's layer without privacy."""
    network = Network(getattr(nn, cell)(shape.D, shape.H), shape.H)
    return _step(network, torch.optim.SGD(network.parameters(), lr=0.01), shape)


def private_step(cell: str, shape: Shape) -> Step:
    """Ours."""
    network = Network(getattr(recurrent, cell)(shape.D, shape.H), shape.H)
    BookKeepingHooks(network, loss_reduction="sum", require_rows=True)
    sgd = torch.optim.SGD(network.parameters(), lr=0.01)
    return _step(
        network,
        BookKeepingOptimizer(sgd, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=shape.B),
        shape,
    )


def opacus_step(cell: str, shape: Shape) -> Step:
    """Opacus's own layer in hooks mode."""
    layer = {"GRU": DPGRU, "LSTM": DPLSTM}[cell](shape.D, shape.H)
    network = GradSampleModule(Network(layer, shape.H), batch_first=True, loss_reduction="sum")
    sgd = torch.optim.SGD(network.parameters(), lr=0.01)
    return _step(network, DPOptimizer(sgd, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=shape.B), shape)


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
    parser.add_argument("--without-opacus", action="store_true", help="leave out the second, slow table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    print(
        f"{datetime.date.today().isoformat()}, {_processor()} ({os.cpu_count()} CPUs, load {load}, "
        f"{torch.backends.cpu.get_cpu_capability()}), {args.threads} thread(s), Python {platform.python_version()}, "
        f"torch {torch.__version__}, Opacus {opacus.__version__}\n"
    )
    print("| batch | cell | private ms | plain ms | private / plain |\n|---|---|---|---|---|")
    for cell in CELLS:
        for shape in SHAPES:
            steps = [private_step(cell, shape), plain_step(cell, shape)]
            print(_row(shape.name, cell, *interleaved(steps, args.repeats or shape.repeats)), flush=True)
    if args.without_opacus:
        return
    print("\n| batch | cell | Opacus hooks ms | private ms | Opacus / private |\n|---|---|---|---|---|")
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # Opacus, on inputs that are data
    for cell in CELLS:
        steps = [opacus_step(cell, SHAPES[0]), private_step(cell, SHAPES[0])]
        print(_row(SHAPES[0].name, cell, *interleaved(steps, min(args.repeats or 2, 2))), flush=True)


if __name__ == "__main__":
    main()
