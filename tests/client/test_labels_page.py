"""docs/labels.md: its examples load, and its commands run in their order on a hospital with codes of its own."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from datetime import timedelta
from pathlib import Path

import polars as pl
import pytest
import yaml
from typer.testing import CliRunner

from client.commands import app
from client.mapping import CodeMap
from client.site_file import SiteFile, load_site_file
from common.terms import load, parse
from tests.client.hospitals import write_site, write_study

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "labels.md").read_text(encoding="utf-8")
YAML = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
TASKS = [block for block in YAML if "label" in block]
(LABEL_CODES,) = (block for block in YAML if "label_codes" in block)
(EXAMPLE,) = (block for block in YAML if "codes" in block)


@pytest.fixture
def place(own_process: None, cohort: dict[str, Path], tmp_path: Path) -> Path:
    """North's records with stays, and with `CODE//1` written as `code // 1`; site file and study beside them."""
    shutil.copytree(cohort["north"], tmp_path / "records")
    data = tmp_path / "records" / "data" / "0.parquet"
    events = pl.read_parquet(data).with_columns(pl.col("code").str.replace("^CODE//", "code // "))
    last = events.group_by("subject_id").agg(pl.col("time").max())
    stays = [
        last.select(
            "subject_id",
            pl.col("time") + timedelta(days=days),
            pl.lit(code).alias("code"),
            pl.lit(None, pl.Float32).alias("numeric_value"),
        ).select(events.columns)
        for days, code in (
            (1, "HOSPITAL_ADMISSION//A"),
            (11, "HOSPITAL_DISCHARGE//A"),
            (20, "HOSPITAL_ADMISSION//A"),
            (21, "DIAG//428.0"),
            (22, "HOSPITAL_DISCHARGE//A"),
        )
    ]
    pl.concat([events, *stays]).sort("subject_id", "time", nulls_last=False).write_parquet(data)
    write_study(tmp_path)
    write_site(tmp_path, tmp_path / "records", {"address": "localhost:1", "plaintext": True}, **LABEL_CODES)
    return tmp_path


def run(place: Path, line: str) -> str:
    """One command of the page, with its places moved here."""
    words = shlex.split(line.replace("/etc/wardround", str(place)))
    if words[:2] == ["wardround", "client"]:
        done = CliRunner().invoke(app, words[2:])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done.output
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout


def test_every_example_loads() -> None:
    """Site key, map and five tasks, one of each template."""
    assert {task["label"]["kind"] for task in TASKS} == {
        "death_in_stay",
        "readmission",
        "long_stay",
        "first_code",
        "next_visit",
    }
    parse(EXAMPLE, CodeMap, "page")
    assert set(LABEL_CODES) <= set(SiteFile.model_fields)


def test_the_commands_of_the_page_run(place: Path) -> None:
    """Labels of every template; a map from proposal to `check`, which then knows the codes."""
    commands = iter(COMMANDS)
    line = next(commands)
    for task in TASKS:
        (place / "task.yaml").write_text(yaml.safe_dump(task))
        said = run(place, line)
        assert "labels of" in said, said
    assert {path.stem for path in (place / "records" / "labels").glob("*.parquet")} >= {
        "in_hospital_death",
        "readmission_30d",
        "stay_over_7d",
        "heart_failure_1y",
        "next_visit_heart",
        "next_visit_lung",
    }
    assert "if every entry were confirmed" in run(place, next(commands))
    assert "map.yaml: written" in run(place, next(commands))
    run(place, next(commands).replace("how: parent", "how: exact"))  # what this hospital's map has
    entries = load(place / "map.yaml", CodeMap).codes
    assert entries
    assert all(entry.confirmed for entry in entries)
    site = yaml.safe_load((place / "site.yaml").read_text()) | {"code_map": "map.yaml"}
    (place / "site.yaml").write_text(yaml.safe_dump(site))
    assert load_site_file(place / "site.yaml").code_map == str(place / "map.yaml")
    said = run(place, next(commands))
    assert f"{len(entries)} of {len(entries)} entries of the code map are confirmed" in said
    assert next(commands, None) is None
