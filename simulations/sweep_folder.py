"""The folder of a sweep: a file per finished row, and tables over all of them.

sweep.yaml, study.yaml   what was asked for, as it was read
jobs.json                names of the rows' files, in the order of the tables
rows/*.json              one row each, written whole or not at all
results.csv              a line per row and scored site, for a spreadsheet; without times, so that equal rows are equal
results.json             all rows
records/                 cohorts and partitions that the sweep made; rows and tables hold no patient, this does

A row of other code than today's is kept and never mixed with today's unless a person says so: half a curve from
before a change and half from after it looks like a finding.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import yaml

from common.errors import ConfigurationError
from common.provenance import code_digest
from common.study import Study
from simulations.planning import Job
from simulations.rows import JOBS, ROWS, Estimate, Row, read_row
from simulations.sweep import Sweep

ROOMS = ("common", "client", "server", "simulations")


def rooms_digest() -> str:
    """sha256 over path and content of every Python file of the four rooms: what a row's numbers may depend on."""
    return code_digest(ROOMS)


class SweepFolder:
    """The folder `out` of a sweep; made if it is not there.

    Raises:
        ConfigurationError: `out` holds something else, or cannot be written.
    """

    def __init__(self, out: Path) -> None:
        if out.exists() and not (out.is_dir() and ((out / ROWS).is_dir() or not any(out.iterdir()))):
            raise ConfigurationError(f"--out {out}: exists and is no sweep; name a new folder")
        self.out, self.rows = out, out / ROWS
        try:
            self.rows.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"--out {out}: cannot be written ({error.strerror}); name another") from None

    def begin(self, sweep: Sweep, study: Study) -> None:
        """Write down what is asked for."""
        _write(self.out / "sweep.yaml", _yaml(sweep.model_dump(mode="json")))
        _write(self.out / "study.yaml", _yaml(study.model_dump(mode="json")))

    def resume(self, jobs: list[Job], *, mixed: bool) -> dict[str, Row]:
        """Write down the jobs; those rows of theirs that are there already, by file name.

        What a killed process left half-written is removed.

        Args:
            jobs: whose rows are wanted.
            mixed: whether rows of other code may stand beside those of today's.

        Raises:
            ConfigurationError: rows of other code, and not `mixed`.
            DataError: a damaged row.
        """
        for left_over in [*self.out.glob(".*.part"), *self.rows.glob(".*.part")]:
            left_over.unlink()
        names = [job.file_name for job in jobs]
        found = {name: read_row(self.rows / name) for name in names if (self.rows / name).is_file()}
        others = sorted({row.code_digest for row in found.values()} - {rooms_digest()})
        if others and not mixed:
            count = sum(row.code_digest in others for row in found.values())
            raise ConfigurationError(
                f"--out {self.out}: {count} of its {len(found)} rows are of other code ({others[0][:12]}, this is "
                f"{rooms_digest()[:12]}); name a new folder, or mix them on purpose with --force"
            )
        _write(self.out / JOBS, json.dumps(names, indent=1) + "\n")
        return found

    def store(self, job: Job, row: Row) -> None:
        """Write a finished row: the file appears whole, also if the process or the machine stops."""
        _write(self.rows / job.file_name, json.dumps(row.to_json(), indent=1, allow_nan=False) + "\n")

    def conclude(self, rows: list[Row]) -> None:
        """Write the tables."""
        _write(self.out / "results.csv", as_csv(rows))
        _write(self.out / "results.json", json.dumps([row.to_json() for row in rows], indent=1, allow_nan=False) + "\n")


def as_csv(rows: list[Row]) -> str:
    """A line per row and scored site."""
    settings = list(dict.fromkeys(key for row in rows for key in row.settings))
    text = io.StringIO()
    writer: Any = None
    for row in rows:
        shared = {
            "line": row.line,
            **{key: row.settings.get(key) for key in settings},
            "epsilon": row.epsilon,
            "seed": row.seed,
        }
        facts = {
            "spent": row.spent,
            "delta": row.delta,
            "noise_multiplier": row.plan.noise_multiplier if row.plan else None,
            "parameters": row.parameters,
            "research_mode": row.research_mode,
            "study_digest": row.study_digest,
            "code_digest": row.code_digest,
        }
        for site in row.sites:
            sizes = {name: getattr(site, name) for name in ("declared_patients", "patients", "sequences", "positives")}
            metrics = _spread("auroc", site.auroc) | _spread("auprc", site.auprc) | _spread("brier", site.brier)
            line = shared | {"site": site.site} | sizes | metrics | {"best_possible": site.best_possible} | facts
            if writer is None:
                writer = csv.DictWriter(text, list(line), lineterminator="\n")
                writer.writeheader()
            writer.writerow(line)
    return text.getvalue()


def _spread(name: str, estimate: Estimate) -> dict[str, float | None]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def _write(path: Path, text: str) -> None:
    """Write beside the place, then rename: a reader finds the old file or the whole new one."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:80]}.", suffix=".part", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp's own mode is closed to others
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _yaml(data: dict[str, Any]) -> str:
    text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return text
