"""The lines that stand beside a study on every curve: the same sites, budget and records, another recipe or model.

Each is a study made from the study, so that it runs through the same code and differs only in what its name says.
"""

from __future__ import annotations

from typing import Any

from common.errors import ConfigurationError
from common.study import Study
from common.terms import parse
from simulations.typical import typical_clip


def logistic(study: Study) -> Study:
    """Private logistic regression on last and mean inputs and codes: what the recurrence must beat."""
    flat = _changed(study, "logistic", model={"cell": "none", "pooling": ["last_input", "mean_input"]})
    return _changed(flat, "", privacy={"clip": typical_clip(flat)})


def local_steps(study: Study) -> Study:
    """`fedavg-local`: 16 rounds of 5 local Adam steps, averaged by declared patients. For slow links."""
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


def _changed(study: Study, suffix: str, **changes: Any) -> Study:
    """The study with sections changed: mappings are merged key by key (`sites` is replaced), checks run again."""
    data: dict[str, Any] = study.model_dump(mode="json")
    for section, change in changes.items():
        data[section] = data[section] | change if isinstance(change, dict) and section != "sites" else change
    if suffix:
        data["name"] = f"{study.name}-{suffix}"
    return parse(data, Study, f"line {suffix or study.name}")
