"""How long it takes to make virtual hospitals, as a markdown table.

    python -m tests.benchmarks.cohort

Time from preset to MEDS directories on disk, all label files and truth included, in a process that has made nothing
yet. Wall-clock and CPU seconds: on a shared machine the second is what the work costs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from simulations.recipe import PRESETS, find_preset

ONE = """
import sys, time
from pathlib import Path
from simulations.cohort import find_preset, write_cohort
wall, cpu = time.perf_counter(), time.process_time()
write_cohort(find_preset(sys.argv[1]), 0, Path(sys.argv[2]), scale=float(sys.argv[3]))
print(time.perf_counter() - wall, time.process_time() - cpu)
"""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=100_000, help="training and held-out patients together")
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    args = parser.parse_args()
    print("| preset | patients | megabytes | CPU s | wall s |")
    print("|---|---|---|---|---|")
    for name in args.presets:
        preset = find_preset(name)
        usual = sum(site.patients for site in preset.sites) * (1 + preset.held_out_ratio)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "cohort"
            command = [sys.executable, "-c", ONE, name, str(out), str(args.patients / usual)]
            wall, cpu = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 1e6
        print(f"| {name} | {args.patients:,} | {size:.0f} | {float(cpu):.1f} | {float(wall):.1f} |", flush=True)


if __name__ == "__main__":
    main()
