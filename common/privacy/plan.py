"""The privacy plan: everything that decides epsilon, frozen in one value before the first step.

A plan is computed from public facts only (the study and its declared patients), by the site itself and again by
the server; neither takes it from the other. Habit borrowed from jax_privacy's `execution_plan`: no loose sigma.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from common.errors import PlanError


@dataclass(frozen=True)
class Plan:
    """One site's private training: `steps` Poisson-subsampled Gaussian steps, and `spare_steps` for retries.

    Attributes:
        sampling_rate: q, the probability with which each patient joins a step, in (0, 1].
        noise_multiplier: sigma, noise standard deviation in units of `clip`; 0 means no privacy (epsilon infinite).
        clip: C, the largest L2 norm that one patient's gradient may have in a step, > 0.
        delta: the delta of (epsilon, delta), in (0, 1).
        steps: local steps of the whole study, >= 1.
        spare_steps: further steps that are priced beforehand and taken only when a round must be tried again.

    Guarantee:
        Unit is the patient, neighbours differ by adding or removing one patient of the site. All `priced_steps`
        are in the price, so every prefix of the training, with or without retries, costs at most that.
    """

    sampling_rate: float
    noise_multiplier: float
    clip: float
    delta: float
    steps: int
    spare_steps: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("sampling_rate", self.sampling_rate, 0 < self.sampling_rate <= 1, "in (0, 1]"),
            (
                "noise_multiplier",
                self.noise_multiplier,
                0 <= self.noise_multiplier < math.inf,
                "finite and >= 0",
            ),
            ("clip", self.clip, 0 < self.clip < math.inf, "finite and > 0"),
            ("delta", self.delta, 0 < self.delta < 1, "in (0, 1)"),
            ("steps", self.steps, self.steps >= 1, ">= 1"),
            ("spare_steps", self.spare_steps, self.spare_steps >= 0, ">= 0"),
        )
        for name, value, holds, bound in checks:
            if not holds:
                raise PlanError(f"plan: {name} = {value} must be {bound}; correct the study")

    @property
    def priced_steps(self) -> int:
        """Steps that the price covers: planned and spare."""
        return self.steps + self.spare_steps

    def divisor(self, declared_patients: int) -> float:
        """What the clipped sum is divided by: the public expectation q * declared_patients of the batch size."""
        return self.sampling_rate * declared_patients
