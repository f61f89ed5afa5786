"""How a task's label follows from events: the consortium's half (windows), and the site's half (codes).

The task file is shipped with the study and says when a prediction is made and how far the label looks. Which codes
mean an admission differs from hospital to hospital and stands in the site file. Neither can do the other's part.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, NaiveDatetime, Tag, field_validator

from common.schema import Code
from common.terms import Terms

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
Stays = Literal["first", "all"]


class DeathInStay(Terms):
    """Death before the end of a stay, predicted `after_hours` hours after admission.

    Attributes:
        after_hours: when, counted from admission; a stay that has ended by then has no label.
        grace_hours: a death so long after the discharge still belongs to the stay: 24 where deaths are dates, which
            count as 23:59:59 of their day.
        stays: `first` or `all` of a patient. There is no `last`: which stay is the last is not known at its time.
    """

    kind: Literal["death_in_stay"]
    after_hours: float = Field(gt=0, le=24 * 366)
    grace_hours: float = Field(default=0.0, ge=0, le=72)
    stays: Stays = "first"


class Readmission(Terms):
    """Another admission within `within_days` days after a discharge, predicted at the discharge.

    Attributes:
        within_days: how far the label looks.
        grace_hours: as above: who died so soon after the discharge is not asked about.
        stays: as above. A stay that ends with the patient's death has no label.
    """

    kind: Literal["readmission"]
    within_days: float = Field(gt=0, le=3660)
    grace_hours: float = Field(default=0.0, ge=0, le=72)
    stays: Stays = "first"


def _kind(label: Any) -> str | None:
    """Which template a mapping (or an already built label) is of."""
    kind = label.get("kind") if isinstance(label, dict) else getattr(label, "kind", None)
    return kind if isinstance(kind, str) else None


Label = Annotated[
    Annotated[DeathInStay, Tag("death_in_stay")] | Annotated[Readmission, Tag("readmission")],
    Discriminator(
        _kind,
        custom_error_type="unknown_kind",
        custom_error_message="key `kind` must be one of death_in_stay, readmission",
    ),
]


class TaskFile(Terms):
    """A task: its name, which is the study's `task.name`, and its label."""

    version: Literal[1]
    name: Name
    label: Label


class LabelCodes(Terms):
    """What a site writes for the words of a task; a code that ends in `*` stands for all that begin so.

    Attributes:
        admission, discharge, death: codes of the events.
        observed_until: up to when the extract is complete. A label that would have to look further is left out. A
            person states it: taken from the newest event, it would be one patient's doing whether others have labels.
    """

    admission: tuple[Code, ...] = Field(min_length=1)
    discharge: tuple[Code, ...] = Field(min_length=1)
    death: tuple[Code, ...] = Field(default=("MEDS_DEATH",), min_length=1)
    observed_until: NaiveDatetime

    @field_validator("admission", "discharge", "death")
    @classmethod
    def _not_everything(cls, codes: tuple[str, ...]) -> tuple[str, ...]:
        if "*" in codes:
            raise ValueError("`*` alone stands for every code; write the beginning of the codes that are meant")
        return codes
