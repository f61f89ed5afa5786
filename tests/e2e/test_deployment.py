"""Three hospitals and a server, each a process of its own, over TLS and with keys: a whole study.

The hospitals' randomness is the simulation's without noise, so the weights must be the simulation's. It is passed by
a script of the tests (silent_client.py); all else goes through the command line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.state import ENROLMENT, KEY, LEDGER
from common.models.network import build_network
from common.study import Study, load_study
from common.training import state_of
from common.weights import Weights, from_bytes
from server.rounds import run
from server.strategy import FederatedAveraging
from simulations.hospitals import Hospitals
from simulations.local_grid import LocalGrid
from simulations.seeded import Silent
from tests.e2e.deployment import (
    ROOT,
    Deployment,
    Hospital,
    Server,
    budgets,
    deployed,
    enrol,
    open_to_others,
    write_study,
)
from tests.e2e.watched import WATCH, seen, strays

DECLARED = {"north": 80, "east": 50, "south": 30}
ROUNDS, SEED = 20, 4
SILENT = ROOT / "tests" / "e2e" / "silent_client.py"


@dataclass
class Finished:
    """The study after its last round, all processes ended."""

    deployment: Deployment
    server: Server
    hospitals: list[Hospital]
    study: Study
    exits: list[int]
    printed: str
    status: dict[str, Any]
    budgets: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def finished(cohort: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    root = tmp_path_factory.mktemp("deployment") / "d"
    study = write_study(
        root.parent / "terms" / "study.yaml",
        DECLARED,
        quorum=3,
        model={"hidden": 8, "embedding": 4},
        training={"rounds": ROUNDS},
    )
    with deployed(root, watch=WATCH) as deployment:
        server = Server(deployment, study)
        hospitals = [Hospital(deployment, site, cohort[site], server) for site in DECLARED]
        serving = server.run()
        for hospital in hospitals:
            hospital.keygen()
            server.admit(hospital)  # the running server lets it in
        enrol(hospitals)
        taking_part = [hospital.run(str(SEED), how=(SILENT,)) for hospital in hospitals]
        printed = serving.finish()
        exits = [running.end() for running in taking_part]
        yield Finished(
            deployment, server, hospitals, load_study(server.study), exits, printed, server.status(), budgets(hospitals)
        )


def test_the_weights_are_the_simulations(finished: Finished, cohort: dict[str, Path]) -> None:
    """Twenty rounds without noise over TLS, three processes each with its child: the weights of the simulation."""
    study = finished.study
    hospitals = Hospitals(study, {site: cohort[site] for site in DECLARED}, SEED, Silent)
    start = state_of(build_network(study))
    with LocalGrid(hospitals.open, study.sites) as grid:
        expected = run(grid, FederatedAveraging(study, start, lambda: grid.roster), rounds=ROUNDS)
    found = from_bytes(finished.server.weights.read_bytes())
    assert found.keys() == expected.keys()
    assert distance(found, expected) <= 1e-6
    assert distance(found, start) > 1e-2  # and something was learned


def distance(one: Weights, other: Weights) -> float:
    """Largest difference of any weight."""
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def test_every_site_was_in_every_round(finished: Finished) -> None:
    """The server's lines name all sites in each round, once and in order; its summary says finished."""
    sites = sorted(DECLARED)
    assert [(line["round"], line["sites"], line["refused"], line["counted"]) for line in finished.server.rounds] == [
        (number, sites, {}, True) for number in range(1, ROUNDS + 1)
    ]
    assert (finished.status["phase"], finished.status["round"]) == ("finished", ROUNDS)
    assert f"finished: {ROUNDS} rounds" in finished.printed


def test_every_ledger_shows_the_plan_and_its_releases(finished: Finished) -> None:
    """Each site's own budget: the study's plan, priced whole and within the cap, a step and a release a round."""
    plan = finished.study.plan()
    for found in finished.budgets.values():
        (account,) = found["studies"]
        assert account["study"] == finished.study.digest()
        assert {key: account[key] for key in ("sampling_rate", "noise_multiplier", "clip", "delta")} == {
            key: getattr(plan, key) for key in ("sampling_rate", "noise_multiplier", "clip", "delta")
        }
        assert (account["steps_priced"], account["spare_steps_left"]) == (plan.priced_steps, plan.spare_steps)
        assert (account["steps_taken"], account["releases"]) == (ROUNDS, ROUNDS)
        assert 2.9 < account["epsilon"] <= 3.0
        (charged,) = found["cohorts"]
        assert charged["charged"] == account["epsilon"]
    assert [site["epsilon"] for site in finished.status["sites"]] == pytest.approx([3.0] * 3, abs=0.3)


def test_everybody_ends_cleanly(finished: Finished) -> None:
    """Hospitals end with status 0 on SIGTERM; nobody warns of anything but that the server is gone after the end."""
    assert finished.exits == [0, 0, 0]
    said = [running.text for running in finished.deployment.started] + [hospital.log for hospital in finished.hospitals]
    said.append((finished.server.path / "state" / "server.log").read_text())
    for text in said:
        for line in text.splitlines():
            assert not re.search("ERROR|Traceback|error:", line)
            assert "WARNING" not in line or finished.server.address in line
        assert f"round {ROUNDS}: OK" not in text.partition("WARNING")[2]


def test_no_count_or_id_of_a_patient_is_logged(finished: Finished) -> None:
    """Logs hold rounds, statuses and seconds; enrolment shows the true count on its terminal, and pins it nowhere."""
    for hospital in finished.hospitals:
        assert "patients" not in hospital.log
        assert "patients" not in (hospital.state / ENROLMENT).read_text().replace("declared_patients", "")


def test_keys_and_ledgers_are_private(finished: Finished) -> None:
    """State folders and the server's private folder: 0700, every file in them 0600; the server's state is 0700."""
    for hospital in finished.hospitals:
        assert {KEY, LEDGER, ENROLMENT} <= {path.name for path in hospital.state.iterdir()}
        assert open_to_others(hospital.state) == []
    assert open_to_others(finished.server.path / "private") == []
    assert (finished.server.path / "state").stat().st_mode & 0o777 == 0o700


def test_nobody_calls_writes_or_starts_what_it_may_not(finished: Finished) -> None:
    """Clients, parent and child, look up and call the server alone, and write to their state folder alone.

    The server calls nobody, listens on its one port, and writes to its folder alone. No process starts a program.
    """
    assert strays(finished.deployment) == []
    clients = {f"{site}-{what}" for site in DECLARED for what in ("enrol", "run")}
    assert seen(finished.deployment, "socket.connect") == clients
    assert seen(finished.deployment, "open") >= clients | {"server-run"}


def test_nothing_is_left_in_home_or_temporary_folders(finished: Finished) -> None:
    """Neither the home, nor the folder for temporary files, nor the working directory gets a file."""
    assert finished.deployment.left_behind() == []
