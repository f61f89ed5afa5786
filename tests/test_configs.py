"""Every study and feature file that is shipped loads, and its plan exists."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.privacy.accounting import epsilon_of
from common.schema import FeatureSchema
from common.study import load_study
from common.terms import load, read_yaml

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
STUDIES = sorted([*CONFIGS.glob("*.yaml"), *(CONFIGS / "studies").rglob("*.yaml")])
FEATURES = sorted((CONFIGS / "features").rglob("*.yaml"))


def name(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


@pytest.mark.parametrize("path", STUDIES, ids=name)
def test_every_study_loads_and_keeps_to_its_budget(path: Path) -> None:
    """A shipped study is valid, and its plan costs at most the epsilon it names, and not much less."""
    study = load_study(path)
    plan = study.plan()
    assert study.privacy.epsilon is not None  # what is shipped is private
    assert 0.99 * study.privacy.epsilon < epsilon_of(plan) <= study.privacy.epsilon
    assert sum(study.aggregation_weights().values()) == pytest.approx(1)


@pytest.mark.parametrize("path", FEATURES, ids=name)
def test_every_feature_file_loads(path: Path) -> None:
    """A shipped feature file is valid and describes at least one input."""
    assert load(path, FeatureSchema).n_dense > 0


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.y*ml")), ids=name)
def test_every_file_is_of_a_known_kind(path: Path) -> None:
    """Whatever stands under configs is strict YAML, ends in .yaml, and lies in a folder whose loader a test calls."""
    read_yaml(path)
    assert path.suffix == ".yaml"
    assert path in [*STUDIES, *FEATURES] or path.relative_to(CONFIGS).parts[0] in ("sites", "sweeps")


def test_something_is_shipped() -> None:
    """The folders are where this test looks for them."""
    assert CONFIGS / "demo.yaml" in STUDIES
    assert FEATURES
