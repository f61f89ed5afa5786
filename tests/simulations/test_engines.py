"""Jobs here, beside and on Ray: the same rows, the same errors, nothing left behind."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import ConfigurationError, DataError, WardroundError
from simulations import engines
from simulations.engines import attempt, run_jobs
from simulations.planning import Job
from simulations.rows import Row
from tests.simulations.sweeps import ROOT, jobs_of, small_sweep

SECRET = "PATIENT-4711"


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> list[Job]:
    """Three quick jobs."""
    return jobs_of(tmp_path_factory.mktemp("jobs"), lines=["fedavg-one-step", "logistic", "prevalence"])


@pytest.fixture(scope="module")
def here(jobs: list[Job]) -> dict[str, Row]:
    """Their rows in this process, by line."""
    return {job.line.name: row for job, row in run_jobs(jobs, "code") if isinstance(row, Row)}


def lost(job: Job) -> Job:
    """The job with its records gone."""
    gone = dict.fromkeys(job.setup.directories, Path("/nowhere"))
    return replace(job, setup=replace(job.setup, directories=gone))


@pytest.mark.full
def test_processes_give_the_rows_of_this_one(jobs: list[Job], here: dict[str, Row]) -> None:
    """Rows from two processes are equal to those from one; a job that fails is an answer and ends nothing."""
    answers = dict(run_jobs_by_name([*jobs, lost(jobs[0])], workers=2))
    failed = answers.pop("fedavg-one-step lost")
    assert isinstance(failed, WardroundError)
    assert {name: row.identity() for name, row in answers.items() if isinstance(row, Row)} == {
        name: row.identity() for name, row in here.items()
    }
    assert multiprocessing.active_children() == []


def run_jobs_by_name(jobs: list[Job], *, workers: int) -> list[tuple[str, engines.Answer]]:
    """Answers with the job's line, and whether its records were lost."""
    return [
        (job.line.name + (" lost" if Path("/nowhere") in job.setup.directories.values() else ""), answer)
        for job, answer in run_jobs(jobs, "code", workers=workers)
    ]


def test_a_process_that_is_killed_is_an_error(jobs: list[Job]) -> None:
    """A process that the system kills is named with the remedy, and the others are ended."""
    answers = run_jobs(jobs * 4, "code", workers=2)
    next(answers)
    for child in multiprocessing.active_children():
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(WardroundError, match=r"the process of `.*` ended; .* use fewer --workers"):
        list(answers)
    assert multiprocessing.active_children() == []


@pytest.mark.full
def test_who_stops_listening_ends_the_processes(jobs: list[Job]) -> None:
    """Ctrl-C in the middle leaves no process behind."""
    answers = run_jobs(jobs, "code", workers=2)
    next(answers)
    answers.close()
    assert multiprocessing.active_children() == []


def test_no_text_of_an_error_gets_out(jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    """An unforeseen failure is told by class and place alone; one of ours keeps its line."""

    def fail(_job: Job, _code: str) -> Row:
        raise ValueError(f"cannot convert {SECRET}")

    monkeypatch.setattr(engines, "run_job", fail)
    answer = attempt(jobs[0], "code")
    assert isinstance(answer, WardroundError)
    assert SECRET not in str(answer)
    assert "ValueError at" in str(answer)

    def refuse(_job: Job, _code: str) -> Row:
        raise DataError("3 rows")

    monkeypatch.setattr(engines, "run_job", refuse)
    assert str(attempt(jobs[0], "code")) == "3 rows"


def test_without_ray_the_remedy_is_named(jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing Ray is one line that says what to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'wardround\[ray\]'"):
        list(run_jobs(jobs, "code", engine="ray"))


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra `ray`)")
def test_ray_gives_the_same_table(tmp_path: Path) -> None:
    """The same sweep as Ray tasks gives the same table and rows as here."""
    file = small_sweep(tmp_path, lines=["fedavg-one-step", "logistic"], epsilon=[3, "none"])
    for name in ("local", "ray"):
        command = [sys.executable, "-m", "wardround", "simulate", "sweep", file, "--engine", name]
        done = subprocess.run(
            [*command, "--out", tmp_path / name], cwd=ROOT, capture_output=True, text=True, timeout=500, check=False
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "ray" / "results.csv").read_bytes() == (tmp_path / "local" / "results.csv").read_bytes()
    local, ray = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("local", "ray"))
    assert [Row.from_json(row).identity() for row in ray] == [Row.from_json(row).identity() for row in local]
