"""What is said beside the numbers of a simulation."""

from __future__ import annotations

from typing import Any

import pytest

from simulations.run_folder import NO_PRIVACY, RESEARCH, stamps
from simulations.seeded import STAMP
from tests.small import small_study

REAL = {"cohort": None, "data": "some/folder"}


@pytest.mark.parametrize("source", [REAL, {"cohort": None}], ids=["a folder", "not said"])
def test_records_that_are_not_made_up_are_said_to_be_treated_as_public(source: dict[str, Any]) -> None:
    """Whoever tries settings on real records for free reads so; synthetic patients need no such line."""
    assert RESEARCH == "research mode: the data were treated as public"
    assert stamps(small_study(simulation=source)) == [STAMP, RESEARCH]
    assert stamps(small_study(simulation={"cohort": "medium"})) == [STAMP]


def test_a_run_without_noise_says_that_it_has_no_privacy() -> None:
    """Instead of what epsilon would mean, not beside it; and research mode is said all the same."""
    assert stamps(small_study(privacy={"epsilon": None}, simulation=REAL)) == [NO_PRIVACY, RESEARCH]
