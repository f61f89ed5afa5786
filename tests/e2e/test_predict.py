"""A study is trained, its weights go to a hospital, which predicts: the same numbers as everywhere else.

Then the commands of docs/predict.md, in their order, with the page's places moved into the test's folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score
from typer.testing import CliRunner

from client.commands import app
from client.state import StateFolder
from common.models.network import build_network
from common.study import Study, load_study
from common.training import load_state
from common.weights import Weights, to_bytes
from simulations.experiment import predictions_table, train
from simulations.hospitals import Hospitals
from simulations.rows import SiteRow
from simulations.scoring import HeldOut, score_sites
from tests.client.prediction.predicting import SERVER, Desk
from tests.e2e.deployment import ROOT, write_study

ROUNDS, RESAMPLES = 10, 50
DECLARED = {"north": 80, "east": 50, "south": 30, "west": 16}


@pytest.fixture(autouse=True)
def own_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a command sets for its process is put back."""
    for variable in ("FLWR_HOME", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(variable, "")
    umask = os.umask(0o022)
    yield
    os.umask(umask)


@dataclass
class Finished:
    """A study after its last round, as the simulation knows it."""

    study: Path
    terms: Study
    weights: Weights
    scores: dict[str, SiteRow]
    predictions: pl.DataFrame


@pytest.fixture(scope="module")
def finished(cohort: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The demo's study over four tiny hospitals, ten private rounds."""
    path = write_study(
        tmp_path_factory.mktemp("terms") / "study.yaml",
        DECLARED,
        quorum=4,
        model={"hidden": 8, "embedding": 4},
        training={"rounds": ROUNDS},
    )
    study = load_study(path)
    hospitals = Hospitals(study, cohort, seed=2)
    weights = train(hospitals)
    network, held_out = build_network(study), HeldOut(hospitals)
    load_state(network, weights)
    risk = held_out.probabilities(network)
    scores = {row.site: row for row in score_sites(study, held_out, risk, RESAMPLES)}
    return Finished(path, study, weights, scores, predictions_table(held_out, risk))


@pytest.mark.parametrize("site", ["north", "south"])
def test_a_hospital_sees_what_the_study_saw(
    finished: Finished, cohort: dict[str, Path], tmp_path: Path, site: str
) -> None:
    """Predictions, AUROC, AUPRC and Brier with their intervals are the simulation's; scikit-learn agrees."""
    (tmp_path / "w.safetensors").write_bytes(to_bytes(finished.weights))
    StateFolder(tmp_path / "state", create=True)
    desk = Desk(tmp_path, cohort[site], finished.terms, tmp_path / "w.safetensors")
    found = desk.predict("--resamples", RESAMPLES, site=site, study=str(finished.study))
    simulated = finished.predictions.filter(pl.col("site") == site).drop("site")
    keys = ["subject_id", "prediction_time", "boolean_value"]
    assert found.select(keys).equals(simulated.select(keys))
    label, risk = found["boolean_value"].to_numpy(), found["predicted_boolean_probability"].to_numpy()
    assert np.abs(risk - simulated["predicted_boolean_probability"].to_numpy()).max() <= 1e-6
    assert np.std(risk) > 0.01  # something was learned
    table = desk.table("scores-table")
    for measure, row, reference in (
        ("AUROC", finished.scores[site].auroc, roc_auc_score),
        ("AUPRC", finished.scores[site].auprc, average_precision_score),
        ("Brier score", finished.scores[site].brier, brier_score_loss),
    ):
        cell = table[measure][0]
        assert cell["value"] == pytest.approx(reference(label, risk), abs=1e-12)
        assert (cell["value"], cell["low"], cell["high"]) == pytest.approx((row.value, row.low, row.high), abs=1e-6)


def page_commands() -> list[list[str]]:
    """The `wardround client` and `sha256sum` commands of docs/predict.md, in their order."""
    text = (ROOT / "docs" / "predict.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines() if line]


def test_the_commands_of_the_page_run(finished: Finished, cohort: dict[str, Path], tmp_path: Path) -> None:
    """Each command of docs/predict.md ends well and writes what the page says, with the page's own file of groups."""
    etc, srv = tmp_path / "etc" / "wardround", tmp_path / "srv" / "wardround"
    etc.mkdir(parents=True)
    srv.mkdir(parents=True)
    shutil.copytree(cohort["north"], srv / "meds")
    site = {"version": 1, "site": "north", "study": str(finished.study), "records": str(srv / "meds"), "server": SERVER}
    more: dict[str, Any] = {"policy": {"max_epsilon": 3.0, "delta": 1e-5}, "state": str(srv / "state")}
    (etc / "site.yaml").write_text(yaml.safe_dump(site | more))
    StateFolder(srv / "state", create=True)
    desk = Desk(srv, srv / "meds", finished.terms, srv / "weights.safetensors")
    desk.weights.write_bytes(to_bytes(finished.weights))
    desk.some_tune()
    desk.labels_by_risk(
        study=str(finished.study)
    )  # of the tiny cohort's tuning patients too few have the diagnosis for a recalibration
    labels = pl.read_parquet(srv / "meds" / "labels" / "diagnosis.parquet")
    labels.head(7).drop("boolean_value").write_parquet(srv / "today.parquet")

    ran = 0
    for words in page_commands():
        moved = [re.sub(r"^/(etc|srv)/wardround", lambda place: f"{tmp_path}{place.group()}", word) for word in words]
        if words[0] == "sha256sum":
            printed = hashlib.sha256(Path(moved[1]).read_bytes()).hexdigest()
            continue
        assert words[:2] == ["wardround", "client"]
        done = CliRunner().invoke(app, moved[2:], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        ran += 1
    assert ran == 4
    assert desk.table("facts", "predictions")["weights, sha256 of the file"][0]["text"] == printed
    assert len(pl.read_parquet(srv / "today" / "predictions.parquet")) == 7
    assert not (srv / "today" / "evaluation.html").exists()
    plain, local = (((srv / name / "evaluation.json").read_text()) for name in ("predictions", "recalibrated"))
    assert plain != local

    text = (ROOT / "docs" / "predict.md").read_text(encoding="utf-8")
    (tmp_path / "groups.yaml").write_text(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])
    words = [
        "predict",
        str(etc / "site.yaml"),
        "--weights",
        str(desk.weights),
        "--groups",
        str(tmp_path / "groups.yaml"),
    ]
    done = CliRunner().invoke(app, [*words, "--out", str(srv / "by-groups")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "heart failure: recorded" in desk.table("groups-table", "by-groups")
