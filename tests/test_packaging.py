"""The packages are ours alone, light where they must be, and quiet."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("server", "client", "common", "simulations")
HEAVY = ("torch", "opacus", "flwr")
LIGHT = [
    "common.errors",
    "common.terms",
    "common.study",
    "common.schema",
    "common.sequences",
    "common.metrics",
    "common.provenance",
    "common.privacy.plan",
    "common.privacy.accounting",
    "common.report.figures",
    "client.ledger",
    "client.ledger_file",
    "client.policy",
    "client.commands.budget",
    "client.readers.meds",
    "client.site_file",
    "client.state",
    "client.enrolment",
    "client.network",
    "client.stopping",
    "client.logs",
    "simulations.cohort",
    "simulations.sources",
]


def loaded_by(statement: str, names: tuple[str, ...]) -> list[str]:
    """Which of `names` a fresh interpreter has loaded after `statement`."""
    code = f"{statement}; import json, sys; print(json.dumps([n for n in {names!r} if n in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    found: list[str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_the_rooms_belong_to_this_distribution_alone(room: str) -> None:
    """No other installed distribution has a package `server`, `client`, `common` or `simulations`."""
    assert set(importlib.metadata.packages_distributions().get(room, ["wardround"])) == {"wardround"}
    package = importlib.import_module(room)
    assert package.__file__ is not None
    other_rooms = [Path(str(importlib.import_module(name).__file__)).parent.parent for name in ROOMS]
    assert {Path(package.__file__).parent.parent} == set(other_rooms)


def test_tests_are_a_package() -> None:
    """`tests/__init__.py` exists in every folder: without it two test files of one name would hide each other."""
    folders = {path.parent for path in (ROOT / "tests").rglob("*.py")}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_every_room_is_typed() -> None:
    """Each package carries the marker that pyproject promises to ship."""
    assert [room for room in ROOMS if not (ROOT / room / "py.typed").is_file()] == []


@pytest.mark.parametrize("module", LIGHT)
def test_what_a_site_checks_with_needs_no_torch(module: str) -> None:
    """Studies, records, metrics, accounting, ledger, readers and figures import neither torch, Opacus nor Flower."""
    assert loaded_by(f"import {module}", HEAVY) == []


def test_reading_and_pricing_a_study_needs_no_torch() -> None:
    """Loading the demo study and computing its plan stays light: `check` and `budget` start on a bare machine."""
    statement = (
        "from pathlib import Path; from common.study import load_study; load_study(Path('configs/demo.yaml')).plan()"
    )
    assert loaded_by(statement, HEAVY) == []


def test_the_front_door_is_light() -> None:
    """`import wardround` loads nothing but the standard library; a room is imported when it is asked for."""
    heavy = (*HEAVY, "polars", "numpy", "typer", "pydantic", "yaml", "dp_accounting", *ROOMS)
    assert loaded_by("import wardround", heavy) == []


@pytest.mark.parametrize("first", [*ROOMS, "common.records"])
def test_flower_is_told_to_reach_nobody(first: str) -> None:
    """Whichever room is imported first, Flower's telemetry and update check are off before Flower is imported."""
    code = (
        f"import {first}, os, sys; telemetry = sys.modules.get('flwr.supercore.telemetry');"
        "print(os.environ['FLWR_TELEMETRY_ENABLED'], os.environ['FLWR_DISABLE_UPDATE_CHECK'],"
        " telemetry.FLWR_TELEMETRY_ENABLED if 'flwr' in sys.modules else 'absent')"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FLWR_")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split() == ["0", "1", "0" if first == "common.records" else "absent"]
