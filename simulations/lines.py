"""The lines that stand beside a study on every curve: the same sites, budget and records, another recipe or model.

Each is a study made from the study, so that it runs through the same code and differs only in what its name says.
`lines_of` names those that `simulate run` puts beside a study; `sweep_lines` all that a sweep can draw.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from common.errors import ConfigurationError
from common.study import Study
from common.terms import parse
from simulations.rows import POOLED
from simulations.typical import typical_clip


class How(StrEnum):
    """How a line of a sweep is made."""

    FEDERATED = "federated"
    CURATOR = "curator"  # all records at one virtual site, with privacy
    POOLED_FREE = "pooled without privacy"
    FEDERATED_FREE = "federated without privacy"
    TRUTH = "truth"  # the exact probabilities of a synthetic cohort as a model
    PREVALENCE = "prevalence"  # the same risk for everybody


@dataclass(frozen=True)
class Line:
    """A line at one epsilon: its name on the curve, the study behind it, and how it is made."""

    name: str
    study: Study
    how: How = How.FEDERATED

    @property
    def trains(self) -> bool:
        """Whether anything is trained at all."""
        return self.how not in (How.TRUTH, How.PREVALENCE)


# name -> (how, whether it is drawn over epsilon, whether also at epsilon `none`)
SWEEP_LINES: dict[str, tuple[How, bool, bool]] = {
    "best-possible": (How.TRUTH, False, True),
    "pooled-no-privacy": (How.POOLED_FREE, False, True),
    "federated-no-privacy": (How.FEDERATED_FREE, False, True),
    "pooled-private": (How.CURATOR, True, False),
    "fedavg-one-step": (How.FEDERATED, True, True),
    "fedavg-local": (How.FEDERATED, True, True),
    "naive": (How.FEDERATED, True, True),
    "logistic": (How.FEDERATED, True, True),
    "alone": (How.FEDERATED, True, False),
    "prevalence": (How.PREVALENCE, False, True),
}


def logistic(study: Study) -> Study:
    """Private logistic regression on last and mean inputs and codes: what the recurrence must beat."""
    flat = _changed(study, "logistic", model={"cell": "none", "pooling": ["last_input", "mean_input"]})
    return _changed(flat, "", privacy={"clip": typical_clip(flat)})


def one_step(study: Study) -> Study:
    """`fedavg-one-step`: one noised step a round and Adam at the server. The study itself where that is its recipe."""
    if study.training.recipe == "fedavg-one-step":
        return study
    return _changed(
        study,
        "fedavg-one-step",
        training={
            "recipe": "fedavg-one-step",
            "rounds": 160,
            "local_steps": 1,
            "learning_rate": 0.021,
            "aggregation": "precision",
        },
        privacy={"spare_rounds": 4},
    )


def pooled(study: Study) -> Study:
    """A trusted curator: one virtual site that holds everybody, hence one noise. The study's recipe and budget."""
    everybody = sum(site.declared_patients for site in study.sites.values())
    return _changed(study, "pooled", sites={POOLED: {"declared_patients": everybody}}, quorum=1)


def local_steps(study: Study) -> Study:
    """`fedavg-local`: 16 rounds of 5 local Adam steps, averaged by declared patients. For slow links.

    The study itself where that is its recipe.
    """
    if study.training.recipe == "fedavg-local":
        return study
    return _changed(
        study,
        "fedavg-local",
        training={
            "recipe": "fedavg-local",
            "rounds": 16,
            "local_steps": 5,
            "learning_rate": 0.06,
            "aggregation": "declared",
        },
        privacy={"spare_rounds": 1},
    )


def naive(study: Study) -> Study:
    """What tutorials do: clip 1, last state only, raw mask, 5 local Adam steps, sites weighted alike."""
    return _changed(
        local_steps(study),
        "",
        model={"pooling": ["last_state"], "head_start": "random", "centre_mask": False},
        training={"learning_rate": 0.03, "aggregation": "uniform"},
        privacy={"clip": 1.0},
    ).model_copy(update={"name": f"{study.name}-naive"})


def alone(study: Study, site: str) -> Study:
    """One site by itself, with its whole budget: what it could do without the others."""
    return _changed(study, f"alone-{site}", sites={site: study.sites[site].model_dump()}, quorum=1)


def without_privacy(study: Study) -> Study:
    """No noise, same clip: how much the budget costs."""
    return _changed(study, "no-noise", privacy={"epsilon": None})


def lines_of(study: Study, names: list[str]) -> dict[str, Study]:
    """The named lines of a study; `alone` gives one per site. Raises ConfigurationError for an unknown name."""
    makers = {"logistic": logistic, "fedavg-local": local_steps, "naive": naive, "no-noise": without_privacy}
    found: dict[str, Study] = {}
    for name in names:
        if name == "alone":
            found |= {f"alone: {site}": alone(study, site) for site in study.sites}
        elif name in makers:
            found[name] = makers[name](study)
        else:
            known = ", ".join(sorted([*makers, "alone"]))
            raise ConfigurationError(f"--lines {name}: no such line; known are {known}")
    return found


def sweep_lines(study: Study, name: str) -> list[Line]:
    """The line of this name at the study's epsilon; `alone` is one per site. Raises ConfigurationError."""
    if name not in SWEEP_LINES:
        near = difflib.get_close_matches(name, SWEEP_LINES, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"known are {', '.join(SWEEP_LINES)}"
        raise ConfigurationError(f"lines: no line `{name}`; {hint}")
    how = SWEEP_LINES[name][0]
    if name == "alone":
        return [Line(f"alone: {site}", alone(study, site)) for site in study.sites]
    makers = {
        "pooled-private": pooled,
        "pooled-no-privacy": pooled,
        "fedavg-one-step": one_step,
        "fedavg-local": local_steps,
        "naive": naive,
        "logistic": logistic,
    }
    return [Line(name, makers.get(name, lambda same: same)(study), how)]


def _changed(study: Study, suffix: str, **changes: Any) -> Study:
    """The study with sections changed: mappings are merged key by key (`sites` is replaced), checks run again."""
    data: dict[str, Any] = study.model_dump(mode="json")
    for section, change in changes.items():
        data[section] = data[section] | change if isinstance(change, dict) and section != "sites" else change
    if suffix:
        data["name"] = f"{study.name}-{suffix}"
    return parse(data, Study, f"line {suffix or study.name}")
