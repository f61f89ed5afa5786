"""Each known mistake is noticed: a few here, all of them by `python -m tests.mutants` (and here with `-m full`)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mutants import page
from tests.mutants.catalogue import MUTANTS
from tests.mutants.mutant import Change, Mutant, StaleMutantError, every_test_of
from tests.mutants.scratch import ROOT, Scratch
from tests.mutants.witness import kind_of

FAST = [mutant for mutant in MUTANTS if mutant.fast]
SLOW = [mutant for mutant in MUTANTS if not mutant.fast]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_mutant_fits_the_source(mutant: Mutant) -> None:
    """Its text stands in the source exactly once, what it makes is Python, and a program that differs."""
    for file, text in mutant.sources(ROOT).items():
        before = (ROOT / file).read_text(encoding="utf-8")
        assert ast.dump(ast.parse(text)) != ast.dump(ast.parse(before))


def test_names_are_unique_and_tests_exist() -> None:
    """A mutant is asked for by name, and each test that it names is written down."""
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for test in every_test_of(MUTANTS):
        file, name = test.split("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), test


def test_the_page_has_the_mutants() -> None:
    """docs/pitfalls.md is what `python -m tests.mutants --write-table` writes."""
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.with_table(text, MUTANTS) == text


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scratch]:
    """One copy of the product for all."""
    with Scratch(tmp_path_factory.mktemp("mutants")) as scratch:
        yield scratch


def test_without_a_mistake_the_tests_pass(scratch: Scratch) -> None:
    """What fails on a mutant must pass on the product as it is."""
    assert scratch.unmutated(FAST) == ""


@pytest.mark.parametrize("mutant", FAST, ids=lambda mutant: mutant.name)
def test_a_mutant_is_caught(mutant: Mutant, scratch: Scratch) -> None:
    """Every test that it names fails on it, by an assertion."""
    assert scratch.verdict(mutant) == ""


@pytest.mark.full
def test_without_any_other_mistake_the_tests_pass(scratch: Scratch) -> None:
    """The same for those that take longer."""
    assert scratch.unmutated(SLOW) == ""


@pytest.mark.full
@pytest.mark.parametrize("mutant", SLOW, ids=lambda mutant: mutant.name)
def test_every_other_mutant_is_caught(mutant: Mutant, scratch: Scratch) -> None:
    """The same for those that take longer."""
    assert scratch.verdict(mutant) == ""


HARMLESS = Change("common/training.py", "MAX_ROWS = 16_384 ", "MAX_ROWS = 16_385 ")
BROKEN = Change("common/training.py", "    before = state_of(network)\n", "    before = state_off(network)\n")
NO_TEST = "common/test_training.py::test_that_nobody_wrote"


@pytest.mark.parametrize(
    ("change", "test", "says"),
    [
        (HARMLESS, FAST[0].tests[0], "did not fail"),
        (BROKEN, FAST[0].tests[0], "broke instead of failing: {'NameError'}"),
        (HARMLESS, NO_TEST, "was not collected"),
    ],
    ids=["survives", "breaks", "has no test"],
)
def test_what_is_not_caught_is_said(change: Change, test: str, says: str, scratch: Scratch) -> None:
    """A mutant that survives, that breaks its tests in another way, or whose test is gone counts as not caught."""
    mutant = Mutant("any", "any", "any", "medium", "any", (change,), (test,))
    assert says in scratch.verdict(mutant)
    assert (scratch.root / change.file).read_bytes() == (ROOT / change.file).read_bytes()


@pytest.mark.parametrize("old", ["nowhere in the file", "private"])
def test_a_stale_mutant_is_an_error(old: str) -> None:
    """Text that is gone, or that stands there twice, is never applied."""
    mutant = Mutant("any", "any", "any", "medium", "any", (Change("common/training.py", old, "new"),), ())
    with pytest.raises(StaleMutantError, match="not once; correct the mutant"):
        mutant.sources(ROOT)


def test_an_assertion_is_told_from_another_error() -> None:
    """A failed assertion, pytest's own failure, a group of nothing else; a group with another error is that error."""
    with pytest.raises(pytest.fail.Exception) as missing, pytest.raises(ValueError, match="never"):
        pass
    failed = [AssertionError(), missing.value]
    assert [kind_of(error) for error in failed] == ["assertion"] * 2
    assert kind_of(BaseExceptionGroup("many", failed)) == "assertion"
    assert kind_of(BaseExceptionGroup("many", [*failed, MemoryError()])) == "MemoryError"


def test_the_working_tree_is_not_the_copy(scratch: Scratch) -> None:
    """Mutants are written below a temporary folder only."""
    assert not scratch.root.is_relative_to(ROOT)
    assert Path(page.PAGE).is_relative_to(ROOT)
