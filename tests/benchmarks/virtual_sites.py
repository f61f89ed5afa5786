"""Many virtual hospitals in one process: memory and seconds per round as their number grows, the patients staying.

    python -m tests.benchmarks.virtual_sites
    python -m tests.benchmarks.virtual_sites --sites 10 100 --rounds 2

The synthetic cohort `medium` is dealt out over so many sites, each with its share of the positive patients, and the
study `quick` runs over them as a person would do it: `wardround simulate run`, one process, from start to exit. A round
is one private step at each site, over a quarter of its patients.

What memory grows by, beside the records: a site holds its own network, the weights' shapes and its stored update, and a
round holds all replies until the average is formed in order of site name, which is what makes it the same to the last
bit in any number of processes. That is five times the parameters for each site.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from common.study import load_study
from simulations.cohort import write_cohort
from simulations.partition import PartitionSpec, find_sources, partition, site_terms
from simulations.recipe import find_preset
from tests.benchmarks.against_stock import ROOT, Cost, measured
from tests.benchmarks.machine import conditions

STUDY = ROOT / "configs" / "quick.yaml"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--patients", type=int, default=20_000, help="training and held-out patients of all sites")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(conditions())
    print(f"{arguments.patients:,} patients, {arguments.rounds} rounds\n")
    print("| sites | dealing out, s | whole run, s | CPU s | s per round | MiB |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        cohort = Path(scratch) / "cohort"
        preset = find_preset("medium")
        usual = sum(site.patients for site in preset.sites) * (1 + preset.held_out_ratio)
        write_cohort(preset, 0, cohort, scale=arguments.patients / usual)
        for sites in arguments.sites:
            dealing, run, rounds = _run(cohort, Path(scratch) / str(sites), sites, arguments.rounds)
            print(
                f"| {sites:,} | {dealing:.1f} | {run.seconds:.0f} | {run.cpu:.0f} | {rounds:.2f} | {run.memory:,.0f} |",
                flush=True,
            )


def _run(cohort: Path, folder: Path, sites: int, rounds: int) -> tuple[float, Cost, float]:
    """(seconds to deal the patients out, the whole run, median seconds of a round)."""
    began = time.perf_counter()
    terms = load_study(STUDY)
    spec = PartitionSpec(by="label", alpha=1e6, sites=sites, minimum_patients=2)  # both classes at every site
    reports = partition(find_sources(cohort), folder / "sites", spec, terms.task.name, 0)
    dealing = time.perf_counter() - began
    study = terms.model_dump(mode="json", exclude_none=True)
    study["sites"] = {name: site.model_dump(mode="json") for name, site in site_terms(reports).items()}
    study["training"]["rounds"] = rounds
    study["simulation"] = {}
    (folder / "study.yaml").write_text(json.dumps(study))  # YAML too
    run = ("simulate", "run", folder / "study.yaml", "--data", folder / "sites", "--out", folder / "run")
    cost = measured([sys.executable, "-m", "wardround", *map(str, run)])
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return dealing, cost, statistics.median(json.loads(line)["seconds"] for line in lines)


if __name__ == "__main__":
    main()
