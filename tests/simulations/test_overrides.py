"""Command-line changes to a study pass the same checks as its file."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import ConfigurationError
from common.study import Simulation, Study
from simulations.overrides import override
from simulations.run_folder import RESEARCH, stamps
from tests.common.test_study import study


def changed(epsilon: str | None = None, seed: int | None = None) -> Study:
    return override(study(), epsilon=epsilon, seed=seed, source="study.yaml")


def test_nothing_changed_is_the_same_study() -> None:
    """Without changes the study comes back equal."""
    assert changed() == study()
    assert changed().digest() == study().digest()


@pytest.mark.parametrize(
    ("text", "epsilon"), [("3", 3.0), ("0.5", 0.5), ("1e-1", 0.1), ("none", None), ("None", None), ("inf", None)]
)
def test_another_epsilon_is_another_study(text: str, epsilon: float | None) -> None:
    """A number, or `none` for no noise; nothing but epsilon changes, and with it the digest."""
    other = changed(epsilon=text)
    assert other.privacy.epsilon == epsilon
    assert other.privacy.model_copy(update={"epsilon": 3.0}) == study().privacy
    assert (other.digest() == study().digest()) == (epsilon == 3.0)


def test_another_seed_is_the_same_study() -> None:
    """The seed belongs to the simulation, not to the terms that a site pins."""
    assert changed(seed=5).simulation.seed == 5
    assert changed(seed=5).digest() == study().digest()


def test_records_take_the_place_of_a_synthetic_cohort() -> None:
    """`--data` beside a cohort: the run says that real records were treated as public, and its study names them."""
    synthetic = override(study(), source="study.yaml").model_copy(update={"simulation": Simulation(cohort="medium")})
    assert RESEARCH not in stamps(synthetic)
    real = override(synthetic, data=Path("records"), source="study.yaml")
    assert real.simulation.cohort is None
    assert real.simulation.data == str(Path("records").absolute())
    assert RESEARCH in stamps(real)
    assert real.digest() == synthetic.digest()


@pytest.mark.parametrize("text", ["0", "-1", "nan", "Infinity", "-inf", "three", "", "1,5"])
def test_an_epsilon_that_is_none_is_refused(text: str) -> None:
    """Not positive, not finite or no number: one clear error."""
    with pytest.raises(ConfigurationError, match="epsilon"):
        changed(epsilon=text)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    """The study file's bounds hold for the command line."""
    with pytest.raises(ConfigurationError, match=r"simulation\.seed"):
        changed(seed=seed)
