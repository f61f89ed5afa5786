"""UCI heart disease: four real hospitals, one of which never recorded a feature, as a study. Needs the real data."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from common.batching import Dataset
from common.models.network import build_network
from common.schema import SPLITS
from common.study import Study, load_study
from common.training import patient_losses
from common.weights import Weights
from simulations.commands import app
from simulations.experiment import simulate
from simulations.hospitals import Hospitals
from simulations.lines import alone
from simulations.scoring import HeldOut
from simulations.sources import read_sequences

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "uci-heart.yaml"
DATA = Path(os.environ.get("WARDROUND_DATA", ROOT.parent / "shared" / "data")) / "uci-heart" / "meds"
PATIENTS = {"cleveland": 303, "hungarian": 294, "switzerland": 123, "va": 200}
ZURICH, CHOLESTEROL = "switzerland", "chol"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is absent")


@pytest.fixture(scope="module")
def study() -> Study:
    return load_study(CONFIG)


def finite(weights: Weights) -> bool:
    return all(bool(np.isfinite(array).all()) for array in weights.values())


def test_all_patients_are_read_and_one_hospital_never_measured_cholesterol(study: Study) -> None:
    """920 patients of one step; in Zurich cholesterol is not measured once, and its value is the centre everywhere."""
    column = study.features.value_codes.index(CHOLESTEROL)
    for site, patients in PATIENTS.items():
        found = read_sequences(study, DATA / site, SPLITS)
        assert (found.n_patients, found.n_steps) == (patients, patients)
        assert found.measured[:, column].any() == (site != ZURICH)
        assert np.isfinite(found.values).all()
    zurich = read_sequences(study, DATA / ZURICH, SPLITS)
    assert not zurich.values[:, column].any()


def test_every_patient_without_the_feature_has_a_finite_gradient(study: Study) -> None:
    """Not one is silently zeroed: with any starting head, each patient's loss and gradient are numbers and not 0."""
    zurich = Dataset(read_sequences(study, DATA / ZURICH, study.simulation.train), centre_mask=study.model.centre_mask)
    with_random_head = study.model_copy(update={"model": study.model.model_copy(update={"head_start": "random"})})
    for terms in (study, with_random_head):
        network = build_network(terms, 0)
        for patient in range(zurich.n_patients):
            network.zero_grad(set_to_none=True)
            patient_losses(network, zurich.batch(np.array([patient]))).sum().backward()
            gradients = [p.grad for p in network.parameters() if p.grad is not None]
            assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
            assert any(bool(gradient.any()) for gradient in gradients)


@pytest.mark.parametrize("epsilon", [3.0, None])
def test_that_hospital_trains_alone(study: Study, epsilon: float | None) -> None:
    """With noise and without, its rounds give numbers, and risks that rank every hospital's patients."""
    private = study.privacy.model_copy(update={"epsilon": epsilon})
    hospitals = Hospitals(alone(study.model_copy(update={"privacy": private}), ZURICH), {ZURICH: DATA / ZURICH}, 0)
    everybody = HeldOut(Hospitals(study, {site: DATA / site for site in study.sites}, 0))
    result = simulate(hospitals, rounds=20, resamples=10, scored_rounds=0, held_out=everybody)
    assert finite(result.weights)
    assert 0 <= result.score().auroc.value <= 1
    assert [progress.refused for progress in result.history] == [{}] * 20


@pytest.mark.full
def test_the_four_hospitals_run_as_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`wardround simulate run` on the shipped file: every hospital is in the table, also Zurich, whose held-out
    patients are all ill, so that it has no AUROC.
    """
    monkeypatch.setenv("COLUMNS", "160")
    words = ["run", CONFIG, "--data", DATA, "--out", tmp_path / "run"]
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 0, done.output
    lines = {line.split("│")[1].strip(): line for line in done.output.splitlines() if line.startswith("│")}
    assert {*PATIENTS, "pooled"} <= set(lines)
    assert "nan" not in done.output.lower()
