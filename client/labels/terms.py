"""How a task's label follows from events: the consortium's half (windows), and the site's half (codes).

The task file is shipped with the study and says when a prediction is made, how far the label looks, and which of the
study's codes are asked about. Which codes mean an admission differs from hospital to hospital and stands in the site
file, as does the code map by which a site's codes count as the study's. Neither can do the other's part.

A study reads one label for each (patient, prediction time), and MEDS labels have no column for several: a task that
asks about several code sets becomes as many label files, with the same patients and times, each a task by itself.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, NaiveDatetime, Tag, field_validator, model_validator

from common.schema import Code, CodePattern, expand
from common.terms import Terms

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
Stays = Literal["first", "all"]
MAX_NAME = 64  # of a study's `task.name`


def _not_everything(codes: tuple[str, ...]) -> tuple[str, ...]:
    if "*" in codes:
        raise ValueError("`*` alone stands for every code; write the beginning of the codes that are meant")
    return codes


def _written_out(patterns: tuple[str, ...]) -> tuple[str, ...]:
    return _not_everything(tuple(code for pattern in patterns for code in expand(pattern)))


CodeSet = Annotated[tuple[CodePattern, ...], Field(min_length=1), AfterValidator(_written_out)]
"""Codes of the study, with braces as in a feature file; one that ends in `*` stands for all that begin so."""


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


class LongStay(Terms):
    """A stay of more than `over_days` days, predicted `after_hours` hours after admission.

    Attributes:
        over_days: from the admission. A stay that ends within them, by discharge or death, was not over them.
        after_hours: when; a stay that has ended by then has no label.
        stays: as above.
    """

    kind: Literal["long_stay"]
    over_days: float = Field(gt=0, le=366)
    after_hours: float = Field(gt=0, le=24 * 366)
    stays: Stays = "first"

    @model_validator(mode="after")
    def _asked_in_time(self) -> Self:
        if self.after_hours >= 24 * self.over_days:
            raise ValueError(
                f"after_hours = {self.after_hours:g} must be < {24 * self.over_days:g}, the {self.over_days:g} days "
                "that are asked about; lower it"
            )
        return self


class FirstCode(Terms):
    """The first code of a set within `within_days` days; who had one before is not asked about.

    Attributes:
        codes: the set, in codes of the study.
        predict: at the `discharge`, or so many hours after `admission`.
        after_hours: with `admission`; 0 is the moment itself.
        within_days: how far the label looks, from the prediction.
        grace_hours: a code so soon after the prediction was had before: 24 where codes are dates, which count as
            23:59:59 of their day, so that what was coded for the stay itself is not what is predicted.
        stays: as above.
    """

    kind: Literal["first_code"]
    codes: CodeSet
    predict: Literal["admission", "discharge"] = "discharge"
    after_hours: float = Field(default=0.0, ge=0, le=24 * 366)
    within_days: float = Field(gt=0, le=3660)
    grace_hours: float = Field(default=0.0, ge=0, le=72)
    stays: Stays = "first"

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.predict == "discharge" and self.after_hours:
            raise ValueError("after_hours goes with `predict: admission`; remove it")
        if self.grace_hours >= 24 * self.within_days:
            raise ValueError(
                f"grace_hours = {self.grace_hours:g} must be < {24 * self.within_days:g}, the days of within_days"
            )
        return self


class NextVisit(Terms):
    """Whether the next stay has a code of a set, predicted at the discharge: a label file for each set.

    Attributes:
        sets: word -> codes of the study. The label file of a word is TASK_WORD.parquet.
        grace_hours: a code so long after the next stay's end, and before the stay after it, still belongs to it.
        stays: as above. A stay after which none is seen has no label.
    """

    kind: Literal["next_visit"]
    sets: dict[Name, CodeSet] = Field(min_length=1)
    grace_hours: float = Field(default=0.0, ge=0, le=72)
    stays: Stays = "all"


def _kind(label: Any) -> str | None:
    """Which template a mapping (or an already built label) is of."""
    kind = label.get("kind") if isinstance(label, dict) else getattr(label, "kind", None)
    return kind if isinstance(kind, str) else None


KINDS = {
    "death_in_stay": DeathInStay,
    "readmission": Readmission,
    "long_stay": LongStay,
    "first_code": FirstCode,
    "next_visit": NextVisit,
}
Label = Annotated[
    Annotated[DeathInStay, Tag("death_in_stay")]
    | Annotated[Readmission, Tag("readmission")]
    | Annotated[LongStay, Tag("long_stay")]
    | Annotated[FirstCode, Tag("first_code")]
    | Annotated[NextVisit, Tag("next_visit")],
    Discriminator(
        _kind,
        custom_error_type="unknown_kind",
        custom_error_message=f"key `kind` must be one of {', '.join(KINDS)}",
    ),
]


class TaskFile(Terms):
    """A task: its name, which is the study's `task.name`, and its label."""

    version: Literal[1]
    name: Name
    label: Label

    @model_validator(mode="after")
    def _a_study_can_name_it(self) -> Self:
        for name in self.files():
            if len(name) > MAX_NAME:
                raise ValueError(f"label file {name} has {len(name)} characters, at most {MAX_NAME}; shorten the words")
        return self

    def files(self) -> dict[str, tuple[str, ...]]:
        """Names of the task's label files -> the code set that each asks about, () where there is none."""
        if isinstance(self.label, NextVisit):
            return {f"{self.name}_{word}": codes for word, codes in self.label.sets.items()}
        return {self.name: self.label.codes if isinstance(self.label, FirstCode) else ()}

    def codes(self) -> tuple[str, ...]:
        """All codes of its code sets, without a `*` at their end."""
        listed = [code.rstrip("*") for codes in self.files().values() for code in codes]
        return tuple(dict.fromkeys(code for code in listed if not code.endswith("/")))


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

    _meant = field_validator("admission", "discharge", "death")(_not_everything)
