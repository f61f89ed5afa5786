"""A study that asks for metrics, on the real command line: one hospital tells them, one does not; asked twice.

Noise is the real one. What the server writes is compared with what the hospitals' own records and the final weights
give, which nobody but this test puts together.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.readers.meds import read
from client.scoring import scores_one_by_one
from common.batching import Dataset
from common.models.network import build_network
from common.schema import HELD_OUT, TRAIN
from common.score_histogram import histogram
from common.study import Study, load_study
from common.training import load_state
from common.weights import from_bytes
from tests.e2e.deployment import Hospital, Server, budgets, deployed, write_study

pytestmark = pytest.mark.full  # a dozen processes that load torch; the parts are tested one by one

DECLARED = {"north": 80, "east": 50}
TELLING = ("north",)
NOISE, BINS, ROUNDS = 2.0, 6, 3


@dataclass
class Told:
    """What was said and written, the first time and asked again."""

    study: Study
    enrolments: dict[str, str]
    printed: str
    first: dict[str, Any]
    second: dict[str, Any]
    before: dict[str, dict[str, Any]]
    after: dict[str, dict[str, Any]]
    shown: str
    logs: dict[str, str]
    weights: Path


@pytest.fixture(scope="module")
def told(cohort: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    root = tmp_path_factory.mktemp("metrics") / "d"
    study = write_study(
        root.parent / "terms" / "study.yaml",
        DECLARED,
        quorum=2,
        model={"hidden": 8, "embedding": 4},
        training={"rounds": ROUNDS},
        metrics={"noise_multiplier": NOISE, "bins": BINS},
    )
    budget = {"max_epsilon": 5.0, "delta": 1e-5}
    with deployed(root) as deployment:
        server = Server(deployment, study)
        hospitals = [
            Hospital(
                deployment,
                site,
                cohort[site],
                server,
                policy=budget | ({"min_metrics_noise": NOISE} if site in TELLING else {}),
            )
            for site in DECLARED
        ]
        serving = server.run()
        for hospital in hospitals:
            hospital.keygen()
            server.admit(hospital)
        enrolling = [(hospital.site, hospital.enrol()) for hospital in hospitals]
        enrolments = {site: running.finish() for site, running in enrolling}
        taking_part = [hospital.run() for hospital in hospitals]
        printed = serving.finish()
        first, before = json.loads((server.path / "evaluation.json").read_text()), budgets(hospitals)
        server.run("--resume").finish()
        second = json.loads((server.path / "evaluation.json").read_text())
        for running in taking_part:
            assert running.end() == 0
        yield Told(
            load_study(server.study),
            enrolments,
            printed,
            first,
            second,
            before,
            budgets(hospitals),
            deployment.command("server", "status", server.path),
            {hospital.site: hospital.log for hospital in hospitals},
            server.weights,
        )


def test_the_sum_is_the_hospitals_histograms_and_their_noise(told: Told, cohort: dict[str, Path]) -> None:
    """Final weights on the held-out patients of the one that told: what was published differs by noise alone."""
    study = told.study
    assert study.metrics is not None
    network = build_network(study)
    load_state(network, from_bytes(told.weights.read_bytes()))
    true = np.zeros((2, BINS))
    for site in TELLING:
        records = read(
            cohort[site],
            study.task.name,
            study.features,
            HELD_OUT,
            max_steps=study.records.max_steps,
            bin_hours=study.records.bin_hours,
        )
        scores = scores_one_by_one(network, Dataset(records, centre_mask=study.model.centre_mask))
        true += histogram(study.score_bins(study.metrics), records.patient, records.label, scores)
    deviation = NOISE * len(TELLING) ** 0.5
    noise = (np.array(told.first["metrics"]["histogram"]) - true) / deviation
    assert told.first["metrics"]["noise"] == pytest.approx(deviation)
    assert np.abs(noise).max() < 6
    assert 0.2 < noise.std() < 2.5
    assert true.sum() > 5


def test_who_is_held_out_does_not_train(cohort: dict[str, Path], told: Told) -> None:
    """The split that is scored and the split that trains share no patient."""
    study = told.study
    for site in TELLING:
        ids = [
            set(
                read(
                    cohort[site],
                    study.task.name,
                    study.features,
                    split,
                    max_steps=study.records.max_steps,
                    bin_hours=study.records.bin_hours,
                ).patient_id.tolist()
            )
            for split in (TRAIN, HELD_OUT)
        ]
        assert ids[1]
        assert not ids[0] & ids[1]


def test_asked_again_the_hospitals_repeat_their_answer(told: Told) -> None:
    """A server that resumes a finished study gets the same numbers to the last digit, and no patient pays."""
    assert told.second == told.first
    assert told.after == told.before


def test_the_hospital_that_does_not_tell_trained_and_told_nothing(told: Told) -> None:
    """POLICY in the page and in its log; its budget has one plan, the other's two, under one price."""
    assert told.first["metrics"]["sites"] == list(TELLING)
    assert told.first["refused"] == {"east": "POLICY"}
    assert "metrics after round 3: POLICY" in told.logs["east"]
    parts = {site: [study["part"] for study in found["studies"]] for site, found in told.after.items()}
    assert parts == {"north": ["training", "metrics"], "east": ["training"]}
    charged = {site: found["cohorts"][0]["charged"] for site, found in told.after.items()}
    assert charged["north"] == told.study.epsilon(with_metrics=True)
    assert charged["east"] == told.study.epsilon(with_metrics=False) < charged["north"]


def test_people_are_told_before_and_after(told: Told) -> None:
    """The terms name what metrics cost and tell; the end of the run and `server status` show the estimates."""
    price = f"Price: epsilon {told.study.epsilon(with_metrics=True):.3g} at delta"
    for site in TELLING:
        assert "12 counts of patients by label and score, each with noise of 2 patients" in told.enrolments[site]
        assert price in told.enrolments[site]
    assert "This hospital's policy does not tell that (min_metrics_noise)" in told.enrolments["east"]
    for said in (told.printed, told.shown):
        assert "metrics of north, noise 2 patients a cell" in said
        assert "AUROC" in said
        assert "east told no metrics (POLICY)" in said
