"""`wardround simulate report` on the folder of a sweep."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from common.errors import ConfigurationError
from common.study import load_study
from simulations.commands import app
from simulations.rows import Row
from tests.simulations.example_rows import example_rows

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def sweep_folder(folder: Path, rows: Sequence[Row], **study: object) -> Path:
    """A folder as `wardround simulate sweep` leaves it."""
    (folder / "rows").mkdir(parents=True)
    names = [f"row-{number}.json" for number in range(len(rows))]
    for name, row in zip(names, rows, strict=True):
        (folder / "rows" / name).write_text(json.dumps(row.to_json()), encoding="utf-8")
    (folder / "jobs.json").write_text(json.dumps([*names, "not-yet.json"]), encoding="utf-8")
    terms = load_study(CONFIGS / "demo.yaml").model_dump(mode="json") | study
    (folder / "study.yaml").write_text(yaml.safe_dump(terms), encoding="utf-8")
    sweep = {"version": 1, "name": "demo", "study": "../demo.yaml", "lines": ["naive"], "epsilon": [1.0], "seeds": [0]}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep), encoding="utf-8")
    return folder


def report(*arguments: str | Path) -> str:
    """Run the command; what it prints."""
    done = CliRunner().invoke(app, ["report", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_report_of_a_folder_names_its_study_and_how_to_make_it_again(tmp_path: Path) -> None:
    """The page has the study's name and task, and files and commands that alone make the sweep again."""
    out = sweep_folder(tmp_path / "out", example_rows())
    assert re.search(r"report of \d+ runs written to", report(out))
    data = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert data["title"] == "Study “demo”: accuracy and privacy"
    listings = {b["caption"]: b["text"] for b in data["sections"][-1]["blocks"] if "listing" in b}
    command, sweep, study = listings.values()
    assert command.splitlines()[1:] == [
        "wardround simulate sweep sweep.yaml --out runs/again-sweep",
        "wardround simulate report runs/again-sweep",
    ]
    (tmp_path / "study.yaml").write_text(study, encoding="utf-8")
    assert load_study(tmp_path / "study.yaml") == load_study(CONFIGS / "demo.yaml")
    assert yaml.safe_load(sweep)["study"] == "study.yaml"
    assert len(study.splitlines()) < 150


def test_further_sweeps_of_the_study_stand_on_the_same_page(tmp_path: Path) -> None:
    """`--with` adds the runs of a second sweep; its files and commands are on the page too."""
    rows = example_rows()
    out = sweep_folder(tmp_path / "out", [row for row in rows if not row.settings])
    more = sweep_folder(tmp_path / "more", [row for row in rows if row.settings])
    report(out, "--to", tmp_path / "plain")
    report(out, "--with", more, "--to", tmp_path / "both")
    plain, both = ((tmp_path / name / "report.json").read_text(encoding="utf-8") for name in ("plain", "both"))
    assert "weightings-data" not in plain
    assert "weightings-data" in both
    assert "wardround simulate report runs/again-sweep-1 --with runs/again-sweep-2" in both


def test_sweeps_of_different_studies_are_not_mixed(tmp_path: Path) -> None:
    """A second folder of another study is refused."""
    out = sweep_folder(tmp_path / "out", example_rows(1))
    more = sweep_folder(tmp_path / "more", example_rows(1), name="other")
    with pytest.raises(ConfigurationError, match="another study than in"):
        report(out, "--with", more)


def test_what_is_no_sweep_is_said(tmp_path: Path) -> None:
    """A folder without rows is one clear error, and nothing is written."""
    with pytest.raises(ConfigurationError, match="no folder of a sweep"):
        report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_real_records_need_their_folder_to_be_named_again(tmp_path: Path) -> None:
    """In research mode the command to make the runs again asks for --data."""
    out = sweep_folder(tmp_path / "out", [replace(row, research_mode=True) for row in example_rows(1)])
    report(out)
    assert "sweep.yaml --data FOLDER --out" in (out / "report.html").read_text(encoding="utf-8")
    assert "Research mode" in (out / "report.html").read_text(encoding="utf-8")
