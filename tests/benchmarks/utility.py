"""Accuracy at equal epsilon: a study and the lines beside it, mean over seeds, as a markdown table.

    python -m tests.benchmarks.utility configs/demo.yaml --epsilon 1 3 8 --seeds 3
    python -m tests.benchmarks.utility configs/physionet2012.yaml --data FOLDER --epsilon 1 3 8 --seeds 3

A seed changes starting weights, sampling and noise, and for a synthetic cohort also its patients. Scores are the
pooled AUROC of the held-out patients after the last round; nothing is chosen on them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import tempfile
from pathlib import Path

import numpy as np

from common.study import Study, load_study
from simulations.experiment import HeldOut, simulate
from simulations.hospitals import Hospitals
from simulations.lines import lines_of
from simulations.overrides import override
from simulations.sources import find_directories, write_synthetic

LINES = ["fedavg-local", "naive", "logistic", "alone"]


def main() -> None:
    """Run every line at every epsilon and seed, print each score as it comes, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--epsilon", nargs="+", default=["1", "3", "8"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lines", nargs="*", default=LINES)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    base = load_study(args.study)
    scores: dict[tuple[str, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(args.seeds):
            seeded = override(base, seed=seed, source=str(args.study))
            directories = find_directories(seeded, args.data, args.study)
            if directories is None:
                directories = write_synthetic(seeded, seed, Path(scratch) / str(seed))
            for epsilon in args.epsilon:
                study = override(seeded, epsilon=epsilon, source=str(args.study))
                for name, line in ({study.training.recipe: study} | lines_of(study, args.lines)).items():
                    score = _score(line, study, directories, seed, args.workers)
                    scores.setdefault((name, epsilon), []).append(score)
                    print(json.dumps({"line": name, "epsilon": epsilon, "seed": seed, **score}), flush=True)
    print(f"\n{platform.machine()}, Python {platform.python_version()}, {datetime.date.today()}\n")
    print("| line | " + " | ".join(f"epsilon {e}" for e in args.epsilon) + " |")
    print("|---" * (len(args.epsilon) + 1) + "|")
    for name in dict.fromkeys(name for name, _ in scores):
        cells = [_cell([s["pooled"] for s in scores[name, e]]) for e in args.epsilon]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("\nper site, mean over seeds:")
    for (name, epsilon), found in scores.items():
        sites = {site: np.mean([s[site] for s in found]) for site in found[0] if site != "pooled"}
        print(f"  {name}, epsilon {epsilon}: " + ", ".join(f"{site} {value:.3f}" for site, value in sites.items()))


def _score(line: Study, whole: Study, directories: dict[str, Path], seed: int, workers: int) -> dict[str, float]:
    """AUROC of a line on the held-out patients of all sites of the whole study, pooled and by site."""
    everyone = line.model_copy(update={"sites": whole.sites})
    result = simulate(
        Hospitals(line, directories, seed),
        workers=workers,
        resamples=1,
        held_out=HeldOut(Hospitals(everyone, directories, seed)),
    )
    return {score.site: round(score.auroc.value, 4) for score in result.scores}


def _cell(values: list[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


if __name__ == "__main__":
    main()
