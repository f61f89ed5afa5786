"""What privacy costs in memory, as markdown tables. Linux only: it reads the kernel's own counts.

    python -m tests.benchmarks.memory

Steps: the private step against torch.nn's plain one (both of tests/benchmarks/private_step.py). "One step" is the peak
of resident memory during a step above what was resident before it, after a step of warm-up; "and kept" adds what the
earlier step left resident (gradients, buffers that are used again). Logical batch: a round of `train_round` in which
every patient is sampled, through micro-batches. Each number comes from a fresh process of one thread, in which malloc
returns freed blocks to the kernel at once (slower, but else what warm-up left behind would hide the peak).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.batching import Dataset
from common.models.network import build_network
from common.privacy.plan import Plan
from common.privacy.randomness import Randomness
from common.sequences import Sequences
from common.study import Study
from common.training import local_optimizer, train_round
from tests.benchmarks.private_step import CELLS, SHAPES, plain_step, private_step
from tests.small import small_study

PADDED = next(shape for shape in SHAPES if shape.name == "padded B256 T100 D64 H128")
STEPS = {"private": private_step, "plain": plain_step}
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}


def resident(name: str) -> float:
    """MiB of resident memory: `VmRSS` now, `VmHWM` at its highest."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) / 1024


def peak_of(job: Callable[[], object]) -> float:
    """The highest MiB of resident memory while `job` ran."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the highest value starts again
    job()
    return resident("VmHWM")


def one_step(kind: str, cell: str) -> dict[str, float]:
    """Peak of the second step of its size, above what was resident before it and before the first."""
    STEPS[kind](cell, replace(PADDED, B=2, T=2))()  # loads what a first step loads
    step = STEPS[kind](cell, PADDED)
    at_first = resident("VmRSS")
    step()
    before = resident("VmRSS")
    peak = peak_of(step)
    return {"step": peak - before, "kept": peak - at_first}


def records(study: Study, patients: int, steps: int) -> Sequences:
    """Made-up records: one sequence of `steps` steps per patient, half of the values measured, about 3 codes a step."""
    random = np.random.default_rng(0)
    schema = study.features
    rows, values = patients * steps, len(schema.values)
    codes = np.sort(random.integers(0, rows, 3 * rows))
    return Sequences(
        patient_id=np.arange(patients),
        patient=np.arange(patients),
        start=np.arange(0, rows + 1, steps),
        values=random.standard_normal((rows, values), np.float32),
        measured=random.random((rows, values)) < 0.5,
        gap=random.random(rows, np.float32),
        codes=random.integers(0, schema.n_codes, 3 * rows),
        code_start=np.searchsorted(codes, np.arange(rows + 1)),
        statics=random.standard_normal((patients, schema.n_statics), np.float32),
        label=(random.random(patients) < 0.2).astype(np.float32),
        prediction_time=np.zeros(patients, "datetime64[us]"),
    )


def logical_batch(hidden: int, patients: int) -> dict[str, float]:
    """Peak of one private round over all patients, and what the data take by themselves."""
    study = wide_study(hidden)
    start = resident("VmRSS")
    dataset = Dataset(records(study, patients, steps=20))
    data = resident("VmRSS") - start
    network = build_network(study)
    plan = Plan(1.0, 4.0, 1.0, 1e-5, 1)

    def round_of() -> None:
        train_round(
            network,
            dataset,
            plan,
            declared_patients=patients,
            steps=1,
            optimizer=local_optimizer("fedavg-one-step", network, 0.0),
            randomness=Randomness(),
        )

    before, began = resident("VmRSS"), time.perf_counter()
    peak = peak_of(round_of)
    return {"data": data, "peak": peak - before, "total": peak, "seconds": time.perf_counter() - began}


def wide_study(hidden: int) -> Study:
    """A study of 30 values and 200 codes for a GRU."""
    value = {"centre": 0, "scale": 1, "unit": "none", "min": -20, "max": 20, "basis": "made up"}
    return small_study(
        features={
            "values": {f"VITAL//{k}": value for k in range(30)},
            "codes": [f"CODE//{k}" for k in range(200)],
        },
        records={"max_steps": 20},
        model={"hidden": hidden, "embedding": 16},
    )


def measured(*job: str) -> dict[str, Any]:
    """A measurement from a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.memory", "--child", *job],
        env={**os.environ, **RETURN_FREED},
        check=True,
        capture_output=True,
        text=True,
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=20_000)
    parser.add_argument("--hidden", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        kind, what = args.child
        answer = one_step(kind, what) if kind in STEPS else logical_batch(int(kind), int(what))
        print(json.dumps(answer))
        return
    print(f"torch {torch.__version__}, one thread\n")
    print(f"| {PADDED.name} | | private MiB | plain MiB | private / plain |\n|---|---|---|---|---|")
    for cell in CELLS:
        private, plain = measured("private", cell), measured("plain", cell)
        for what, name in (("step", "one step"), ("kept", "and kept")):
            ratio = private[what] / plain[what]
            print(f"| {cell} | {name} | {private[what]:.0f} | {plain[what]:.0f} | **{ratio:.2f}** |", flush=True)
    print(f"\n| round over {args.patients:,} patients | data MiB | above the data MiB | process MiB | s |")
    print("|---|---|---|---|---|")
    for hidden in args.hidden:
        found = measured(str(hidden), str(args.patients))
        print(
            f"| GRU {hidden}, 20 steps, 30 values, 60 codes each | {found['data']:.0f} | **{found['peak']:.0f}** | "
            f"{found['total']:.0f} | {found['seconds']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
