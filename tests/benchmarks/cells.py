"""Which cell, when: rnn, lstm and gru under one study at equal epsilon, with what a round costs, as markdown tables.

    python -m tests.benchmarks.cells configs/demo.yaml --epsilon 1 3 8 none --seeds 3
    python -m tests.benchmarks.cells configs/physionet2012.yaml --data FOLDER --epsilon 1 3 8 none --seeds 3

Everything but the cell is the study's own; the clip follows each cell by the rule for made-up patients
(simulations/typical.py), as the study's own clip did. `none` clips and adds no noise. A cost is one site-round of the
largest site (its private steps), cells taking turns in one process, and the bytes of an update. Nothing is chosen on
the held-out patients.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from common.models.network import build_network
from common.study import Study, load_study
from common.terms import parse
from common.training import local_optimizer, state_of, train_round
from simulations.experiment import HeldOut, simulate
from simulations.hospitals import Hospitals
from simulations.overrides import override
from simulations.seeded import SeededRandomness
from simulations.sources import find_directories, write_synthetic
from simulations.typical import typical_clip

CELLS = ("rnn", "lstm", "gru")
TURNS = 15


def main() -> None:
    """Run every cell at every epsilon and seed, print each score as it comes, then the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--epsilon", nargs="+", default=["1", "3", "8", "none"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=CELLS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    studies = {cell: with_cell(load_study(args.study), cell) for cell in args.cells}
    scores: dict[tuple[str, str], list[float]] = {}
    costs: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(args.seeds):
            base = override(studies[args.cells[0]], seed=seed, source=str(args.study))
            directories = find_directories(base, args.data, args.study)
            if directories is None:
                directories = write_synthetic(base, seed, Path(scratch) / str(seed))
            held_out = HeldOut(Hospitals(base, directories, seed))
            costs = costs or cost_per_round({cell: Hospitals(s, directories, seed) for cell, s in studies.items()})
            for epsilon in args.epsilon:
                for cell, whole in studies.items():
                    study = override(whole, epsilon=epsilon, seed=seed, source=str(args.study))
                    result = simulate(Hospitals(study, directories, seed), resamples=1, held_out=held_out)
                    auroc = round(result.score().auroc.value, 4)
                    scores.setdefault((cell, epsilon), []).append(auroc)
                    line = {"cell": cell, "epsilon": epsilon, "seed": seed, "clip": study.privacy.clip, "auroc": auroc}
                    print(json.dumps(line), flush=True)
    print(f"\n{args.study.stem}, {platform.machine()}, Python {platform.python_version()}, {datetime.date.today()}\n")
    print("| cell | clip | " + " | ".join(f"epsilon {e}" for e in args.epsilon) + " | a round |")
    print("|---" * (len(args.epsilon) + 3) + "|")
    for cell, study in studies.items():
        cells = [_cell(scores[cell, epsilon]) for epsilon in args.epsilon]
        print(f"| {cell} | {study.privacy.clip} | " + " | ".join(cells) + f" | {costs[cell]} |")


def with_cell(study: Study, cell: str) -> Study:
    """The study with another cell, and with the clip that the rule gives for it."""
    data = study.model_dump(mode="json")
    data["model"]["cell"] = cell
    changed = parse(data, Study, f"cell {cell}")
    data["privacy"]["clip"] = typical_clip(changed)
    return parse(data, Study, f"cell {cell}")


def cost_per_round(cells: dict[str, Hospitals]) -> dict[str, str]:
    """Median milliseconds of a round at the largest site and the size of its update, by cell."""
    largest = max(next(iter(cells.values())).study.sites.items(), key=lambda site: site[1].declared_patients)[0]
    rounds = {cell: one_round(hospitals, largest) for cell, hospitals in cells.items()}
    times: dict[str, list[float]] = {cell: [] for cell in cells}
    for turn in range(TURNS + 1):
        for cell, step in rounds.items():
            start = time.perf_counter()
            step()
            if turn:  # the first one is warming up
                times[cell].append(1000 * (time.perf_counter() - start))
    sizes = {cell: sum(w.nbytes for w in state_of(build_network(h.study, 0)).values()) for cell, h in cells.items()}
    return {cell: f"{statistics.median(times[cell]):.0f} ms, {sizes[cell] / 1000:.0f} kB" for cell in cells}


def one_round(hospitals: Hospitals, site: str) -> Callable[[], None]:
    """One site's round at starting weights, as a function to be timed."""
    study = hospitals.study
    dataset = hospitals.dataset(site, study.simulation.train)
    network = build_network(study, 0)
    randomness = SeededRandomness(0, site, 1, 0)

    def step() -> None:
        train_round(
            network,
            dataset,
            study.plan(),
            declared_patients=study.sites[site].declared_patients,
            steps=study.training.local_steps,
            optimizer=local_optimizer(study.training.recipe, network, study.learning_rate(1)),
            randomness=randomness,
        )

    return step


def _cell(values: list[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


if __name__ == "__main__":
    main()
