"""Flower's own engine against the local grid: one seam, the same weights."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

from common.errors import ConfigurationError
from common.models.network import build_network
from common.training import state_of
from server.rounds import run
from server.strategy import FederatedAveraging
from simulations.experiment import one_thread
from simulations.flower_engine import run_on_flower
from simulations.hospitals import Hospitals
from simulations.local_grid import LocalGrid
from simulations.seeded import Silent
from tests.small import small_study

STUDY = small_study()


def hospitals_of(cohort: dict[str, Path]) -> Hospitals:
    return Hospitals(STUDY, {name: cohort[name] for name in STUDY.sites}, 7, Silent)


def test_without_ray_the_remedy_is_named(cohort: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower would end the process; here a missing Ray is one line that says what to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'wardround\[ray\]'"):
        run_on_flower(hospitals_of(cohort))


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra `ray`)")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray", "ignore::FutureWarning:ray")
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_flowers_engine_gives_the_weights_of_the_local_grid(
    cohort: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A noiseless seeded study has the same final weights on Ray as here; Ray reports nothing and is gone after."""
    import ray

    for name in ("PYTHONPATH", "RAY_USAGE_STATS_ENABLED"):  # Flower and the engine set them: put back afterwards
        monkeypatch.setenv(name, os.environ.get(name, ""))
    hospitals = hospitals_of(cohort)
    with one_thread(), LocalGrid(hospitals.open, STUDY.sites) as grid:
        strategy = FederatedAveraging(STUDY, state_of(build_network(STUDY, hospitals.seed)), lambda: grid.roster)
        expected = run(grid, strategy, rounds=STUDY.training.rounds)
    found = run_on_flower(hospitals)
    assert not ray.is_initialized()
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert found.keys() == expected.keys()
    assert all(np.allclose(found[name], expected[name], rtol=0, atol=1e-6) for name in expected)
