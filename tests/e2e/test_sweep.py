"""`wardround simulate sweep` as a person runs it: killed, continued, refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from simulations.rows import Row, load_rows
from tests.simulations.sweeps import GROUPS, ROOT, small_sweep

pytestmark = pytest.mark.full  # a minute of whole sweeps

LINES = ["best-possible", "fedavg-one-step", "logistic", "alone", "prevalence"]
ROWS = 2 * (1 + 2 + 2 + 2 + 1)  # two seeds; lines over epsilon at 3 and none, alone at 3 for two sites


def begin(sweep: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "wardround", "simulate", "sweep", sweep, "--out", out, *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Its status, and what it printed."""
    out, err = process.communicate(timeout=500)
    return process.returncode, out, err


def sweep_in(folder: Path, **changes: Any) -> Path:
    return small_sweep(folder, lines=LINES, epsilon=[3, "none"], seeds=[0, 1], subgroups=GROUPS, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An uninterrupted sweep: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("sweep")
    status, printed, error = end(begin(sweep_in(folder), folder / "out", "--workers", "2"))
    assert status == 0, error
    return folder / "out", printed


def without_times(out: Path) -> list[dict[str, Any]]:
    """results.json, without the only numbers that may differ."""
    return [Row.from_json(row).identity() for row in json.loads((out / "results.json").read_text())]


def test_killed_and_continued_it_ends_at_the_same_table(finished: tuple[Path, str], tmp_path: Path) -> None:
    """Killed with -9 after the fifth row and started again, a sweep makes the other rows only; its table is equal to
    that of the uninterrupted one, byte for byte, which was run with another number of processes.
    """
    out, _ = finished
    sweep = sweep_in(tmp_path)
    process = begin(sweep, tmp_path / "out")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("[5/"):
            break
    os.kill(process.pid, signal.SIGKILL)
    end(process)
    kept = {path.name: path.read_bytes() for path in (tmp_path / "out" / "rows").glob("*.json")}
    assert 5 <= len(kept) < ROWS
    assert not (tmp_path / "out" / "results.csv").exists()
    assert [row.identity() for row in load_rows(tmp_path / "out")] == without_times(out)[: len(kept)]

    status, printed, error = end(begin(sweep, tmp_path / "out"))
    assert status == 0, error
    assert f"{len(kept)} are there, {ROWS - len(kept)} to run" in printed
    assert {name: (tmp_path / "out" / "rows" / name).read_bytes() for name in kept} == kept
    assert (tmp_path / "out" / "results.csv").read_bytes() == (out / "results.csv").read_bytes()
    assert without_times(tmp_path / "out") == without_times(out)


def test_the_table_and_what_must_be_said(finished: tuple[Path, str]) -> None:
    """The table has every line; mean and deviation; the unit, delta and the stamp follow."""
    out, printed = finished
    for line in ("best-possible", "fedavg-one-step", "logistic", "alone: east", "alone: north", "prevalence"):
        assert line in printed
    assert "0.500 ± 0.000" in printed
    assert "per patient and site, add or remove one, delta 1e-05" in printed
    assert "these weights are not private" in printed
    assert len(without_times(out)) == ROWS


def test_other_code_is_not_mixed(finished: tuple[Path, str], tmp_path: Path) -> None:
    """A folder with a row of other code is refused with status 2, one line and the way out."""
    out, _ = finished
    sweep = sweep_in(tmp_path)
    (tmp_path / "out" / "rows").mkdir(parents=True)
    for number, path in enumerate(sorted((out / "rows").iterdir())):
        row = json.loads(path.read_text())
        row["code_digest"] = "0" * 64 if number == 0 else row["code_digest"]
        (tmp_path / "out" / "rows" / path.name).write_text(json.dumps(row))
    status, _, error = end(begin(sweep, tmp_path / "out"))
    assert (status, error.count("\n")) == (2, 1)
    assert "1 of its 16 rows are of other code (000000000000" in error
    assert "--force" in error


def test_what_cannot_run_leaves_nothing(tmp_path: Path) -> None:
    """A sweep that is wrong is one line and status 2; the folder is free for the corrected one."""
    status, _, error = end(begin(sweep_in(tmp_path, grid={"model.hiden": [3]}), tmp_path / "out"))
    assert (status, error.count("\n")) == (2, 1)
    assert "model.hiden" in error
    assert not list((tmp_path / "out").rglob("*.json"))
