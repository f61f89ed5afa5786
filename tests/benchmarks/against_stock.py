"""One federated study, here and with Flower's Ray simulation and Opacus's layers: seconds, memory, whole programs.

    python -m tests.benchmarks.against_stock
    python -m tests.benchmarks.against_stock --rounds 2 --only ragged

Ten virtual sites of 640 patients, 10 local DP-SGD steps of 64 patients a round, a GRU (D76 H128) with a linear head.
Both programs get two CPUs, one torch thread per process, and are timed from start to exit. `padded`: 48 steps each;
`ragged`: exponential lengths of mean 12, at most 48, which the stock program pads, as its examples do.

`wardround simulate run` also reads MEDS records from disk, scores held-out patients at ten rounds and writes a run
folder; the stock program loads one array and evaluates nothing.

Memory is the largest sum, over all processes that a program started, of their proportional set sizes; CPU seconds are
summed over the same processes. Wall clock means little on a busy machine; CPU seconds mean more.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from common.study import load_study
from tests.benchmarks.machine import conditions

ROOT = Path(__file__).resolve().parents[2]
SITES, PATIENTS, HELD_OUT, STEPS, VALUES = 10, 640, 40, 48, 37
OBSERVED = 0.2  # of the values at a step
MARK = "WARDROUND_BENCHMARK"


@dataclass(frozen=True)
class Cost:
    """What a program took: seconds by the clock, CPU seconds and largest memory (MiB) over all its processes."""

    seconds: float
    cpu: float
    memory: float


def write_records(folder: Path, *, ragged: bool) -> Path:
    """The same patients as MEDS directories in `folder`, and as padded arrays in the file that is returned."""
    random = np.random.default_rng(7)
    arrays = []
    for site in range(SITES):
        count = PATIENTS + HELD_OUT
        length = np.full(count, STEPS)
        if ragged:
            length = np.clip(np.ceil(random.exponential(12, count)), 1, STEPS).astype(int)
        present = random.random((count, STEPS, VALUES)) < OBSERVED
        present &= (np.arange(STEPS) < length[:, None])[:, :, None]
        present[np.arange(count), length - 1, 0] = True  # the last step is an event, too
        value = random.normal(size=present.shape).astype(np.float32)
        label = random.random(count) < 0.2
        patient, step, feature = np.nonzero(present)
        _write_site(folder / f"site-{site}", patient, step, feature, value[present], length, label)
        x = np.zeros((count, STEPS, 2 * VALUES + 2), np.float32)
        x[..., :VALUES], x[..., VALUES : 2 * VALUES] = value * present, present
        arrays.append((x[:PATIENTS], length[:PATIENTS], label[:PATIENTS]))
    x, length, label = (np.concatenate(column) for column in zip(*arrays, strict=True))
    path = folder / "padded.npz"
    np.savez(path, x=x, length=length, label=label, site=np.repeat(np.arange(SITES), PATIENTS))
    return path


def _write_site(
    folder: Path,
    patient: np.ndarray,
    step: np.ndarray,
    feature: np.ndarray,
    value: np.ndarray,
    length: np.ndarray,
    label: np.ndarray,
) -> None:
    for name in ("data", "labels", "metadata"):
        (folder / name).mkdir(parents=True)
    hours = np.datetime64("2020-01-01T00:00", "us") + np.arange(STEPS) * np.timedelta64(3_600_000_000, "us")
    ids = np.arange(len(label), dtype=np.int64)
    names = np.array([f"LAB//{n}" for n in range(VALUES)])
    events = pl.DataFrame(
        {"subject_id": patient.astype(np.int64), "time": hours[step], "code": names[feature], "numeric_value": value}
    )
    ages = pl.DataFrame({"subject_id": ids, "time": None, "code": "AGE", "numeric_value": np.float32(60)}).cast(
        events.schema
    )
    pl.concat([ages, events]).sort("subject_id", "time", nulls_last=False).write_parquet(folder / "data" / "0.parquet")
    pl.DataFrame({"subject_id": ids, "prediction_time": hours[length - 1], "boolean_value": label}).write_parquet(
        folder / "labels" / "outcome.parquet"
    )
    split = np.where(ids < PATIENTS, "train", "held_out")
    pl.DataFrame({"subject_id": ids, "split": split}).write_parquet(folder / "metadata" / "subject_splits.parquet")


def write_study(path: Path, rounds: int) -> None:
    """The study file."""
    numbers = {"unit": "1", "min": -20, "max": 20, "basis": "made up"}
    value = {"centre": 0, "scale": 1, "rate": OBSERVED, **numbers}
    terms = {
        "version": 1,
        "name": "against-stock",
        "task": {"name": "outcome", "prevalence": 0.2},
        "features": {
            "version": 1,
            "name": "labs",
            "source": "made up",
            "time_gap": {"unit_hours": 1, "centre": 0.7},
            "values": {f"LAB//{n}": dict(value) for n in range(VALUES)},
            "statics": {"AGE": {"centre": 60, "scale": 10, **numbers, "max": 120}},
            "codes": [],
        },
        "records": {"max_steps": STEPS},
        "model": {"cell": "gru", "hidden": 128, "pooling": ["last_state"]},
        "privacy": {"epsilon": 8.0, "delta": 1e-5, "sampling_rate": 0.1, "clip": 1.0, "spare_rounds": 0},
        "training": {
            "recipe": "fedavg-local",
            "rounds": rounds,
            "local_steps": 10,
            "learning_rate": 1e-3,
            "aggregation": "declared",
        },
        "sites": {f"site-{n}": {"declared_patients": PATIENTS} for n in range(SITES)},
        "quorum": SITES,
    }
    path.write_text(json.dumps(terms))  # YAML too, and without aliases


def measured(command: Sequence[str]) -> Cost:
    """Run a program to its end and watch all processes that it starts, also those that leave its group."""
    mark = uuid.uuid4().hex
    environment = {**os.environ, MARK: mark, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    cpu: dict[str, float] = {}
    largest, over = 0.0, threading.Event()

    def watch() -> None:
        nonlocal largest
        while not over.wait(0.25):
            memory = 0.0
            for process in Path("/proc").iterdir():
                try:
                    if process.name.isdigit() and f"{MARK}={mark}".encode() in (process / "environ").read_bytes():
                        fields = (process / "stat").read_text().rpartition(")")[2].split()
                        cpu[process.name] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
                        lines = (process / "smaps_rollup").read_text().splitlines()
                        memory += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
                except (OSError, StopIteration):
                    continue  # it has just ended
            largest = max(largest, memory)

    watching = threading.Thread(target=watch)
    began = time.perf_counter()
    watching.start()
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    finally:
        seconds = time.perf_counter() - began
        over.set()
        watching.join()
    if done.returncode:
        said = done.stdout[-2000:] + done.stderr[-4000:]
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{said}")
    return Cost(seconds, sum(cpu.values()), largest)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", choices=("padded", "ragged"))
    arguments = parser.parse_args()
    print(conditions())
    print(f"{arguments.rounds} rounds; stock / here\n")
    print("| records | seconds | ratio | CPU seconds | ratio | MiB | ratio |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for kind in ("padded", "ragged"):
        if arguments.only in (None, kind):
            with tempfile.TemporaryDirectory() as scratch:
                _compare(kind, Path(scratch), arguments.rounds)


def _compare(kind: str, folder: Path, rounds: int) -> None:
    arrays = write_records(folder, ragged=kind == "ragged")
    study = folder / "study.yaml"
    write_study(study, rounds)
    terms = load_study(study)
    assert terms.features.n_dense == 76, terms.features.n_dense
    sigma = terms.plan().noise_multiplier
    run = ("simulate", "run", study, "--data", folder, "--out", folder / "run", "--workers", "2")
    here = measured([sys.executable, "-m", "wardround", *map(str, run)])
    options = ("--sites", SITES, "--rounds", rounds, "--sigma", sigma)
    stock = measured([sys.executable, "-m", "tests.benchmarks.stock", str(arrays), *map(str, options)])
    pairs = [(stock.seconds, here.seconds), (stock.cpu, here.cpu), (stock.memory, here.memory)]
    cells = [f"{theirs:,.0f} / {ours:,.0f} | {theirs / ours:.1f}" for theirs, ours in pairs]
    print(f"| {kind} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
