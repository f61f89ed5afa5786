"""Seconds and peak memory from MEDS directories to Sequences, all splits of all sites of a data set.

    python -m tests.benchmarks.read_records --data FOLDER [physionet2012] [diabetes130]

FOLDER holds one folder per data set, each with `meds/SITE/`. Every data set runs in a process of its own, so
that its peak memory is its own. The code list of diabetes130 is taken from the data set itself: good
enough to measure time, not to train on.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import polars as pl

from client.readers.meds import read
from common.schema import SPLITS, FeatureSchema
from common.terms import load, parse

CONFIGS = Path(__file__).parents[2] / "configs" / "features"
DATA_SETS = ("physionet2012", "diabetes130")
TASKS = {"physionet2012": "in_hospital_death", "diabetes130": "readmit_30d_each_visit"}
NUMBERS = {  # plain counts and years: limits and scales of round numbers
    "AGE_BAND_MID": (65, 15, 0, 120),
    "NUMBER_INPATIENT": (1, 1, 0, 100),
    "NUMBER_EMERGENCY": (1, 1, 0, 100),
    "NUMBER_OUTPATIENT": (1, 1, 0, 100),
    "NUM_LAB_PROCEDURES": (45, 20, 0, 200),
    "NUM_PROCEDURES": (1, 1.5, 0, 20),
    "NUM_MEDICATIONS": (16, 8, 0, 100),
    "TIME_IN_HOSPITAL_DAYS": (4, 3, 0, 30),
}


def schema_for(name: str, folder: Path) -> FeatureSchema:
    """The shipped schema, or one over all codes of the data set."""
    if name == "physionet2012":
        return load(CONFIGS / "physionet2012.yaml", FeatureSchema)
    listed = pl.concat([pl.read_parquet(path)["code"] for path in folder.glob("meds/*/metadata/codes.parquet")])
    keys = ("centre", "scale", "min", "max")
    terms = {
        "version": 1,
        "name": name,
        "source": "timing only",
        "values": {
            code: {"unit": "number", "basis": "round numbers", **dict(zip(keys, numbers, strict=True))}
            for code, numbers in NUMBERS.items()
        },
        "codes": sorted(set(listed) - set(NUMBERS)),
        "time_gap": {"unit_hours": 720, "centre": 0.7},
    }
    return parse(terms, FeatureSchema, name)


def measure(name: str, data: Path) -> str:
    """One line: what was read, how long it took, the peak memory of this process."""
    folder, schema = data / name, schema_for(name, data / name)
    bins = 2.0 if name == "physionet2012" else None
    begin = time.perf_counter()
    patients = sequences = steps = codes = 0
    for site in sorted((folder / "meds").iterdir()):
        records = read(site, TASKS[name], schema, SPLITS, max_steps=24, bin_hours=bins)
        patients += records.n_patients
        sequences += records.n_sequences
        steps += records.n_steps
        codes += len(records.codes)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return (
        f"{name}: {patients} patients, {sequences} sequences, {steps} steps, {codes} codes "
        f"(V={schema.n_values}, codes={schema.n_codes}): {seconds:.1f} s, peak {peak:.0f} MiB"
    )


def main() -> int:
    """Run each data set in a fresh interpreter and print its line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(DATA_SETS)}; default all")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--here", action="store_true", help="run in this process")
    arguments = parser.parse_args()
    for name in arguments.names or DATA_SETS:
        if name not in DATA_SETS:
            parser.error(f"{name} is not one of {', '.join(DATA_SETS)}")
        if not (arguments.data / name / "meds").is_dir():
            print(f"{name}: {arguments.data / name / 'meds'} is absent, skipped")
        elif arguments.here:
            print(measure(name, arguments.data), flush=True)
        else:
            command = [sys.executable, "-m", "tests.benchmarks.read_records", name, "--here"]
            subprocess.run([*command, "--data", str(arguments.data)], check=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
