"""Flower's own engine against the local grid: one seam, the same weights."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict

from common.errors import ConfigurationError
from common.models.network import build_network
from common.records import reply_from_message
from common.training import state_of
from common.weights import from_bytes
from server.rounds import run
from server.strategy import FederatedAveraging
from simulations import flower_engine
from simulations.experiment import one_thread
from simulations.hospitals import Hospitals
from simulations.local_grid import LocalGrid
from simulations.seeded import Silent
from tests.small import request_message, small_study

ROOT = Path(__file__).resolve().parents[2]
STUDY = small_study()

# In a process of its own: Ray leaves environment variables, signal handlers and uncollected children behind.
ON_RAY = """
import json, os, sys
from pathlib import Path
from common.weights import to_bytes
from simulations.flower_engine import run_on_flower
from simulations.hospitals import Hospitals
from simulations.seeded import Silent
from tests.small import small_study

directories = {name: Path(path) for name, path in json.loads(sys.argv[1]).items()}
weights = run_on_flower(Hospitals(small_study(), directories, 7, Silent))
Path(sys.argv[2]).write_bytes(to_bytes(weights))

import ray
from flwr.supercore import telemetry
print(json.dumps([ray.is_initialized(), os.environ["RAY_USAGE_STATS_ENABLED"], telemetry.FLWR_TELEMETRY_ENABLED]))
"""


def hospitals_of(cohort: dict[str, Path]) -> Hospitals:
    return Hospitals(STUDY, {name: cohort[name] for name in STUDY.sites}, 7, Silent)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra `ray`)")
def test_flowers_engine_gives_the_weights_of_the_local_grid(cohort: dict[str, Path], tmp_path: Path) -> None:
    """A noiseless seeded study ends at the same weights on Ray as here; nobody is told, and Ray is shut down."""
    hospitals = hospitals_of(cohort)
    directories = json.dumps({name: str(path) for name, path in hospitals.directories.items()})
    arguments = [sys.executable, "-c", ON_RAY, directories, str(tmp_path / "weights")]
    finished = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert json.loads(finished.stdout.splitlines()[-1]) == [False, "0", "0"]
    with one_thread(), LocalGrid(hospitals.open, STUDY.sites) as grid:
        strategy = FederatedAveraging(STUDY, state_of(build_network(STUDY, hospitals.seed)), lambda: grid.roster)
        expected = run(grid, strategy, rounds=STUDY.training.rounds)
    found = from_bytes((tmp_path / "weights").read_bytes())
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_a_ledger_travels_with_the_context_to_another_actor(
    cohort: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site that moves to another process answers a round that it has released with the stored bytes."""
    context = Context(run_id=1, node_id=2, node_config={"partition-id": 1}, state=RecordDict(), run_config={})
    app = flower_engine._client_app(hospitals_of(cohort), ["east", "north"])
    weights = state_of(build_network(STUDY, 1))

    def ask(**actor: object) -> Message:
        monkeypatch.setattr(flower_engine, "_opened", actor)
        return app(message=request_message(STUDY, weights), context=context)

    one, other = reply_from_message(ask()), reply_from_message(ask())
    assert list(flower_engine._opened) == ["north"]
    assert one.update is not None
    assert other.update is not None
    assert all(np.array_equal(one.update[name], other.update[name]) for name in one.update)
    assert flower_engine._opened["north"].ledger.steps_taken(STUDY.digest()) == 1  # type: ignore[attr-defined]  # in memory


def test_without_ray_the_remedy_is_named(cohort: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower would end the process; here a missing Ray is one line that says what to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'wardround\[ray\]'"):
        flower_engine.run_on_flower(hospitals_of(cohort))
