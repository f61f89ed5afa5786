"""A hospital through three studies on the real command line, and a watch on all that its processes do.

The first study has two hospitals; the second, of another coordinator, is charged to the same patients; the third does
not fit into what is left. Noise and sampling are the real ones. Every process loads `watch/sitecustomize.py`, which
notes connections, files and programs from its first import to its end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from client.state import ENROLMENT
from common.study import load_study
from tests.e2e.deployment import (
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

pytestmark = pytest.mark.full  # two dozen processes, half of which load torch; its parts are tested one by one

ROUNDS = 3
# Epsilon by study: the Renyi filter prices the first two together at less than 3, and no third.
EPSILON = {"first": 1.0, "second": 1.0, "third": 2.5}
SITES = {"first": {"north": 80, "east": 50}, "second": {"north": 80}, "third": {"north": 80}}
TOO_DEAR = r"left (\S+)\) exceeds the cohort's cap 3.0; take a smaller epsilon or fewer rounds"


@dataclass
class Life:
    """What was left behind, and what was said."""

    deployment: Deployment
    servers: dict[str, Server]
    north: Hospital
    east: Hospital
    after: dict[str, dict[str, Any]]  # study -> north's budget after it
    second_enrolment: str
    refused_enrolment: str
    kept: str  # enrolment.json after the refusal
    paused: str  # what the third study's server said
    refused_round: str  # what north's client said in the third study
    third_rounds: list[dict[str, Any]]


@pytest.fixture(scope="module")
def life(cohort: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    root = tmp_path_factory.mktemp("life") / "d"
    with deployed(root, watch=WATCH) as deployment:
        servers = {name: _server(deployment, root.parent / "terms" / name, name) for name in EPSILON}
        first, second, third = servers.values()
        north, east = (Hospital(deployment, site, cohort[site], first) for site in ("north", "east"))
        for hospital in (north, east):
            hospital.keygen()
            first.admit(hospital)
        for server in (second, third):
            server.admit(north)

        # North agrees to the third study while nothing is spent, and keeps a copy of what it agreed to.
        north.take_up(third)
        waiting = third.run()
        enrol([north])
        agreed_to_third = (north.state / ENROLMENT).read_text()
        waiting.end()

        north.take_up(first)
        serving = first.run()
        enrol([north, east])
        taking_part = [north.run(), east.run()]
        serving.finish()
        for running in taking_part:
            assert running.end() == 0
        after = {"first": budgets([north])["north"]}

        north.take_up(second)
        serving = second.run()
        enrolling = north.enrol()
        enrolling.finish()
        running = north.run()
        serving.finish()
        assert running.end() == 0
        after["second"] = budgets([north])["north"]

        north.take_up(third)
        waiting = third.run()
        refused = north.enrol().finish(status=2)
        kept = (north.state / ENROLMENT).read_text()
        (north.state / ENROLMENT).write_text(agreed_to_third)
        running = north.run()
        waiting.wait_for("paused: round 1")
        assert (running.end(), waiting.end()) == (0, 0)
        after["third"] = budgets([north])["north"]
        yield Life(
            deployment,
            servers,
            north,
            east,
            after,
            enrolling.text,
            refused,
            kept,
            waiting.text,
            running.text,
            third.rounds,
        )


def _server(deployment: Deployment, folder: Path, name: str) -> Server:
    study = write_study(
        folder / "study.yaml",
        SITES[name],
        name=name,
        quorum=len(SITES[name]),
        model={"hidden": 4, "embedding": 3},
        privacy={"epsilon": EPSILON[name], "sampling_rate": 1.0},
        training={"rounds": ROUNDS},
    )
    return Server(deployment, study, name)


def test_the_first_study_is_charged_by_its_own_price(life: Life) -> None:
    """One plan ever: its exact epsilon, within the study's, is charged; three releases stand in the ledger."""
    (account,), (cohort,) = life.after["first"]["studies"], life.after["first"]["cohorts"]
    assert (account["name"], account["releases"], account["steps_taken"]) == ("first", ROUNDS, ROUNDS)
    assert cohort["plans"] == 1
    assert cohort["charged"] == account["epsilon"]
    assert 0.99 < cohort["charged"] <= 1.0


def test_a_second_study_is_charged_to_the_same_patients(life: Life) -> None:
    """Two plans: the filter's price of both, more than either and within the cap; both studies have their rounds."""
    studies = {account["study"]: account for account in life.after["second"]["studies"]}
    (cohort,) = life.after["second"]["cohorts"]
    assert set(studies) == {load_study(life.servers[name].study).digest() for name in ("first", "second")}
    assert [account["releases"] for account in studies.values()] == [ROUNDS, ROUNDS]
    assert cohort["plans"] == 2
    assert 1.0 < cohort["charged"] <= cohort["cap"] == 3.0
    assert cohort["left"] == pytest.approx(3.0 - cohort["charged"])
    assert "finished: 3 rounds" in next(run.text for run in life.deployment.started if "second-run" in run.name)


def test_enrolling_again_says_what_is_different(life: Life) -> None:
    """Terms and authority are another study's: the person who is asked reads that before the yes."""
    assert "Different since then: the study's terms, the server's certificate authority." in life.second_enrolment


def test_a_study_that_does_not_fit_cannot_be_enrolled_for(life: Life) -> None:
    """One line that says what it would cost and what is left; the earlier yes stays as it was."""
    line = life.refused_enrolment.splitlines()[-1]
    assert line.startswith("error: ")
    assert left_in(line) == pytest.approx(life.after["second"]["cohorts"][0]["left"], rel=1e-3)
    assert json.loads(life.kept)["name"] == "second"


def left_in(line: str) -> float:
    """What a refusal says is left."""
    found = re.search(TOO_DEAR, line)
    assert found, line
    return float(found[1])


def test_a_study_that_does_not_fit_is_not_trained_either(life: Life) -> None:
    """With a yes from before, the ledger still refuses: BUDGET goes to the server, what is left to the client's log."""
    assert re.search(r"paused: round 1: 0 usable updates, the study's quorum is 1 \(north: BUDGET\)", life.paused)
    assert [(line["counted"], line["refused"]) for line in life.third_rounds] == [(False, {"north": "BUDGET"})]
    (refusal,) = [line for line in life.refused_round.splitlines() if "round 1 refused" in line]
    assert left_in(refusal) == pytest.approx(life.after["second"]["cohorts"][0]["left"], rel=1e-3)
    assert "round 1: BUDGET" in life.refused_round


def test_a_refusal_charges_nothing(life: Life) -> None:
    """After the third study's refusals the ledger has the very entries that it had before."""
    assert life.after["third"] == life.after["second"] | {
        "studies": [account | {"name": None} for account in life.after["second"]["studies"]]
    }


def test_nobody_calls_writes_or_starts_what_it_may_not(life: Life) -> None:
    """Clients, parent and child, look up and call their server alone, and write to their state folder alone.

    Servers call nobody, listen on their one port, and write to their folder alone. No process starts a program.
    """
    assert strays(life.deployment) == []
    assert seen(life.deployment, "socket.connect") == {
        f"{site}-{what}" for site in ("north", "east") for what in ("enrol", "run")
    }
    assert seen(life.deployment, "open") >= {"first-run", "second-run", "third-run", "north-run", "client-keygen"}
    assert seen(life.deployment, "sqlite3.connect") >= {"first-run", "north-run", "north-budget"}


def test_nothing_is_left_behind_elsewhere(life: Life) -> None:
    """Not in the home, not among temporary files, not in the working directory, by whatever library."""
    assert life.deployment.left_behind() == []


def test_what_was_written_is_for_its_owner_alone(life: Life) -> None:
    """State folders 0700, files in them 0600, after three studies."""
    for hospital in (life.north, life.east):
        assert open_to_others(hospital.state) == []
    for server in life.servers.values():
        assert open_to_others(server.path / "private") == []
