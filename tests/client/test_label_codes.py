"""`wardround client label` with code sets: the task's codes, the site's codes, and the map between them."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from typer.testing import CliRunner

from client.commands import app
from client.labels.terms import TaskFile
from client.readers.meds import MedsDirectory
from common.errors import ConfigurationError
from common.terms import parse
from tests.client.hospitals import write_site, write_study

START = datetime(2020, 1, 1)
CODES = {"admission": ["IN"], "discharge": ["OUT"], "observed_until": "2021-01-01"}
FIRST = {"kind": "first_code", "codes": ["DIAG//{428,402}*"], "within_days": 30}
NEXT = {"kind": "next_visit", "sets": {"heart": ["DIAG//428*"], "lung": ["DIAG//490", "DIAG//491"]}}
STAYS = [(who, hour, code) for who in range(1, 7) for hour, code in ((0, "IN"), (10, "OUT"), (50, "IN"), (60, "OUT"))]


@pytest.fixture
def site(own_process: None, tmp_path: Path) -> Path:
    (tmp_path / "records" / "data").mkdir(parents=True)
    write_study(tmp_path)
    return tmp_path


def write_events(site: Path, events: list[tuple[int, int | None, str]]) -> None:
    rows = [(who, None if hour is None else at(hour), code, None) for who, hour, code in [*STAYS, *events]]
    kinds = {"subject_id": pl.Int64, "time": pl.Datetime("us"), "code": pl.String, "numeric_value": pl.Float32}
    pl.DataFrame(rows, schema=kinds, orient="row").write_parquet(site / "records" / "data" / "0.parquet")


def at(hour: float) -> datetime:
    return START + timedelta(hours=hour)


def label(site: Path, terms: dict[str, Any], **changes: Any) -> str:
    """Output of the command; errors of ours are raised."""
    (site / "task.yaml").write_text(yaml.safe_dump({"version": 1, "name": "task", "label": terms}))
    path = write_site(
        site, site / "records", {"address": "localhost:1", "plaintext": True}, label_codes=CODES, **changes
    )
    done = CliRunner().invoke(app, ["label", str(site / "task.yaml"), str(path)])
    if done.exception is not None:
        raise done.exception
    return done.output


def positives(site: Path, name: str = "task") -> dict[int, bool]:
    """Patient -> answer of the first stay."""
    rows = MedsDirectory(site / "records").labels(name).filter(pl.col("prediction_time") == at(10))
    return dict(rows.select("subject_id", "boolean_value").iter_rows())


def test_a_first_code_by_beginning_braces_and_map(site: Path) -> None:
    """The set's own codes, finer ones and mapped ones count; who had one before, or always, has no row."""
    events = [
        (1, 20, "DIAG//428.0"),
        (2, 20, "OURS//HF"),
        (3, 20, "DIAG//250"),
        (4, 5, "OURS//HF"),
        (5, None, "DIAG//402"),
        (6, 20, "OURS//OPEN"),
    ]
    write_events(site, events)
    entries = [
        {"site": "OURS//HF", "study": "DIAG//428", "confirmed": True},
        {"site": "OURS//OPEN", "study": "DIAG//428"},
    ]
    (site / "map.yaml").write_text(yaml.safe_dump({"version": 1, "labels": entries}))
    said = label(site, FIRST, code_map="map.yaml")
    assert positives(site) == {1: True, 2: True, 3: False, 6: False}
    assert "4 labels of 4 patients, 2 positive" in said
    assert "left out: 2 stays of patients who had a code of the set before" in said


def test_a_mapped_code_is_no_longer_what_it_was(site: Path) -> None:
    """A site's code that looks like one of the set, but is mapped to another, does not count."""
    write_events(site, [(1, 20, "DIAG//428"), (2, 20, "DIAG//428.1")])
    entries = [{"site": "DIAG//428", "study": "CODE//1", "confirmed": True}]
    (site / "map.yaml").write_text(yaml.safe_dump({"version": 1, "codes": entries}))
    label(site, FIRST, code_map="map.yaml")
    assert positives(site) == {1: False, 2: True, 3: False, 4: False, 5: False, 6: False}


def test_the_sites_own_words_are_not_mapped(site: Path) -> None:
    """Admissions are found by the site's codes, also if the study reads them under another name."""
    write_events(site, [(1, 20, "DIAG//428")])
    entries = [{"site": "IN", "study": "CODE//1", "confirmed": True}]
    (site / "map.yaml").write_text(yaml.safe_dump({"version": 1, "codes": entries}))
    assert "6 labels of 6 patients, 1 positive" in label(site, FIRST, code_map="map.yaml")


def test_several_labels_are_several_files(site: Path) -> None:
    """One file a set, with the same patients and times; each is a task that a study can read."""
    write_events(site, [(1, 55, "DIAG//428.9"), (2, 55, "DIAG//490"), (3, 55, "DIAG//490"), (3, 55, "DIAG//428")])
    said = label(site, NEXT)
    assert MedsDirectory(site / "records").tasks == ["task_heart", "task_lung"]
    heart, lung = positives(site, "task_heart"), positives(site, "task_lung")
    assert list(heart) == list(lung)
    assert [who for who, answer in heart.items() if answer] == [1, 3]
    assert [who for who, answer in lung.items() if answer] == [2, 3]
    assert "left out: 6 stays after which no other is seen" in said
    with pytest.raises(ConfigurationError, match=r"task_heart\.parquet: exists and is not overwritten"):
        label(site, NEXT)


def test_a_folder_of_labels_is_not_doubled(site: Path) -> None:
    """Where ACES' folder of a task lies, no file is written beside it."""
    write_events(site, [(1, 20, "DIAG//428")])
    (site / "records" / "labels" / "task").mkdir(parents=True)
    with pytest.raises(ConfigurationError, match="labels/task: exists and is not overwritten"):
        label(site, FIRST)


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        (FIRST | {"codes": ["*"]}, "stands for every code"),
        (FIRST | {"codes": []}, "at least 1 item"),
        (FIRST | {"codes": ["A{1"]}, "brace"),
        (FIRST | {"after_hours": 3}, "after_hours goes with `predict: admission`"),
        (FIRST | {"within_days": 1, "grace_hours": 24}, "grace_hours = 24 must be < 24"),
        (NEXT | {"sets": {}}, "at least 1 item"),
        (NEXT | {"sets": {"Heart": ["A"]}}, "sets"),
        (NEXT | {"sets": {"x" * 60: ["A"]}}, "65 characters, at most 64"),
        ({"kind": "long_stay", "over_days": 2, "after_hours": 48}, "after_hours = 48 must be < 48"),
    ],
)
def test_a_task_that_cannot_be_meant_is_refused(terms: dict[str, Any], expected: str) -> None:
    """Each limit, with what to do."""
    with pytest.raises(ConfigurationError, match=expected):
        parse({"version": 1, "name": "task", "label": terms}, TaskFile, "task.yaml")
