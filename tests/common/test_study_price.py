"""What a study's noise may depend on."""

from __future__ import annotations

from tests.small import small_study


def test_who_takes_part_changes_no_plan() -> None:
    """Fewer of more sites for a round is no amplification: the server sees who answers, so the noise stays the same."""
    everybody = small_study(quorum=2)
    sites = {name: {"declared_patients": 50} for name in ("east", "north", "south", "west")}
    some = small_study(quorum=1, sites=sites)
    assert some.plan() == everybody.plan()
