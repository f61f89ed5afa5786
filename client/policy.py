"""A hospital's own limits: part of its site file, never sent. A study can only be stricter.

A limit that is not written is none, except the budget, which must be. The limits look at the study's terms alone,
which are public, so a refusal (`Status.POLICY`) tells nothing of the records. `min_patients` is the exception, and is
therefore not asked in a round: a person's command asks it once, before enrolment, and its answer is listed among what
epsilon does not cover. Once enrolled, a site with few or no patients answers like any other.

Imports the study for type checking only: the process that holds the connection reads site files, and stays small.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from common.errors import DataError, PolicyError
from common.terms import Terms

if TYPE_CHECKING:
    from common.study import Study

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
REMEDY = "ask the coordinator for stricter terms, or change the limit, which is this hospital's own decision"


class Policy(Terms):
    """What this hospital takes part in.

    Attributes:
        max_epsilon: what any patient here may ever be charged, over all studies: the cap of the ledger.
        delta: delta of that budget; a study's may be smaller.
        min_noise_multiplier: least noise of a step, in units of the clip.
        max_clip: largest norm of one patient's gradient in a step.
        max_sampling_rate: largest part of the patients that a step may draw, on average.
        max_steps: most private steps of one study, spare ones included.
        tasks: what may be predicted, by name; absent: anything.
        cells: the networks allowed; absent: any.
        features: digests of the feature schemas allowed (`FeatureSchema.digest`); absent: any.
        min_patients: least number of patients to enrol with.
        min_metrics_noise: least noise of a study's metrics, in patients; absent: no metric leaves this hospital.

    Guarantee:
        No round is trained of a study that exceeds one of these limits, whatever a server sends. No metric leaves
        unless `min_metrics_noise` is written, and none with less noise.
    """

    LATER: ClassVar[frozenset[str]] = frozenset({"min_metrics_noise"})

    max_epsilon: float = Field(gt=0, le=100)
    delta: float = Field(gt=0, lt=1)
    min_noise_multiplier: float = Field(default=0.0, ge=0)
    max_clip: float | None = Field(default=None, gt=0)
    max_sampling_rate: float = Field(default=1.0, gt=0, le=1)
    max_steps: int | None = Field(default=None, ge=1)
    tasks: tuple[Name, ...] | None = Field(default=None, min_length=1)
    cells: tuple[Literal["gru", "lstm", "rnn", "none"], ...] | None = Field(default=None, min_length=1)
    features: tuple[Digest, ...] | None = Field(default=None, min_length=1)
    min_patients: int = Field(default=1, ge=0)
    min_metrics_noise: float | None = Field(default=None, ge=0.25)

    def check(self, study: Study) -> None:
        """Compare a study's terms with every limit.

        Raises:
            PolicyError: one line per limit that is exceeded, with what is asked and the limit.
            PlanError: the study has no possible plan.
        """
        privacy, training = study.privacy, study.training
        asked = "no noise at all" if privacy.epsilon is None else f"epsilon {privacy.epsilon}"
        spare = privacy.spare_rounds * training.local_steps
        steps = training.rounds * training.local_steps + spare
        features = study.features.digest()
        self._refuse(
            study,
            (
                privacy.epsilon is not None and privacy.epsilon <= self.max_epsilon,
                asked,
                "max_epsilon",
                self.max_epsilon,
            ),
            (privacy.delta <= self.delta, f"delta {privacy.delta}", "delta", self.delta),
            (self.max_clip is None or privacy.clip <= self.max_clip, f"clip {privacy.clip}", "max_clip", self.max_clip),
            (
                privacy.sampling_rate <= self.max_sampling_rate,
                f"sampling rate {privacy.sampling_rate}",
                "max_sampling_rate",
                self.max_sampling_rate,
            ),
            (
                self.max_steps is None or steps <= self.max_steps,
                f"{steps} private steps, {spare} of them spare",
                "max_steps",
                self.max_steps,
            ),
            (_in(study.task.name, self.tasks), f"task `{study.task.name}`", "tasks", _list(self.tasks)),
            (_in(study.model.cell, self.cells), f"cell `{study.model.cell}`", "cells", _list(self.cells)),
            (_in(features, self.features), f"feature schema {features}", "features", _list(self.features)),
        )
        noise = study.plan().noise_multiplier  # last: to find it for a million steps takes minutes
        self._refuse(
            study,
            (
                noise >= self.min_noise_multiplier,
                f"noise multiplier {noise}",
                "min_noise_multiplier",
                self.min_noise_multiplier,
            ),
        )

    def check_metrics(self, study: Study) -> None:
        """Compare what the study asks to be told of the final weights with what this hospital tells.

        The rest of the study has no part in it: whoever tells no metrics trains all the same.

        Raises:
            PolicyError: no metrics, or none with so little noise.
        """
        if study.metrics is None:
            return
        asked = f"metrics with noise of {study.metrics.noise_multiplier} patients"
        least = self.min_metrics_noise
        holds = least is not None and study.metrics.noise_multiplier >= least
        self._refuse(study, (holds, asked, "min_metrics_noise", "none leave" if least is None else least))

    def allows_metrics(self, study: Study) -> bool:
        """Whether this hospital tells the study's metrics, if the study has any."""
        try:
            self.check_metrics(study)
        except PolicyError:
            return False
        return study.metrics is not None

    def _refuse(self, study: Study, *limits: tuple[bool, str, str, object]) -> None:
        """Raises PolicyError for the limits that do not hold: (holds, what is asked, the limit's name, the limit)."""
        exceeded = [(term, name, limit) for holds, term, name, limit in limits if not holds]
        if exceeded:
            raise PolicyError(
                "\n".join(
                    f"study {study.name} asks for {term}, this site's policy says {name}: {limit}; {REMEDY}"
                    for term, name, limit in exceeded
                )
            )

    def check_cohort(self, patients: int) -> None:
        """Compare the plain count of patients with `min_patients`: before enrolment, by a person, never in a round.

        Raises:
            DataError: too few, with the count: it is shown to a person at the hospital, and goes nowhere else.
        """
        if patients < self.min_patients:
            raise DataError(
                f"{patients} patients, this site's policy says min_patients: {self.min_patients}; "
                "wait until there are more, or do not enrol"
            )


def _in(value: str, allowed: tuple[str, ...] | None) -> bool:
    return allowed is None or value in allowed


def _list(allowed: tuple[str, ...] | None) -> str:
    return ", ".join(allowed or ())
