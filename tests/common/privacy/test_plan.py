"""The plan: a value that cannot be wrong in itself, and cannot change."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from common.errors import PlanError
from common.privacy.plan import Plan

PLAN = Plan(sampling_rate=0.25, noise_multiplier=4.0, clip=2.0, delta=1e-5, steps=160, spare_steps=4)


@pytest.mark.parametrize(
    ("field", "value", "bound"),
    [
        ("sampling_rate", 0.0, "(0, 1]"),
        ("sampling_rate", 1.0001, "(0, 1]"),
        ("sampling_rate", -0.5, "(0, 1]"),
        ("sampling_rate", math.nan, "(0, 1]"),
        ("noise_multiplier", -1e-9, "finite and >= 0"),
        ("noise_multiplier", math.inf, "finite and >= 0"),
        ("noise_multiplier", math.nan, "finite and >= 0"),
        ("clip", 0.0, "finite and > 0"),
        ("clip", -1.0, "finite and > 0"),
        ("clip", math.inf, "finite and > 0"),
        ("clip", math.nan, "finite and > 0"),
        ("delta", 0.0, "(0, 1)"),
        ("delta", 1.0, "(0, 1)"),
        ("delta", math.nan, "(0, 1)"),
        ("steps", 0, ">= 1"),
        ("spare_steps", -1, ">= 0"),
    ],
)
def test_an_impossible_plan_is_refused(field: str, value: Any, bound: str) -> None:
    """A plan out of bounds cannot be made; the error names field, value, bound and remedy."""
    with pytest.raises(PlanError) as caught:
        replace(PLAN, **{field: value})
    for part in (f"{field} = {value}", bound, "correct the study"):
        assert part in str(caught.value)


def test_the_extremes_that_exist_are_accepted() -> None:
    """Every patient in every step, one step, no spare steps and no noise are plans."""
    assert Plan(1.0, 0.0, 1e-9, 1e-12, 1).priced_steps == 1


def test_a_plan_is_frozen() -> None:
    """Nothing changes a plan after its first step."""
    with pytest.raises(FrozenInstanceError):
        PLAN.noise_multiplier = 0.0  # type: ignore[misc]  # the assignment that must fail
    assert hash(PLAN) == hash(replace(PLAN))


def test_the_price_covers_planned_and_spare_steps() -> None:
    """Priced steps are steps plus spare steps: a retry is paid beforehand."""
    assert PLAN.priced_steps == 164


def test_the_divisor_is_the_public_expectation() -> None:
    """The clipped sum is divided by q x declared patients, whatever the sample was."""
    assert PLAN.divisor(1000) == 250.0
