"""What a study costs before anybody is asked: plan and noise per budget, time and traffic per round.

Everything here follows from the public terms, but for the time, which is measured: real private steps of the study's
network, on this machine, on made-up records as long as the study's (`typical.py`).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import numpy as np

from common.batching import Dataset
from common.device import resolve
from common.models.network import build_network
from common.privacy.accounting import epsilon_of
from common.privacy.plan import Plan
from common.privacy.randomness import Randomness
from common.study import Study
from common.training import local_optimizer, state_of, train_round
from simulations.centralised import join
from simulations.choosing import at_epsilon
from simulations.experiment import one_thread, traffic
from simulations.rows import Traffic
from simulations.typical import made_up_positives

MOST_TIMED, MOST_ROWS = 1000, 100_000  # patients and steps of records in a timed step; larger ones are extrapolated
REPEATS = 3  # the fastest counts: a shared machine only ever adds time


@dataclass(frozen=True)
class StepTime:
    """Seconds of one private step: a part that every step has, and a part for each sampled patient."""

    fixed: float
    per_patient: float
    record_steps: int

    def of(self, patients: float) -> float:
        """Seconds with so many sampled patients."""
        return self.fixed + self.per_patient * patients


@dataclass(frozen=True)
class Budget:
    """The plan of every site at one epsilon.

    Attributes:
        epsilon: asked for.
        price: PLD epsilon of all priced steps: what is guaranteed.
        noise: standard deviation of the noise on each number of a site's mean gradient, over C, by site.
        noise_together: the same after averaging with the study's weights.
    """

    epsilon: float
    price: float
    plan: Plan
    noise: dict[str, float]
    noise_together: float


@dataclass(frozen=True)
class SiteCost:
    """A site's part in a round; bytes are those of the messages, without Flower's envelope and TLS."""

    site: str
    declared_patients: int
    weight: float
    patients_per_step: float
    seconds_per_round: float
    down: int
    up: int


@dataclass(frozen=True)
class Cost:
    """The whole study. Sites train side by side, so that a round takes as long as its slowest site."""

    budgets: tuple[Budget, ...]
    sites: tuple[SiteCost, ...]
    rounds: int
    parameters: int
    record_steps: int

    @property
    def seconds_per_round(self) -> float:
        """Of training; the connection comes on top."""
        return max(site.seconds_per_round for site in self.sites)


def cost_of(study: Study, epsilons: list[float]) -> Cost:
    """Price, noise, time and traffic of a study. Takes seconds. Raises PlanError for a budget without a plan."""
    budgets = tuple(budget_of(at_epsilon(study, epsilon)) for epsilon in epsilons)
    step = step_time(study)
    weights = state_of(build_network(study))
    moved: Traffic = traffic(study, weights)
    shares, training = study.aggregation_weights(), study.training
    sites = []
    for site, terms in study.sites.items():
        sampled = study.privacy.sampling_rate * terms.declared_patients
        seconds = training.local_steps * step.of(sampled)
        sites.append(
            SiteCost(site, terms.declared_patients, shares[site], sampled, seconds, moved.down, moved.up),
        )
    parameters = sum(array.size for array in weights.values())
    return Cost(budgets, tuple(sites), training.rounds, parameters, step.record_steps)


def budget_of(study: Study) -> Budget:
    """The plan at the study's own epsilon, which must be a number."""
    plan, shares = study.plan(), study.aggregation_weights()
    noise = {site: plan.noise_multiplier / plan.divisor(terms.declared_patients) for site, terms in study.sites.items()}
    together = math.hypot(*(shares[site] * each for site, each in noise.items()))
    assert study.privacy.epsilon is not None
    return Budget(study.privacy.epsilon, epsilon_of(plan), plan, noise, together)


def step_time(study: Study) -> StepTime:
    """Time the study's own private step at two sizes, one thread, and draw the line through them."""
    made_up = made_up_positives(study, 0)
    length = made_up.n_steps // made_up.n_patients
    largest = max(terms.declared_patients for terms in study.sites.values()) * study.privacy.sampling_rate
    large = int(max(16, min(MOST_TIMED, MOST_ROWS / length, largest)))
    small = large // 4
    everybody = join([made_up] * math.ceil(large / made_up.n_patients))
    device, mask = resolve(study.device), study.model.centre_mask
    network = build_network(study, 0).to(device)
    optimizer = local_optimizer(study.training.recipe, network, study.training.learning_rate)
    # Everybody joins, so that a step has exactly so many patients. What sigma is does not change the time.
    plan = replace(at_epsilon(study, None).plan(), sampling_rate=1.0, noise_multiplier=1.0)

    def seconds(patients: int) -> float:
        dataset = Dataset(everybody.select(np.arange(patients)), centre_mask=mask, device=device)
        taken = []
        for _ in range(1 + REPEATS):  # the first warms up
            began = time.perf_counter()
            train_round(
                network,
                dataset,
                plan,
                declared_patients=patients,
                steps=1,
                optimizer=optimizer,
                randomness=Randomness(),
            )
            taken.append(time.perf_counter() - began)
        return min(taken[1:])

    with one_thread():
        few, many = seconds(small), seconds(large)
    slope = max(0.0, (many - few) / (large - small))
    return StepTime(max(0.0, many - slope * large), slope, length)
