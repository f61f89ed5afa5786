"""A client that is killed at any write of its ledger costs at most a spare step, and the study goes on or says why."""

from __future__ import annotations

import os

import pytest

from tests.e2e.faults.every_write import ROUNDS, costs, die_at, study_of, writes

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that share what was imported")

FEW = {"Admitted: after COMMIT", "Attempted: before COMMIT", "Attempted: after COMMIT", "Released: before COMMIT"}


@pytest.fixture(scope="module")
def labels() -> list[str]:
    return writes(study_of(ROUNDS, 1))


@pytest.mark.full
def test_a_client_killed_at_each_write_in_turn(labels: list[str]) -> None:
    """Before and after every write of a study, kill -9: with exactly the spare steps that it must cost, it completes.

    Without them it stops with BUDGET. Every time: sites and server have the same weights in each round; no ledger
    shows less than was released; no attempt is trained twice, no stored round again.
    """
    assert len(labels) >= 200
    studies = {spares: study_of(ROUNDS, spares) for spares in (0, 1)}
    for at, cost in enumerate(costs(labels)):
        assert die_at(at, studies[cost], cost).stopped is None
        if cost:
            assert die_at(at, studies[0], cost).stopped is not None


def test_a_client_killed_around_its_commits(labels: list[str]) -> None:
    """The same at the four writes around which what was spent changes, in the second half of the study."""
    study = study_of(ROUNDS, 1)
    last = {label: at for at, label in enumerate(labels) if label in FEW}
    assert last.keys() == FEW
    for at in last.values():
        assert die_at(at, study, costs(labels)[at]).stopped is None
