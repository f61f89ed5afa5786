"""The folder of a sweep: rows appear whole, are found again, and are not mixed with those of other code."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

from common import provenance
from common.errors import ConfigurationError, DataError
from simulations import sweep_folder
from simulations.planning import Job
from simulations.rows import Row, load_rows
from simulations.sweep_folder import SweepFolder, as_csv, rooms_digest
from tests.simulations.sweeps import jobs_of, row


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> list[Job]:
    """Three jobs, which nobody runs."""
    return jobs_of(tmp_path_factory.mktemp("jobs"), epsilon=[1, 3, 8])


def mine(job: Job) -> Row:
    """A made-up row of today's code."""
    return row(epsilon=job.epsilon, code_digest=rooms_digest())


def test_finished_rows_are_found_again(jobs: list[Job], tmp_path: Path) -> None:
    """What was stored is there for the next process; the tables keep the order of the jobs, not of the storing."""
    folder = SweepFolder(tmp_path / "out")
    assert folder.resume(jobs, mixed=False) == {}
    folder.store(jobs[2], mine(jobs[2]))
    folder.store(jobs[0], mine(jobs[0]))
    assert set(SweepFolder(tmp_path / "out").resume(jobs, mixed=False)) == {
        jobs[0].file_name,
        jobs[2].file_name,
    }
    assert [found.epsilon for found in load_rows(tmp_path / "out")] == [1.0, 8.0]


def test_rows_of_other_code_are_not_mixed(jobs: list[Job], tmp_path: Path) -> None:
    """A row of another version stops the sweep, unless a person asks to mix; it is never made again in silence."""
    folder = SweepFolder(tmp_path / "out")
    folder.store(jobs[0], row(code_digest="an older version"))
    folder.store(jobs[1], mine(jobs[1]))
    with pytest.raises(ConfigurationError, match=r"1 of its 2 rows are of other code \(an older ver.*--force"):
        folder.resume(jobs, mixed=False)
    assert set(folder.resume(jobs, mixed=True)) == {jobs[0].file_name, jobs[1].file_name}


def test_a_write_that_fails_leaves_what_was_there(
    jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the disk fills before the rename, the old row stays whole and no half one lies beside it."""
    folder = SweepFolder(tmp_path / "out")
    folder.store(jobs[0], row(seed=1))

    def full(_file: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        folder.store(jobs[0], row(seed=2))
    (stored,) = folder.rows.iterdir()
    assert json.loads(stored.read_text())["seed"] == 1


def test_what_a_killed_process_left_is_removed(jobs: list[Job], tmp_path: Path) -> None:
    """A half-written file is no row, and goes when the sweep goes on."""
    folder = SweepFolder(tmp_path / "out")
    (folder.rows / ".half.part").write_text("{")
    assert folder.resume(jobs, mixed=False) == {}
    assert list(folder.rows.iterdir()) == []


def test_a_damaged_row_is_named(jobs: list[Job], tmp_path: Path) -> None:
    """A row that a person or a disk has changed is an error with its path and the remedy."""
    folder = SweepFolder(tmp_path / "out")
    folder.store(jobs[0], mine(jobs[0]))
    (folder.rows / jobs[0].file_name).write_text("{")
    with pytest.raises(DataError, match=rf"{jobs[0].file_name}.*remove the file and run the sweep again"):
        folder.resume(jobs, mixed=False)


def test_another_folder_is_not_taken(tmp_path: Path) -> None:
    """A folder that holds something else is refused, and so is reading one that is no sweep's."""
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigurationError, match="exists and is no sweep"):
        SweepFolder(tmp_path)
    with pytest.raises(ConfigurationError, match="no folder of a sweep"):
        load_rows(tmp_path)


def test_the_csv_has_a_line_per_row_and_site(tmp_path: Path) -> None:
    """Line, settings, epsilon and metrics in columns; no time; what is missing is an empty cell."""
    rows = [row(), row(settings={"model.hidden": 8}, epsilon=None, spent=None, plan=None, line="prevalence")]
    lines = list(csv.DictReader(as_csv(rows).splitlines()))
    assert [(cell["line"], cell["site"]) for cell in lines] == [
        (line, site) for line in ("fedavg-one-step", "prevalence") for site in ("north", "pooled")
    ]
    assert [lines[0][key] for key in ("model.cell", "model.hidden", "epsilon", "auroc_low")] == [
        "gru",
        "",
        "3.0",
        "0.6",
    ]
    assert [lines[2][key] for key in ("model.cell", "model.hidden", "epsilon", "spent")] == ["", "8", "", ""]
    assert not {"seconds", "cpu_seconds"} & set(lines[0])


def test_the_digest_covers_what_numbers_depend_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed line in any room gives another digest; line endings and other files do not."""
    for room in sweep_folder.ROOMS:
        (tmp_path / room).mkdir()
        (tmp_path / room / "a.py").write_bytes(b"x = 1\n")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    first = provenance.code_digest.__wrapped__(sweep_folder.ROOMS)
    (tmp_path / "server" / "notes.md").write_text("y")
    (tmp_path / "server" / "a.py").write_bytes(b"x = 1\r\n")
    assert provenance.code_digest.__wrapped__(sweep_folder.ROOMS) == first
    (tmp_path / "server" / "a.py").write_bytes(b"x = 2\n")
    assert provenance.code_digest.__wrapped__(sweep_folder.ROOMS) != first
