"""What secret noise and sampling cost, in units of torch's generator (Opacus's source), as a markdown table.

    python -m tests.benchmarks.noise

Noise: `Randomness.add_noise` on a clipped sum against `torch.normal` of as many numbers of the same width, and of
float32, what Opacus draws. Sampling: `Randomness.poisson_sample` against `torch.rand(patients) < q`, Opacus's sampler.
One thread; the two kinds take turns and medians are compared, because a machine's speed drifts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from common.privacy.randomness import Randomness

Job = Callable[[], object]


def _interleaved(jobs: list[Job], repeats: int) -> list[float]:
    """Median milliseconds of each job, taking turns, after one unmeasured turn."""
    times: list[list[float]] = [[] for _ in jobs]
    for turn in range(repeats + 1):
        for job, measured in zip(jobs, times, strict=True):
            start = time.perf_counter()
            job()
            if turn:
                measured.append(1000 * (time.perf_counter() - start))
    return [statistics.median(measured) for measured in times]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", type=int, nargs="+", default=[50_000, 5_000_000])
    parser.add_argument("--patients", type=int, nargs="+", default=[70_000])
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    source = Randomness()
    print(f"torch {torch.__version__}, numpy {np.__version__}, one thread\n")
    print("| draw | ours ms | torch float64 ms | torch float32 ms | ours / float64 | ours / float32 |")
    print("|---|---|---|---|---|---|")
    for count in args.numbers:
        total = np.zeros(count)
        ours, wide, narrow = _interleaved(
            [
                lambda total=total: source.add_noise(total, 1.0, 1.0),  # type: ignore[misc]  # binds the loop's value
                lambda count=count: torch.normal(0.0, 1.0, (count,), dtype=torch.float64),  # type: ignore[misc]  # same
                lambda count=count: torch.normal(0.0, 1.0, (count,)),  # type: ignore[misc]  # same
            ],
            args.repeats,
        )
        print(
            f"| noise on {count:,} numbers | {ours:.2f} | {wide:.2f} | {narrow:.2f} | {ours / wide:.1f} | "
            f"**{ours / narrow:.1f}** |",
            flush=True,
        )
    for patients in args.patients:
        ours, theirs = _interleaved(
            [
                lambda patients=patients: source.poisson_sample(patients, 0.25),  # type: ignore[misc]  # same
                lambda patients=patients: (torch.rand(patients) < 0.25).nonzero(),  # type: ignore[misc]  # same
            ],
            args.repeats,
        )
        print(f"| sample of {patients:,} patients | {ours:.2f} | | {theirs:.2f} | | **{ours / theirs:.1f}** |")


if __name__ == "__main__":
    main()
