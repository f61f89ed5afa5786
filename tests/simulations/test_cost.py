"""What a study costs before anybody is asked."""

from __future__ import annotations

import math

import pytest

from common.privacy.accounting import epsilon_of
from simulations.choosing import at_epsilon
from simulations.cost import StepTime, cost_of, step_time
from tests.small import small_study


def test_price_and_noise_follow_from_the_public_terms() -> None:
    """Per budget the study's plan and its PLD price; the noise is sigma / (q declared), averaged by public weights."""
    study = small_study()
    cost = cost_of(study, [1.0, 8.0])
    assert [budget.epsilon for budget in cost.budgets] == [1.0, 8.0]
    for budget in cost.budgets:
        plan = at_epsilon(study, budget.epsilon).plan()
        assert budget.plan == plan
        assert budget.price == epsilon_of(plan) <= budget.epsilon
        noise = {site: plan.noise_multiplier / (0.5 * size) for site, size in (("north", 80), ("east", 50))}
        assert budget.noise == pytest.approx(noise)
        weights = {"north": 6400 / 8900, "east": 2500 / 8900}
        expected = math.sqrt(sum((weights[site] * noise[site]) ** 2 for site in noise))
        assert budget.noise_together == pytest.approx(expected)


def test_the_message_is_as_large_as_the_weights() -> None:
    """Down and up a site moves four bytes a number and little else; a round takes as long as its slowest site."""
    cost = cost_of(small_study(), [1.0])
    for site in cost.sites:
        for moved in (site.down, site.up):
            assert 4 * cost.parameters < moved < 4 * cost.parameters + 10_000
    assert cost.seconds_per_round == max(site.seconds_per_round for site in cost.sites)
    assert sum(site.weight for site in cost.sites) == pytest.approx(1)


def test_a_step_takes_time_that_grows_with_its_patients() -> None:
    """A measured step is a line without negative parts, whatever a busy machine adds."""
    step = step_time(small_study())
    assert step.fixed >= 0
    assert step.per_patient >= 0
    assert step.fixed + step.per_patient > 0
    assert StepTime(2.0, 0.5, 10).of(4) == 4.0
