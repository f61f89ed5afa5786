"""A mutant: a known mistake, written into the product's source on purpose, and the tests that must notice.

Decisions a reader would question:

- Each mutant was chosen because somebody made the mistake, or because it is one line away. Tools that change operators
  at random were left out: they find untested lines, and most of what they make is no mistake that anybody would make.
- A change is text that must stand in its file exactly once. A mutant that the source has outgrown is an error, not a
  silent pass; line numbers, and fuzzy patches, would apply to the wrong place.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Severity = Literal["total", "high", "medium"]


class StaleMutantError(Exception):
    """The text that a mutant changes does not stand in the source exactly once."""


@dataclass(frozen=True)
class Change:
    """In `file`, `old` becomes `new`."""

    file: str
    old: str
    new: str

    def applied(self, text: str) -> str:
        """The file's text with the mistake. Raises StaleMutantError."""
        found = text.count(self.old)
        if found != 1:
            first = self.old.strip().splitlines()[0]
            raise StaleMutantError(f"{self.file}: `{first}` stands there {found} times, not once; correct the mutant")
        return text.replace(self.old, self.new)


@dataclass(frozen=True)
class Mutant:
    """A mistake, its change, and the tests that must fail.

    Attributes:
        name: for `--only`.
        mistake: in words, as docs/pitfalls.md prints it.
        source: who made it, or "one line away" where we know of nobody.
        severity: "total": no privacy is left; "high": no bound holds; "medium": a smaller bound, or another channel.
        prevention: what stands against it here.
        changes: one or more.
        tests: ids below tests/; each must fail, by an assertion.
        fast: among those that `.ci/run` tries.
    """

    name: str
    mistake: str
    source: str
    severity: Severity
    prevention: str
    changes: tuple[Change, ...]
    tests: tuple[str, ...]
    fast: bool = False

    def sources(self, root: Path) -> dict[str, str]:
        """The text of each changed file below `root`, with the mistake. Raises StaleMutantError."""
        texts: dict[str, str] = {}
        for change in self.changes:
            text = texts.get(change.file) or (root / change.file).read_text(encoding="utf-8")
            texts[change.file] = change.applied(text)
        return texts


def every_test_of(mutants: Iterable[Mutant]) -> list[str]:
    """Every test that some mutant names, once."""
    return sorted({test for mutant in mutants for test in mutant.tests})
