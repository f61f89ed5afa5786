"""A pytest plugin that writes down how each test ended, and which copy of the product it ran on.

    python -m pytest -p tests.mutants.witness ..., with WITNESS=FILE in the environment

One JSON line per test that ran: its id, "passed", "assertion" or the class of what it raised. An assertion is a failed
`assert`, or pytest's own failure ("DID NOT RAISE"); a group of failures is an assertion if all of its members are.

Hypothesis draws the same examples every time and does not look for smaller ones: that a test fails is all we ask.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import Phase, settings

import common

WITNESS = "WITNESS"


def kind_of(error: BaseException) -> str:
    """Either "assertion", or the class of the first failure that is none."""
    if isinstance(error, BaseExceptionGroup):
        kinds = [kind_of(member) for member in error.exceptions]
        return next((kind for kind in kinds if kind != "assertion"), "assertion")
    return "assertion" if isinstance(error, AssertionError | pytest.fail.Exception) else type(error).__name__


def _write(**line: str) -> None:
    with Path(os.environ[WITNESS]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def pytest_configure() -> None:
    settings.register_profile("mutants", derandomize=True, database=None, phases=[Phase.explicit, Phase.generate])
    settings.load_profile("mutants")


def pytest_sessionstart() -> None:
    _write(product=str(Path(common.__file__).resolve().parent.parent))


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    if call.excinfo is not None:
        _write(test=item.nodeid, ended=kind_of(call.excinfo.value))
    elif call.when == "call":
        _write(test=item.nodeid, ended="passed")
