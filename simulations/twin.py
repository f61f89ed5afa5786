"""A study's synthetic twin: its plan, recipe and network over made-up patients, at the sizes that the sites declared.

What a budget will cost a consortium can be tried before any hospital is asked. Only sizes, plan, recipe and network
are the study's; the patients are those of the preset `medium`.

Decisions a reader would question:

- The hospitals' habits are those of `medium`, dealt out by size: the largest site is its largest hospital, and after
  four the habits begin anew. A study over sites of medium's own sizes is `medium` itself.
- Features, task and records are the synthetic ones: made-up values of the study's own features would have labels that
  no record explains.
- The clip follows the rule of typical.py for these inputs, unless the study's inputs are synthetic already.
- A site of more than LARGEST patients is simulated with LARGEST: beyond that the curve is flat, and the time is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from common.schema import FeatureSchema
from common.study import Study
from common.terms import parse
from simulations.cohort import CODES, DIAGNOSIS_TASK
from simulations.recipe import PRESETS, Preset
from simulations.typical import typical_clip

LARGEST = 20_000
LEAST_HELD_OUT, MOST_HELD_OUT = 1000, 60_000  # of the smallest site, so that its score says something; of all sites
MAX_STEPS = 24  # records of `medium` have nine visits on average


@dataclass(frozen=True)
class Twin:
    """The synthetic study, and the hospitals that it is over."""

    study: Study
    preset: Preset


def synthetic_twin(study: Study) -> Twin:
    """The twin of a study. Raises ConfigurationError for a site whose name no virtual hospital can have."""
    sizes = {site: min(LARGEST, terms.declared_patients) for site, terms in study.sites.items()}
    by_size = sorted(sizes, key=lambda site: -sizes[site])
    habits = PRESETS["medium"].sites
    recipes = [
        replace(habits[place % len(habits)], name=site, patients=sizes[site]) for place, site in enumerate(by_size)
    ]
    total = sum(sizes.values())
    usual = PRESETS["medium"].held_out_ratio
    ratio = max(usual, min(LEAST_HELD_OUT / min(sizes.values()), MOST_HELD_OUT / total))
    prevalence = sum(recipe.recorded_prevalence * recipe.patients for recipe in recipes) / total
    features, records = synthetic_features(), {"max_steps": MAX_STEPS, "bin_hours": None}
    terms = study.model_dump(mode="json") | {
        "name": "twin",
        "task": {"name": DIAGNOSIS_TASK, "prevalence": round(prevalence, 2)},
        "features": features,
        "records": records,
        "sites": {site: {"declared_patients": size} for site, size in sizes.items()},
        "simulation": {"seed": study.simulation.seed},
    }
    made = parse(terms, Study, "synthetic twin")
    if (study.features.codes, list(study.features.values)) != (features.codes, list(features.values)):
        made = made.model_copy(update={"privacy": made.privacy.model_copy(update={"clip": typical_clip(made)})})
    return Twin(made, Preset("twin", tuple(recipes), held_out_ratio=ratio))


def fewer_rounds(study: Study, rounds: int) -> Study:
    """The study in fewer rounds: sigma follows, and the learning rate grows by the rule lr ~ 1 / sqrt(rounds)."""
    training = study.training
    rate = min(10.0, training.learning_rate * math.sqrt(training.rounds / rounds))
    changed = training.model_copy(update={"rounds": rounds, "learning_rate": rate})
    return study.model_copy(update={"training": changed})


def synthetic_features() -> FeatureSchema:
    """The inputs of configs/features/synthetic.yaml, which an installed package does not have; a test compares them."""
    basis = "defined by the generator"
    vital = {"centre": 0, "scale": 1, "unit": "standard units", "min": -20, "max": 20, "rate": 0.5, "basis": basis}
    return parse(
        {
            "version": 1,
            "name": "synthetic",
            "source": "Defined together with the generator (simulations/cohort.py); "
            "there are no patients behind these numbers.",
            "time_gap": {"unit_hours": 720, "centre": 0.7},
            "values": {code: vital for code in CODES if code.startswith("VITAL//")},
            "statics": {
                "AGE": {"centre": 62, "scale": 14, "unit": "years", "min": 0, "max": 120, "basis": basis},
                "SEX//F": {"present": True, "basis": basis},
            },
            "codes": [code for code in CODES if code.startswith("CODE//")],
        },
        FeatureSchema,
        "synthetic features",
    )
