"""PhysioNet 2012 as four hospitals: the whole study deployed, against simulations of it. Needs the real data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.stats import t as student  # type: ignore[import-untyped]  # no stubs are installed

from common.metrics import auroc
from common.models.network import build_network
from common.study import Study, load_study
from common.training import load_state
from common.weights import from_bytes
from simulations.experiment import HeldOut, simulate
from simulations.hospitals import Hospitals
from tests.e2e.deployment import ROOT, Hospital, Server, budgets, deployed, enrol, write_study

RECORDS = ROOT.parent / "shared" / "data" / "physionet2012" / "meds"
CONFIG = ROOT / "configs" / "physionet2012.yaml"
ROUNDS = 80
SEEDS = range(8)
CONFIDENCE = 0.999

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not RECORDS.is_dir(), reason=f"PhysioNet 2012 as MEDS is not at {RECORDS}"),
]


@dataclass
class Finished:
    """The study after its last round."""

    study: Study
    weights: bytes
    rounds: list[dict[str, Any]]
    budgets: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    root = tmp_path_factory.mktemp("physionet")
    declared = {site: terms["declared_patients"] for site, terms in yaml.safe_load(CONFIG.read_text())["sites"].items()}
    # The rule for the learning rate is .03 sqrt(80 / rounds).
    study = write_study(
        root / "terms" / "study.yaml", declared, CONFIG, training={"rounds": ROUNDS, "learning_rate": 0.03}
    )
    with deployed(root / "d") as deployment:
        server = Server(deployment, study)
        serving = server.run()
        hospitals = [
            Hospital(
                deployment,
                site,
                RECORDS / site,
                server,
                splits=["train", "tuning"],
                policy={"max_epsilon": 3.0, "delta": 1e-4},
            )
            for site in declared
        ]
        for hospital in hospitals:
            hospital.keygen()
            server.admit(hospital)
        enrol(hospitals)
        taking_part = [hospital.run() for hospital in hospitals]
        serving.finish(seconds=900)
        assert [running.end() for running in taking_part] == [0] * len(hospitals)
        yield Finished(load_study(server.study), server.weights.read_bytes(), server.rounds, budgets(hospitals))


def test_the_auroc_is_one_that_simulations_have(finished: Finished) -> None:
    """AUROC on set b of the deployed study's weights lies where one more seed of the simulation would.

    In 999 of 1000 cases. The interval is Student's for one more observation, from the mean and deviation of the seeds.
    """
    study = finished.study
    directories = {site: RECORDS / site for site in study.sites}
    trained_on = study.model_copy(update={"simulation": load_study(CONFIG).simulation})
    held_out = HeldOut(Hospitals(trained_on, directories, 0))
    simulated = [
        simulate(Hospitals(trained_on, directories, seed), resamples=10, held_out=held_out).score().auroc.value
        for seed in SEEDS
    ]
    network = build_network(study)
    load_state(network, from_bytes(finished.weights))
    found = auroc(held_out.label, held_out.probabilities(network))
    mean, deviation, count = float(np.mean(simulated)), float(np.std(simulated, ddof=1)), len(simulated)
    allowed = student.ppf((1 + CONFIDENCE) / 2, count - 1) * deviation * np.sqrt(1 + 1 / count)
    print(f"\nAUROC on set b: deployed {found:.4f}; simulated {mean:.4f} +- {deviation:.4f}, {count} seeds")
    assert found == pytest.approx(mean, abs=float(allowed))


def test_every_site_was_in_every_round(finished: Finished) -> None:
    """Eighty rounds of four sites, none without its update."""
    sites = sorted(finished.study.sites)
    assert [(line["round"], line["sites"], line["refused"]) for line in finished.rounds] == [
        (number, sites, {}) for number in range(1, ROUNDS + 1)
    ]


def test_every_ledger_shows_the_admitted_plan(finished: Finished) -> None:
    """Each site's own ledger: the study's plan, epsilon 3 at most for 80 steps and 4 spare ones, 80 releases."""
    plan = finished.study.plan()
    assert finished.budgets.keys() == finished.study.sites.keys()
    for found in finished.budgets.values():
        (account,), (cohort,) = found["studies"], found["cohorts"]
        assert account["noise_multiplier"] == plan.noise_multiplier
        assert (account["steps_taken"], account["steps_priced"], account["releases"]) == (ROUNDS, ROUNDS + 4, ROUNDS)
        assert 2.99 < cohort["charged"] == account["epsilon"] <= 3.0
