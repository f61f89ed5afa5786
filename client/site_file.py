"""One hospital's own file: private, local, never sent. What is here wins over whatever a study asks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from common.errors import ConfigurationError
from common.study import Name, Study, load_study
from common.terms import Terms, load

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Budget(Terms):
    """What any patient of this site may ever be charged, over all studies: epsilon at delta."""

    max_epsilon: float = Field(gt=0, le=100)
    delta: float = Field(gt=0, lt=1)


class SiteFile(Terms):
    """A site's settings. Paths that are not absolute count from the folder of the site file.

    Attributes:
        site: this hospital's name in the study.
        study: path of the study file as it was agreed.
        study_digest: sha256 of its terms (`Study.digest`): any other study is refused.
        records: MEDS directory with the site's own records.
        splits: which of its patients train.
        budget: the cohort's budget, for life.
        state: folder for ledger and keys, writable by the client alone.
        device: where to train; wins over the study's.
    """

    version: Literal[1]
    site: Name
    study: str
    study_digest: Digest
    records: str
    splits: tuple[Literal["train", "tuning"], ...] = ("train",)
    budget: Budget
    state: str
    device: Literal["cpu", "cuda", "auto"] = "cpu"


def load_site_file(path: Path) -> tuple[SiteFile, Study]:
    """A site file and the study that it pins.

    Raises:
        ConfigurationError: a fault in either file, another study than the pinned one, a site that is not in it, or
            a study that asks for more than the site's budget.
    """
    site = load(path, SiteFile)
    study = load_study(path.parent / site.study)
    if study.digest() != site.study_digest:
        raise ConfigurationError(
            f"{path}: study_digest pins {site.study_digest[:12]}.., but {site.study} is {study.digest()[:12]}..; "
            "read the study again, and pin it only if its terms are what was agreed"
        )
    if site.site not in study.sites:
        raise ConfigurationError(f"{path}: site `{site.site}` is not in the study, which has {', '.join(study.sites)}")
    epsilon, delta = study.privacy.epsilon, study.privacy.delta
    if epsilon is None or epsilon > site.budget.max_epsilon:
        asked = "no noise at all" if epsilon is None else f"epsilon {epsilon}"
        raise ConfigurationError(
            f"{path}: the study asks for {asked}, this site allows {site.budget.max_epsilon}; "
            "raise max_epsilon only by the site's own decision, or leave the study"
        )
    if delta > site.budget.delta:
        raise ConfigurationError(f"{path}: the study's delta {delta} exceeds this site's {site.budget.delta}")
    return site, study
