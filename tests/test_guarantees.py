"""docs/guarantees.md names files, functions and tests: all of them are there, and each part of a promise has both."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`([\w/.-]+\.\w+(?:::[\w.]+)?)`", PAGE)))
PARTS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if re.match(r"\| (?!part )[^|]+\|[^|]*`[^|]*\|", line)
]
PROMISES = 12


@cache
def tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def is_there(place: str) -> bool:
    """Whether `file` or `file::Class.name` is in the repository."""
    file, _, name = place.partition("::")
    if not (ROOT / file).is_file():
        return False
    body = tree(file).body if name else []
    for part in name.split(".") if name else []:
        found = [node for node in body if part in names_of(node)]
        if not found:
            return False
        body = getattr(found[0], "body", [])
    return True


def names_of(node: ast.stmt) -> set[str]:
    """What a statement gives a name to."""
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {node.name} if isinstance(node, ast.FunctionDef | ast.ClassDef) else set()


@pytest.mark.parametrize("place", NAMED)
def test_what_the_page_names_is_there(place: str) -> None:
    """A file, function, class or test that the page names exists under that very name."""
    assert is_there(place)


def test_a_place_that_is_gone_would_be_noticed() -> None:
    """The check above tells a file, a function and a method that are there from ones that are not."""
    assert is_there("common/training.py::train_round")
    assert is_there("common/privacy/plan.py::Plan.divisor")
    assert not is_there("common/trainings.py")
    assert not is_there("common/training.py::train_rounds")
    assert not is_there("common/privacy/plan.py::Plan.divisors")


def test_each_part_of_a_promise_is_enforced_and_held_somewhere() -> None:
    """Twelve promises; each row of their tables names code outside the tests, and at least one test function."""
    sections = re.findall(r"^## (\d+)\. ", PAGE, re.MULTILINE)
    assert sections == [str(number) for number in range(1, PROMISES + 1)]
    assert len(PARTS) > 4 * PROMISES - 10
    for part, enforced, held, _ in (row for row in PARTS if len(row) == 4):
        code = re.findall(r"`([\w/.]+::[\w.]+)`", enforced)
        assert code, part
        assert not [place for place in code if place.startswith("tests/")], part
        assert re.search(r"`tests/[\w/]+\.py::[Tt]est\w+`", held), part


def test_every_assumption_and_limit_that_is_used_is_listed() -> None:
    """A1, N1 and so on each have a row of their own."""
    listed = set(re.findall(r"^\| ([AN]\d+) \|", PAGE, re.MULTILINE))
    assert set(re.findall(r"\b([AN]\d+)\b", PAGE)) == listed
