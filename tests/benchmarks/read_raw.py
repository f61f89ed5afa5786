"""Seconds and peak memory from a raw extract to events, and to a MEDS folder.

    python -m tests.benchmarks.read_raw --data FOLDER

FOLDER holds `diabetes130/csv/events.csv.gz` (1,943,790 events, 71,518 patients). `six` converts it six times over, as
six files, to show that memory does not grow with the extract. Each measurement runs in a process of
its own, so that its peak memory is its own; the shorter of `--repeat` runs is printed, as the machine may be shared.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from client.readers.convert import convert
from client.readers.formats import EventTable, EventTables, When
from client.readers.reader import open_reader

WAYS = ("events", "folder", "six")


def terms_for(files: str) -> EventTables:
    """The event table of diabetes130, all sites."""
    table = EventTable(
        files=(files,),
        patient="patient_id",
        time=When(column="visit", unit="days", each=30),
        code=("code",),
        value="value",
    )
    return EventTables(kind="events", tables=(table,))


def measure(way: str, data: Path) -> tuple[int, float, float, float]:
    """Events, wall seconds, CPU seconds and peak MiB of this process."""
    source = data.resolve() / "diabetes130" / "csv" / "events.csv.gz"
    terms = terms_for(str(source))
    begin = time.perf_counter()
    if way == "events":
        events = sum(len(block) for block in open_reader(terms, data).events())
    else:
        with tempfile.TemporaryDirectory() as place:
            for copy in range(6 if way == "six" else 1):
                (Path(place) / f"{copy}.csv.gz").symlink_to(source)
            events = convert(terms_for("*.csv.gz"), Path(place), Path(place) / "out").events
    seconds = time.perf_counter() - begin
    used = resource.getrusage(resource.RUSAGE_SELF)
    return events, seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def main() -> int:
    """Run each way in fresh interpreters and print its best line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--here", choices=WAYS, help="measure one way in this process")
    arguments = parser.parse_args()
    if arguments.here is not None:
        print(*measure(arguments.here, arguments.data))
        return 0
    for way in WAYS:
        command = [sys.executable, "-m", "tests.benchmarks.read_raw", "--data", str(arguments.data), "--here", way]
        runs = [
            [
                float(number)
                for number in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            ]
            for _ in range(arguments.repeat)
        ]
        events, seconds, cpu, _ = min(runs, key=lambda run: run[1])
        peak = max(run[3] for run in runs)
        print(
            f"diabetes130 to {way}: {events:,.0f} events in {seconds:.1f} s ({cpu:.1f} s of CPU), peak {peak:.0f} MiB"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
