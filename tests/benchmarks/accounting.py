"""How long it takes to price a long history of many different steps, by PLD and by the ledger's filter.

    python -m tests.benchmarks.accounting
    python -m tests.benchmarks.accounting --kinds 100 --rounds 10000

A history has as many rounds, in equal parts, at evenly spread noise multipliers. Each price is computed once, with
empty caches. CPU seconds are this process's own; on a busy machine they are nearer the truth than the clock's.
The filter's price is what a ledger computes that admitted each kind as a plan: at the order it stored when it opened
with a cap of that epsilon.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from common.privacy import accounting
from common.privacy.accounting import Steps, best_order, epsilon_of_history, filter_epsilon, rdp_of
from common.privacy.plan import Plan

SPANS = ((0.25, 4.0, 12.0), (0.05, 1.0, 3.0), (0.01, 0.8, 4.0))  # q, lowest and highest sigma
DELTA = 1e-5


def history_of(q: float, low: float, high: float, kinds: int, rounds: int) -> list[Steps]:
    """`rounds` steps at sampling rate q, in equal parts at `kinds` noise multipliers from low to high."""
    return [Steps(q, float(sigma), rounds // kinds) for sigma in np.linspace(low, high, kinds)]


def filter_price(history: list[Steps], cap: float) -> float:
    """What the ledger would state after admitting each kind of steps as a plan."""
    order = best_order(cap, DELTA)
    plans = [Plan(s.sampling_rate, s.noise_multiplier, 1.0, DELTA, s.number) for s in history]
    return filter_epsilon([rdp_of(plan, order) for plan in plans], order, DELTA)


def timed(job: Callable[[], float]) -> tuple[float, float, float]:
    """(what the job returns, seconds by the clock, CPU seconds)."""
    accounting._epsilon.cache_clear()
    accounting._divergence_of_a_step.cache_clear()
    clock, cpu = time.perf_counter(), time.process_time()
    value = job()
    return value, time.perf_counter() - clock, time.process_time() - cpu


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", type=int, default=100, help="different noise multipliers")
    parser.add_argument("--rounds", type=int, default=10_000)
    args = parser.parse_args()
    print(f"{args.rounds:,} rounds at {args.kinds} noise multipliers, delta {DELTA}\n")
    print("| q, sigma | PLD epsilon | s (CPU s) | filter's epsilon | s (CPU s) |\n|---|---|---|---|---|")
    for q, low, high in SPANS:
        history = history_of(q, low, high, args.kinds, args.rounds)
        epsilon, clock, cpu = timed(lambda history=history: epsilon_of_history(history, DELTA))  # type: ignore[misc]  # binds the loop's value
        charged, filter_clock, filter_cpu = timed(lambda: filter_price(history, epsilon))  # noqa: B023  # called at once
        print(
            f"| {q}, {low} to {high} | {epsilon:.3f} | **{clock:.1f}** ({cpu:.1f}) | {charged:.3f} | "
            f"**{filter_clock:.2f}** ({filter_cpu:.2f}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
