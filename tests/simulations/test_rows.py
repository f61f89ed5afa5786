"""A row is what it was after it has been a file, and nothing else is taken for one."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest

from common.errors import DataError
from simulations.rows import POOLED, Estimate, Row
from tests.simulations.sweeps import ROOT, row


def test_a_row_survives_its_file() -> None:
    """Written and read again, a row is equal, plan and tuples and all."""
    one = row()
    assert Row.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_a_row_without_a_private_plan_survives_its_file() -> None:
    """What does not exist is None before and after."""
    one = row(plan=None, calibration=None, epsilon=None, spent=None, weighting=None, subgroups=(), rounds=())
    assert Row.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_time_is_no_part_of_the_identity() -> None:
    """Two runs of the same row are equal but for how long they took."""
    assert row(seconds=9.0, cpu_seconds=8.0).identity() == row().identity()
    assert row(seed=1).identity() != row().identity()


def test_a_number_that_json_lacks_is_refused() -> None:
    """NaN and infinity are written by nobody: they would be read by few."""
    with pytest.raises(ValueError, match="Out of range float"):
        row(spent=math.inf).to_json()


def test_sites_are_found_by_name() -> None:
    """`pooled` is the default; a site that was not scored is a KeyError."""
    assert row().site().site == POOLED
    assert row().site("north").auroc == Estimate(0.7, 0.6, 0.8)
    with pytest.raises(KeyError):
        row().site("nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version 99.*run it again"),
        ({"surprise": 1}, "unknown keys"),
        ({"plan": {"q": 1}}, "missing or unknown keys"),
        ({"sites": [{"site": "north"}]}, "missing or unknown keys"),
        ({"rounds": [3]}, "missing or unknown keys"),
    ],
)
def test_anything_else_is_one_clear_error(change: dict[str, Any], message: str) -> None:
    """Another version, or keys that a row has not, is a DataError with the remedy."""
    with pytest.raises(DataError, match=message):
        Row.from_json(row().to_json() | change)


def test_a_report_starts_fast() -> None:
    """Reading rows imports neither torch nor Flower nor Opacus, which take seconds."""
    program = "import sys, simulations.rows; print({'torch', 'flwr', 'opacus'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_missing_key_is_one_clear_error() -> None:
    """A row that lost a key is not read as one with a default."""
    data = row().to_json()
    del data["weights"]
    with pytest.raises(DataError, match="missing or unknown keys"):
        Row.from_json(data)
