"""`wardround simulate run` as a person runs it: real processes, the folder it leaves, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import safetensors.numpy
import yaml

ROOT = Path(__file__).resolve().parents[2]
SITES = ("north", "east")


def wardround(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "wardround", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def small_study(folder: Path, **changes: object) -> Path:
    """A study of two small synthetic sites and four rounds; `a__b=v` changes section a, key b."""
    terms = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    terms["features"] = str(ROOT / "configs" / "features" / "synthetic.yaml")
    terms["sites"] = {site: {"declared_patients": 200} for site in SITES}
    terms["quorum"] = 2
    terms["training"] |= {"rounds": 4}
    terms["simulation"] |= {"cohort_scale": 0.05}
    for path, value in changes.items():
        *sections, key = path.split("__")
        place = terms
        for section in sections:
            place = place[section]
        place[key] = value
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(terms, sort_keys=False))
    return file


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One finished run: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    done = wardround("simulate", "run", small_study(folder), "--out", folder / "out", "--lines", "logistic,alone")
    assert done.returncode == 0, done.stderr
    return folder / "out", done.stdout


def table_of(out: Path) -> object:
    """The result table as data."""
    return json.loads((out / "run.json").read_text())["table"]


def test_prints_table_and_stamp(finished: tuple[Path, str]) -> None:
    """The last table names every site with declared patients, epsilon, AUROC, best possible; the stamp follows."""
    out, printed = finished
    for site in (*SITES, "pooled"):
        assert re.search(rf"{site}\W+\d+\W+3\.000\W+0?\.\d+ \[0?\.\d+, 0?\.\d+\]\W+0?\.\d+", printed), printed
    assert re.search(r"round 4/4  AUROC 0\.\d+  epsilon so far: \d\.\d\d at each of 2 sites", printed), printed
    assert "these weights are not private" in printed
    assert "logistic" in printed
    assert "alone" in printed
    assert str(out) in printed.replace("\n", "")


def test_folder_holds_the_evidence(finished: tuple[Path, str]) -> None:
    """The run folder holds the study, a line per round, weights, predictions in MEDS columns, a figure and versions."""
    out, _ = finished
    assert {"study.yaml", "run.json", "metrics.jsonl", "weights.safetensors", "predictions.parquet", "rounds.png"} <= {
        path.name for path in out.iterdir()
    }
    assert [json.loads(line)["round"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    predictions = pl.read_parquet(out / "predictions.parquet")
    assert {"subject_id", "prediction_time", "boolean_value", "predicted_boolean_probability"} <= set(
        predictions.columns
    )
    assert predictions["predicted_boolean_probability"].is_between(0, 1).all()
    assert (out / "rounds.png").read_bytes().startswith(b"\x89PNG")


def test_weights_load_into_plain_torch(finished: tuple[Path, str]) -> None:
    """Final weights carry torch.nn's own parameter names."""
    names = set(safetensors.numpy.load_file(finished[0] / "weights.safetensors"))
    assert names == {
        "embedding.weight",
        *(f"recurrence.{kind}_l0" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")),
        "head.weight",
        "head.bias",
    }


def test_same_seed_same_table_any_workers(finished: tuple[Path, str], tmp_path: Path) -> None:
    """A run repeated from the study in its own folder, with two worker processes, gives the same table and weights."""
    out, _ = finished
    done = wardround("simulate", "run", out / "study.yaml", "--out", tmp_path / "again", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert table_of(tmp_path / "again") == table_of(out)
    assert (tmp_path / "again" / "weights.safetensors").read_bytes() == (out / "weights.safetensors").read_bytes()


def test_another_seed_another_table(finished: tuple[Path, str], tmp_path: Path) -> None:
    """--seed changes patients, sampling and noise, and is written into the folder's study."""
    done = wardround("simulate", "run", small_study(tmp_path), "--out", tmp_path / "out", "--seed", "7")
    assert done.returncode == 0, done.stderr
    assert table_of(tmp_path / "out") != table_of(finished[0])
    assert yaml.safe_load((tmp_path / "out" / "study.yaml").read_text())["simulation"]["seed"] == 7


def test_without_noise_is_said(tmp_path: Path) -> None:
    """A run without noise prints no epsilon and says that it has no privacy."""
    done = wardround("simulate", "run", small_study(tmp_path), "--out", tmp_path / "out", "--epsilon", "none")
    assert done.returncode == 0, done.stderr
    assert "no privacy" in done.stdout
    assert table_of(tmp_path / "out")[0]["epsilon"] is None  # type: ignore[index]  # a list of rows


BAD_STUDIES: dict[str, tuple[dict[str, object], str]] = {
    "unknown key": ({"privacy__epsilonn": 3}, "epsilonn.*did you mean `epsilon`"),
    "epsilon zero": ({"privacy__epsilon": 0}, "privacy.epsilon.*greater than 0"),
    "epsilon negative": ({"privacy__epsilon": -1}, "privacy.epsilon.*greater than 0"),
    "delta too large": ({"privacy__delta": 0.01}, "delta = 0.01 must be < 0.005"),
    "q above 1": ({"privacy__sampling_rate": 1.5}, "sampling_rate.*less than or equal to 1"),
    "quorum": ({"quorum": 3}, "quorum = 3 must be <= 2"),
    "unknown cohort": ({"simulation__cohort": "huge"}, "cohort = huge: known are"),
    "unknown site": ({"sites__nowhere": {"declared_patients": 9}}, "`nowhere` is not in cohort"),
    "missing features": ({"features": "nothing.yaml"}, "nothing.yaml: no such file"),
    "no records": ({"simulation__cohort": None}, "pass --data FOLDER"),
    "cuda": ({"device": "cuda"}, "device: cuda, but torch finds no CUDA"),
}


@pytest.mark.parametrize("name", BAD_STUDIES)
def test_bad_study_is_one_clear_error(name: str, tmp_path: Path) -> None:
    """A study that cannot be run ends with one line naming value, bound and remedy, status 2, and nothing written."""
    import torch

    if name == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    changes, expected = BAD_STUDIES[name]
    done = wardround("simulate", "run", small_study(tmp_path, **changes), "--out", tmp_path / "out")
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert re.search(expected, lines[0]), lines[0]
    assert not (tmp_path / "out").exists()


def test_existing_folder_is_kept(tmp_path: Path) -> None:
    """A run never writes into a folder that holds something."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    done = wardround("simulate", "run", small_study(tmp_path), "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "not empty" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def broken(records: Path, fault: str) -> None:
    """Put one fault into site north of a folder of MEDS directories."""
    site = records / "north"
    data, label = site / "data" / "0.parquet", site / "labels" / "diagnosis.parquet"
    events, labels = pl.read_parquet(data), pl.read_parquet(label)
    match fault:
        case "no patient id":
            events.drop("subject_id").write_parquet(data)
        case "wrong type":
            events.with_columns(pl.col("time").cast(pl.String)).write_parquet(data)
        case "missing column":
            events.drop("code").write_parquet(data)
        case "two splits":
            splits = pl.read_parquet(site / "metadata" / "subject_splits.parquet")
            both = splits.head(1).with_columns(split=pl.lit("tuning"))
            pl.concat([splits, both]).write_parquet(site / "metadata" / "subject_splits.parquet")
        case "labels without events":
            events.filter(pl.col("subject_id") != labels["subject_id"][0]).write_parquet(data)
        case "one class":
            labels.with_columns(boolean_value=pl.lit(False)).write_parquet(label)
        case "all features missing":
            events.with_columns(code=pl.lit("SOMETHING//ELSE")).write_parquet(data)
        case "prediction before events":
            early = pl.col("prediction_time") - pl.duration(days=10_000)
            labels.with_columns(prediction_time=early).write_parquet(label)
        case "infinite value":
            worse = pl.when(pl.col("numeric_value").is_not_null()).then(pl.lit(float("inf")))
            events.with_columns(numeric_value=worse.otherwise(None).cast(pl.Float32)).write_parquet(data)
        case "empty site":
            labels.clear().write_parquet(label)
        case "nobody held out":
            splits = pl.read_parquet(site / "metadata" / "subject_splits.parquet")
            everyone = splits.with_columns(split=pl.lit("train").cast(splits.schema["split"]))
            everyone.write_parquet(site / "metadata" / "subject_splits.parquet")


BAD_RECORDS = {
    "no patient id": "subject_id",
    "wrong type": "time",
    "missing column": "code",
    "two splits": "split",
    "labels without events": "label",
    "one class": "both classes",
    "all features missing": "code",
    "prediction before events": "prediction",
    "infinite value": "numeric_value",
    "empty site": "patients|label",
    "nobody held out": "held_out",
}


@pytest.fixture(scope="module")
def records(finished: tuple[Path, str]) -> Path:
    """A folder with one MEDS directory per site."""
    return finished[0] / "cohort"


@pytest.mark.parametrize("fault", BAD_RECORDS)
def test_bad_records_are_one_clear_error(fault: str, records: Path, tmp_path: Path) -> None:
    """Records that cannot be used end with one line naming file and remedy, no patient's id, nothing written."""
    shutil.copytree(records, tmp_path / "records")
    broken(tmp_path / "records", fault)
    study = small_study(tmp_path, simulation__cohort=None)
    done = wardround("simulate", "run", study, "--data", tmp_path / "records", "--out", tmp_path / "out")
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert "north" in lines[0]
    assert re.search(BAD_RECORDS[fault], lines[0]), lines[0]
    ids = pl.read_parquet(records / "north" / "labels" / "diagnosis.parquet")["subject_id"]
    assert not {str(i) for i in ids} & set(re.findall(r"\d{5,}", lines[0]))
    assert not (tmp_path / "out").exists()


def test_records_without_a_split_file_are_split_by_patient(records: Path, tmp_path: Path) -> None:
    """Sites without metadata/subject_splits.parquet are split by a keyed hash of the patient id, and run."""
    shutil.copytree(records, tmp_path / "records")
    for site in SITES:
        (tmp_path / "records" / site / "metadata" / "subject_splits.parquet").unlink()
    study = small_study(tmp_path)  # names a synthetic cohort, which --data takes the place of
    done = wardround("simulate", "run", study, "--data", tmp_path / "records", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "research mode: the data were treated as public" in done.stdout
    scored = len(pl.read_parquet(tmp_path / "out" / "predictions.parquet"))
    labelled = sum(len(pl.read_parquet(records / site / "labels" / "diagnosis.parquet")) for site in SITES)
    assert 0.05 * labelled < scored < 0.3 * labelled  # 15 % are held out
