"""A study: one federated training of one task, as a public YAML file that every site pins by its digest.

Everything that may influence a released gradient stands here or follows from it: plan, model, aggregation weights.
`declared_patients` is the rounded cohort size that a person at the site agreed to publish; the true count appears in
no formula. The digest leaves out `simulation`, which is for virtual hospitals, and `sites`, see `Study.digest`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from common.errors import ConfigurationError
from common.privacy.accounting import Steps, epsilon_of_history, noise_multiplier_for
from common.privacy.plan import Plan
from common.schema import FeatureSchema
from common.score_histogram import CLASSES, SENSITIVITY, ScoreBins
from common.terms import Terms, load, parse, read_yaml

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
Pool = Literal["last_state", "mean_state", "mean_input", "last_input"]


class Task(Terms):
    """What is predicted: the name of the label file and the public prevalence of a positive label."""

    name: Name
    prevalence: float = Field(gt=0, lt=1)


class Records(Terms):
    """How events become sequences: latest `max_steps` steps; steps are event times, or bins of `bin_hours`."""

    max_steps: int = Field(ge=1, le=10_000)
    bin_hours: float | None = Field(default=None, gt=0, le=24 * 366)


class Model(Terms):
    """The network. `cell: none` is logistic regression on the pooled inputs (then `hidden` is not used)."""

    cell: Literal["gru", "lstm", "rnn", "none"] = "gru"
    hidden: int = Field(default=32, ge=1, le=4096)
    embedding: int = Field(default=16, ge=1, le=1024)
    pooling: tuple[Pool, ...] = ("last_state", "mean_state", "mean_input", "last_input")
    head_start: Literal["zero", "random"] = "zero"
    centre_mask: bool = True

    @field_validator("pooling")
    @classmethod
    def _distinct(cls, pooling: tuple[Pool, ...]) -> tuple[Pool, ...]:
        if not pooling or len(set(pooling)) != len(pooling):
            raise ValueError("name at least one pooling, each at most once")
        return pooling


class Privacy(Terms):
    """The budget and what it is spent on. `epsilon: null` trains without noise: simulations only."""

    epsilon: float | None = Field(gt=0)
    delta: float = Field(gt=0, lt=1)
    sampling_rate: float = Field(default=0.25, gt=0, le=1)
    clip: float = Field(ge=1e-6, le=1e9)  # float32 sums and norms hold their bounds far beyond, not without end
    spare_rounds: int = Field(default=4, ge=0, le=10_000)


class Training(Terms):
    """The recipe. `fedavg-one-step`: one noised step a round, Adam at the server. `fedavg-local`: `local_steps`
    Adam steps at the site from the global weights, plain average at the server.

    `aggregation` weights the sites by public numbers: `precision` (q_k declared_k / sigma_k)^2, `declared`, `uniform`.
    """

    recipe: Literal["fedavg-one-step", "fedavg-local"] = "fedavg-one-step"
    rounds: int = Field(ge=1, le=100_000)
    local_steps: int = Field(default=1, ge=1, le=10_000)
    learning_rate: float = Field(gt=0, le=10)
    decay: Literal["linear", "none"] = "linear"
    aggregation: Literal["precision", "declared", "uniform"] = "precision"

    @model_validator(mode="after")
    def _one_step(self) -> Self:
        if self.recipe == "fedavg-one-step" and self.local_steps != 1:
            raise ValueError(f"local_steps = {self.local_steps} must be 1 in fedavg-one-step; or take fedavg-local")
        return self


class Metrics(Terms):
    """What sites may tell of the final weights, once, if their policies allow it: a noised histogram of scores.

    `noise_multiplier` is the noise of each cell in patients; `bins` the number of score bins (`ScoreBins`). Fewer bins
    tell less of the curve, and drown less in noise.
    """

    noise_multiplier: float = Field(ge=0.25, le=1e5)
    bins: int = Field(default=10, ge=4, le=100)


class SiteTerms(Terms):
    """What a site has agreed to publish about itself."""

    declared_patients: int = Field(ge=2, le=100_000_000)


class Simulation(Terms):
    """Where virtual hospitals take their records: a synthetic preset (its site sizes times
    `cohort_scale`), or a folder with a MEDS directory per site.
    """

    cohort: str | None = None
    cohort_scale: float = Field(default=1.0, gt=0, le=100)
    data: str | None = None
    train: tuple[Literal["train", "tuning"], ...] = ("train",)
    seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.cohort is not None and self.data is not None:
            raise ValueError("name `cohort` (a synthetic preset) or `data` (a folder of MEDS directories), not both")
        return self


class Study(Terms):
    """One study, whole: see the module docstring. `features` may name a file; `load_study` puts its content here."""

    LATER: ClassVar[frozenset[str]] = frozenset({"metrics"})

    version: Literal[1]
    name: Name
    task: Task
    features: FeatureSchema
    records: Records
    model: Model = Model()
    privacy: Privacy
    training: Training
    metrics: Metrics | None = None
    sites: dict[Name, SiteTerms] = Field(min_length=1)
    quorum: int = Field(ge=1)
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    simulation: Simulation = Simulation()

    @field_validator("sites")
    @classmethod
    def _alphabetical(cls, sites: dict[str, SiteTerms]) -> dict[str, SiteTerms]:
        return dict(sorted(sites.items()))  # equal terms, equal digest: then also equal order wherever sites are summed

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.quorum > len(self.sites):
            raise ValueError(
                f"quorum = {self.quorum} must be <= {len(self.sites)}, the number of sites; lower it or add sites"
            )
        largest = max(self.sites, key=lambda name: self.sites[name].declared_patients)
        declared = self.sites[largest].declared_patients
        if self.privacy.delta >= 1 / declared:
            raise ValueError(
                f"privacy.delta = {self.privacy.delta} must be < {1 / declared:.3g}, one over the declared patients "
                f"of the largest site `{largest}` ({declared}); lower delta"
            )
        if self.model.cell == "none" and not {"mean_input", "last_input"} & set(self.model.pooling):
            raise ValueError("model.pooling of `cell: none` must name mean_input or last_input")
        return self

    def digest(self, *, without: frozenset[str] = frozenset({"simulation", "sites"})) -> str:
        """sha256 of the terms without `simulation` and `sites`: what a site pins.

        Who else takes part changes nothing that a site promises its patients: its noise is its own. So a hospital may
        join without every other one pinning the study again. Of `sites` a site uses its own entry, in its own copy.

        Every other field counts, defaults too; one that a later version added counts once it is used (`Terms.LATER`).
        """
        return super().digest(without=without)

    def plan(self) -> Plan:
        """The plan that each site computes for itself from these terms. Raises PlanError if none exists."""
        steps = self.training.rounds * self.training.local_steps
        spare = self.privacy.spare_rounds * self.training.local_steps
        epsilon = self.privacy.epsilon
        sigma = (
            0.0
            if epsilon is None
            else noise_multiplier_for(epsilon, self.privacy.delta, self.privacy.sampling_rate, steps + spare)
        )
        return Plan(self.privacy.sampling_rate, sigma, self.privacy.clip, self.privacy.delta, steps, spare)

    def metrics_plan(self) -> Plan | None:
        """The plan of a site's metrics: one step on all held-out patients, no spare; None if the study has none.

        A step at q = 1 with noise sigma x `SENSITIVITY` is the Gaussian mechanism, so it is priced like any other.
        """
        if self.metrics is None:
            return None
        return Plan(1.0, self.metrics.noise_multiplier, SENSITIVITY, self.privacy.delta, steps=1)

    def epsilon(self, *, with_metrics: bool) -> float:
        """PLD epsilon of a site's whole part in this study, as an only study: training, and metrics if it tells them.

        Both plans follow from these terms, so they were fixed before the first step: see `client/accounts.py`.
        """
        plans = [self.plan(), self.metrics_plan() if with_metrics else None]
        steps = [Steps(plan.sampling_rate, plan.noise_multiplier, plan.priced_steps) for plan in plans if plan]
        return epsilon_of_history(steps, self.privacy.delta)

    def score_bins(self, metrics: Metrics) -> ScoreBins:
        """Where the bins of `metrics` lie."""
        return ScoreBins(metrics.bins, self.task.prevalence)

    def aggregation_weights(self) -> dict[str, float]:
        """Public weight of each site, summing to 1: never from a reply, never from a true count.

        `precision` is inverse-variance weighting: the noise on site k's mean gradient has standard deviation
        sigma_k C / (q_k declared_k), so its weight is (q_k declared_k / sigma_k)^2. All sites of a study share q
        and sigma, hence declared_k^2.
        """
        power = {"precision": 2, "declared": 1, "uniform": 0}[self.training.aggregation]
        raw = {name: float(site.declared_patients) ** power for name, site in self.sites.items()}
        total = sum(raw.values())
        return {name: weight / total for name, weight in raw.items()}

    def largest_update(self, site: str, parameters: int) -> float:
        """A public L2 norm that no honest update of `site` exceeds, generously: it guards the average, not privacy.

        One step: at most C for each of 10 times the declared patients, and 10 standard deviations of noise on every
        coordinate. Local Adam steps: each coordinate moves less than 10 learning rates a step.
        """
        training, plan = self.training, self.plan()
        if training.recipe == "fedavg-local":
            return 10 * training.learning_rate * training.local_steps * math.sqrt(parameters)
        divisor = plan.divisor(self.sites[site].declared_patients)
        return (
            10 * plan.clip / plan.sampling_rate
            + 10 * plan.noise_multiplier * plan.clip * math.sqrt(parameters) / divisor
        )

    def largest_histogram(self, site: str) -> float:
        """A public L2 norm that no honest histogram of `site` exceeds, as `largest_update`; 0 without metrics."""
        if self.metrics is None:
            return 0.0
        noise = 10 * self.metrics.noise_multiplier * SENSITIVITY * math.sqrt(CLASSES * self.metrics.bins)
        return 10 * self.sites[site].declared_patients + noise

    def learning_rate(self, round_number: int) -> float:
        """Learning rate of round 1..rounds: constant, or linear decay that would reach 0 after the last round."""
        fraction = (round_number - 1) / self.training.rounds if self.training.decay == "linear" else 0.0
        return self.training.learning_rate * (1 - fraction)


def load_study(path: Path) -> Study:
    """Read a study file; a `features:` that is a string names a feature file relative to the study file.

    Raises:
        ConfigurationError: names file, key, value, bound and remedy.
    """
    data: Any = read_yaml(path)
    if not isinstance(data, dict):
        raise ConfigurationError(f"{path}: expected a mapping of keys to values, got {type(data).__name__}")
    features = data.get("features")
    if isinstance(features, str):
        data = {**data, "features": load(path.parent / features, FeatureSchema)}
    return parse(data, Study, str(path))
