"""What noised metrics cost, and how wide the intervals are that they buy: the numbers of docs/coordinator.md.

    python -m tests.benchmarks.metrics_price

Prices: 160 rounds and 4 spare ones at q .25, delta 1e-5, training calibrated to the epsilon at the column's head.
Half widths: mean over `TRIALS` draws of patients and noise for the cases of the coverage test.
"""

from __future__ import annotations

import numpy as np

from common.privacy.accounting import Steps, epsilon_of_history, noise_multiplier_for
from common.score_histogram import ScoreBins
from server.estimates import estimate
from tests.statistical.test_noised_metrics import CASES, truth

NOISES, EPSILONS, DELTA, RATE, STEPS = (2.0, 3.0, 5.0, 10.0), (1.0, 3.0, 8.0), 1e-5, 0.25, 164
TRIALS = 20


def main() -> None:
    """Print both tables."""
    print("noise | alone |", " | ".join(f"beside epsilon {epsilon:g}" for epsilon in EPSILONS))
    for noise in NOISES:
        told = Steps(1.0, noise, 1)
        both = [
            epsilon_of_history([Steps(RATE, noise_multiplier_for(e, DELTA, RATE, STEPS), STEPS), told], DELTA)
            for e in EPSILONS
        ]
        print(f"{noise:g} | {epsilon_of_history([told], DELTA):.2f} |", " | ".join(f"{price:.2f}" for price in both))
    for name, (patients, prevalence, sites, noise, number) in CASES.items():
        bins, random = ScoreBins(number, prevalence), np.random.default_rng(0)
        shares, halves = truth(bins, prevalence), []
        for _ in range(TRIALS):
            told_by = {
                f"s{k}": random.poisson(shares * patients / sites) + random.normal(0, noise, shares.shape)
                for k in range(sites)
            }
            auroc = estimate(told_by, noise, bins).auroc
            assert auroc is not None
            halves.append((auroc.high - auroc.low) / 2)
        print(f"{name}: {patients} patients, {sites} sites, noise {noise:g}: AUROC to about +- {np.mean(halves):.3f}")


if __name__ == "__main__":
    main()
