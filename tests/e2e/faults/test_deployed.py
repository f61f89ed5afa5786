"""Every process of a deployment killed where it hurts, and again at random: the study completes, its books in order."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from tests.e2e.faults.kill_everywhere import FIRST, KILLS, everything
from tests.e2e.faults.soak import Soak, one_study

pytestmark = [
    pytest.mark.full,  # some thirty starts of processes that load torch
    pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc"),
]


def test_every_process_killed_at_every_moment(cohort: dict[str, Path], tmp_path: Path) -> None:
    """Client, training process and server, each at each of its moments, and together: each costs what is stated.

    Spare steps go from the commit of a mark to the commit of its update, and nowhere else. The final weights are, to
    the last bit, those that follow from the attempts that the ledgers say were released.
    """
    assert len(everything(tmp_path / "d", cohort)) == len(FIRST) + len(KILLS)


def test_random_deaths(cohort: dict[str, Path], tmp_path: Path) -> None:
    """A minute of random deaths, more than one at a time now and then: the study completes, its books in order."""
    soak = Soak()
    one_study(tmp_path / "d", cohort, 40, 6.0, time.monotonic() + 60.0, soak)
    assert soak.studies == 1
