"""The hospital's own limits: a study may be stricter, and never laxer."""

from __future__ import annotations

from typing import Any

import pytest

from client.policy import Policy
from common.errors import ConfigurationError, DataError, PolicyError
from common.terms import parse
from tests.small import small_study

STUDY = small_study()
PLAN = STUDY.plan()
BUDGET = {"max_epsilon": 1.0, "delta": 1e-3}


def policy(**limits: Any) -> Policy:
    return parse({**BUDGET, **limits}, Policy, "policy")


def test_the_budget_alone_allows_every_study_within_it() -> None:
    """Limits that are not written are none; epsilon and delta at their bounds are allowed."""
    policy().check(STUDY)


def test_limits_that_are_met_exactly_are_met() -> None:
    """Each limit allows its own value."""
    policy(
        min_noise_multiplier=PLAN.noise_multiplier,
        max_clip=PLAN.clip,
        max_sampling_rate=PLAN.sampling_rate,
        max_steps=PLAN.priced_steps,
        tasks=["other", STUDY.task.name],
        cells=["gru"],
        features=[STUDY.features.digest()],
    ).check(STUDY)


@pytest.mark.parametrize(
    ("limits", "asked", "limit"),
    [
        ({"max_epsilon": 0.99}, "asks for epsilon 1.0", "max_epsilon: 0.99"),
        ({"delta": 9e-4}, "asks for delta 0.001", "delta: 0.0009"),
        (
            {"min_noise_multiplier": PLAN.noise_multiplier + 1e-4},
            f"noise multiplier {PLAN.noise_multiplier}",
            "min_noise_multiplier: ",
        ),
        ({"max_clip": 0.69}, "clip 0.7", "max_clip: 0.69"),
        ({"max_sampling_rate": 0.49}, "sampling rate 0.5", "max_sampling_rate: 0.49"),
        ({"max_steps": 3}, "4 private steps, 1 of them spare", "max_steps: 3"),
        ({"tasks": ["death", "stay"]}, "task `diagnosis`", "tasks: death, stay"),
        ({"cells": ["none", "lstm"]}, "cell `gru`", "cells: none, lstm"),
        ({"features": ["0" * 64]}, f"feature schema {STUDY.features.digest()}", "features: " + "0" * 64),
    ],
)
def test_a_study_beyond_a_limit_is_refused(limits: dict[str, Any], asked: str, limit: str) -> None:
    """Each limit refuses alone, in one line that says what was asked, the limit and what to do."""
    with pytest.raises(PolicyError) as caught:
        policy(**limits).check(STUDY)
    text = str(caught.value)
    assert "\n" not in text
    for part in ("study small asks for", asked, limit, "ask the coordinator"):
        assert part in text


def test_every_limit_that_is_exceeded_is_named() -> None:
    """A person sees all of it at once: a line for each."""
    with pytest.raises(PolicyError) as caught:
        policy(max_epsilon=0.5, max_steps=1, cells=["lstm"]).check(STUDY)
    assert len(str(caught.value).splitlines()) == 3


def test_a_study_without_noise_is_refused() -> None:
    """No policy allows a study without noise: its epsilon is no number."""
    with pytest.raises(PolicyError, match="asks for no noise at all"):
        policy(max_epsilon=100.0).check(small_study(privacy={"epsilon": None}))


@pytest.mark.parametrize(
    "stricter",
    [
        {"privacy": {"epsilon": 0.5}},
        {"privacy": {"delta": 1e-4}},
        {"privacy": {"clip": 0.1}},
        {"privacy": {"sampling_rate": 0.1}},
        {"privacy": {"spare_rounds": 0}},
        {"training": {"rounds": 1}},
    ],
)
def test_a_stricter_study_is_allowed(stricter: dict[str, Any]) -> None:
    """Less budget, clip, sampling or training than the limits allow is always allowed."""
    limits = {"max_clip": 0.7, "max_sampling_rate": 0.5, "max_steps": 4}
    policy(**limits).check(small_study(**stricter))


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_epsilon": 0}, "max_epsilon"),
        ({"max_epsilon": 101}, "max_epsilon"),
        ({"delta": 1}, "delta"),
        ({"max_steps": 0}, "max_steps"),
        ({"min_patients": -1}, "min_patients"),
        ({"tasks": []}, "tasks"),
        ({"cells": ["transformer"]}, "cells"),
        ({"features": ["short"]}, "features"),
        ({"min_sigma": 1}, "unknown key `min_sigma`"),
        ({"max_clip": "yes"}, "max_clip"),
    ],
)
def test_a_policy_that_says_nothing_sensible_is_refused(limits: dict[str, Any], expected: str) -> None:
    """A limit out of range, an empty list, and an unknown key are one clear error each."""
    with pytest.raises(ConfigurationError, match=expected):
        policy(**limits)


@pytest.mark.parametrize("missing", ["max_epsilon", "delta"])
def test_the_budget_must_be_written(missing: str) -> None:
    """A hospital says itself what its patients may be charged: there is no default."""
    with pytest.raises(ConfigurationError, match=f"`{missing}` is missing"):
        parse({key: value for key, value in BUDGET.items() if key != missing}, Policy, "policy")


def test_the_smallest_cohort_is_a_plain_count() -> None:
    """Too few patients are refused by count, before enrolment; enough of them pass, also exactly."""
    with pytest.raises(DataError, match=r"49 patients, this site's policy says min_patients: 50; wait"):
        policy(min_patients=50).check_cohort(49)
    policy(min_patients=50).check_cohort(50)
    with pytest.raises(DataError):
        policy().check_cohort(0)
