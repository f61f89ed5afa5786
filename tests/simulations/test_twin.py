"""A study's synthetic twin: its sizes, plan and network; the preset's patients."""

from __future__ import annotations

import pytest

from common.schema import FeatureSchema
from common.study import load_study
from common.terms import load
from simulations.recipe import PRESETS
from simulations.twin import LARGEST, LEAST_HELD_OUT, fewer_rounds, synthetic_features, synthetic_twin
from simulations.typical import typical_clip
from tests.simulations.sweeps import ROOT

CONFIGS = ROOT / "configs"


def test_the_features_are_those_of_the_file() -> None:
    """What is written out in code is configs/features/synthetic.yaml, to the last code."""
    file = load(CONFIGS / "features" / "synthetic.yaml", FeatureSchema)
    assert synthetic_features().digest() == file.digest()


def test_the_twin_of_the_demo_is_the_demo() -> None:
    """A study over sites of `medium`'s sizes, names and inputs has `medium` as its twin, and keeps its terms."""
    demo = load_study(CONFIGS / "demo.yaml")
    twin = synthetic_twin(demo)
    assert twin.preset.sites == PRESETS["medium"].sites
    assert twin.preset.held_out_ratio == PRESETS["medium"].held_out_ratio
    assert twin.study.digest(without=frozenset({"name", "simulation"})) == demo.digest(
        without=frozenset({"name", "simulation"})
    )


def test_another_study_keeps_sites_plan_recipe_and_network() -> None:
    """Inputs and task become synthetic, the clip follows from them; sizes, budget, recipe and network stay."""
    study = load_study(CONFIGS / "physionet2012.yaml")
    twin = synthetic_twin(study).study
    assert twin.features.digest() == synthetic_features().digest()
    assert (twin.sites, twin.training, twin.model) == (study.sites, study.training, study.model)
    same = {"clip": 1.0}
    assert twin.privacy.model_copy(update=same) == study.privacy.model_copy(update=same)
    assert twin.privacy.clip == typical_clip(twin)


def test_small_sites_have_patients_enough_to_be_scored() -> None:
    """The smallest of some small sites is scored on a thousand held-out patients."""
    demo = load_study(CONFIGS / "demo.yaml")
    small = {site: terms.model_copy(update={"declared_patients": 200}) for site, terms in demo.sites.items()}
    preset = synthetic_twin(demo.model_copy(update={"sites": small})).preset
    assert min(site.patients for site in preset.sites) * preset.held_out_ratio == LEAST_HELD_OUT


def test_a_huge_site_is_simulated_smaller() -> None:
    """The time of a plan is bounded: no site is simulated with more than LARGEST patients."""
    demo = load_study(CONFIGS / "demo.yaml")
    huge = {site: terms.model_copy(update={"declared_patients": 90_000}) for site, terms in demo.sites.items()}
    twin = synthetic_twin(demo.model_copy(update={"sites": huge}))
    assert {site.patients for site in twin.preset.sites} == {LARGEST}
    assert {site.declared_patients for site in twin.study.sites.values()} == {LARGEST}


def test_fewer_rounds_raise_the_learning_rate() -> None:
    """A quarter of the rounds has twice the rate, and another plan."""
    demo = load_study(CONFIGS / "demo.yaml")
    quick = fewer_rounds(demo, 40)
    assert quick.training.learning_rate == pytest.approx(2 * demo.training.learning_rate)
    assert quick.plan().steps == 40
