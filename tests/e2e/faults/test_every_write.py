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
@pytest.mark.parametrize("spares", [1, 0])
def test_a_client_killed_at_each_write_in_turn(labels: list[str], spares: int) -> None:
    """Before and after every write of a study, kill -9: with a spare step it completes; without, BUDGET where one went.

    Every time: sites and server have the same weights in each round; no ledger shows less than was released; no
    attempt is trained twice, no stored round again; and spare steps go exactly from a mark to its release.
    """
    study = study_of(ROUNDS, spares)
    stopped = sum(die_at(at, study, cost).stopped is not None for at, cost in enumerate(costs(labels)))
    assert len(labels) >= 200
    assert stopped == (0 if spares else sum(costs(labels)))


def test_a_client_killed_around_its_commits(labels: list[str]) -> None:
    """The same at the four writes around which what was spent changes, in the second half of the study."""
    study = study_of(ROUNDS, 1)
    last = {label: at for at, label in enumerate(labels) if label in FEW}
    assert last.keys() == FEW
    for at in last.values():
        assert die_at(at, study, costs(labels)[at]).stopped is None
