"""The whole way without a network: sites with ledgers and held-out patients, the server's question, its estimates."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from client.ledger import MemoryLedger
from client.policy import Policy
from client.site import Site
from common.batching import Dataset
from common.models.network import build_network
from common.score_histogram import HISTOGRAM
from common.terms import parse
from common.training import state_of
from server import evaluation
from server.rounds import ask_for_metrics, run
from server.strategy import FederatedAveraging
from simulations.local_grid import LocalGrid
from simulations.seeded import SeededRandomness, Silent
from tests.small import as_sequences, made_up_patients, small_study

STUDY = small_study(metrics={"noise_multiplier": 2.0, "bins": 8})
HELD_OUT = {"north": 40, "east": 25}


def open_site(
    name: str, noise: type[SeededRandomness] = SeededRandomness, telling: tuple[str, ...] = ("north", "east")
) -> Site:
    limits = {"max_epsilon": 4.0, "delta": 1e-3} | ({"min_metrics_noise": 2.0} if name in telling else {})
    return Site(
        name,
        STUDY,
        Dataset(as_sequences(made_up_patients(1, 30))),
        MemoryLedger(4.0, 1e-3),
        lambda number, attempt: noise(0, name, number, attempt),
        parse(limits, Policy, "policy"),
        Dataset(as_sequences(made_up_patients(len(name), HELD_OUT[name]))),
    )


def test_a_study_ends_with_the_sites_metrics(tmp_path: Path) -> None:
    """Rounds, then one question: both answer, asked again with the same numbers, and the page is written and read."""
    with LocalGrid(open_site, STUDY.sites) as grid:
        strategy = FederatedAveraging(STUDY, state_of(build_network(STUDY)), lambda: grid.roster)
        run(grid, strategy, rounds=STUDY.training.rounds)
        replies = ask_for_metrics(grid, strategy)
        again = ask_for_metrics(grid, strategy)
    assert replies.updates.keys() == {"north", "east"}
    assert all((replies.updates[site][HISTOGRAM] == again.updates[site][HISTOGRAM]).all() for site in HELD_OUT)
    found = evaluation.evaluation(STUDY, replies)
    evaluation.write(tmp_path, found)
    assert evaluation.read(tmp_path) == json.loads(json.dumps(found))
    metrics = found["metrics"]
    assert metrics["noise"] == pytest.approx(2 * 2**0.5)
    assert metrics["patients"]["low"] < sum(HELD_OUT.values()) < metrics["patients"]["high"]


def test_without_noise_the_sum_counts_every_held_out_patient_once() -> None:
    """With the noise left out, as only a test can: the cells add up to the patients, positives to their share."""
    with LocalGrid(lambda name: open_site(name, Silent), STUDY.sites) as grid:
        strategy = FederatedAveraging(STUDY, state_of(build_network(STUDY)), lambda: grid.roster)
        replies = ask_for_metrics(grid, strategy)
    total = sum(reply[HISTOGRAM].astype(np.float64) for reply in replies.updates.values())
    assert np.sum(total) == pytest.approx(sum(HELD_OUT.values()), abs=1e-4)


def test_a_site_that_tells_none_is_left_out() -> None:
    """Its policy says nothing of metrics: POLICY, and the estimates are the other's."""
    with LocalGrid(lambda name: open_site(name, telling=("east",)), STUDY.sites) as grid:
        strategy = FederatedAveraging(STUDY, state_of(build_network(STUDY)), lambda: grid.roster)
        found = evaluation.evaluation(STUDY, ask_for_metrics(grid, strategy))
    assert found["metrics"]["sites"] == ("east",)
    assert found["refused"] == {"north": "POLICY"}


def test_no_page_is_no_page(tmp_path: Path) -> None:
    """Before the end, or in a study without metrics, there is nothing to show."""
    assert evaluation.read(tmp_path) is None
