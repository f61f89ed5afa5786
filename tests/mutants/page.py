"""The table of docs/pitfalls.md, made from the mutants."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tests.mutants.mutant import Mutant
from tests.mutants.scratch import ROOT

PAGE = ROOT / "docs" / "pitfalls.md"
BEGIN = "<!-- made by `python -m tests.mutants --write-table`: do not edit up to the end mark -->"
END = "<!-- end of what is made -->"


def table(mutants: Iterable[Mutant]) -> str:
    """One row for each mutant."""
    rows = ["| mistake | made by | severity | what prevents it here | held by (tests/) |", "|---|---|---|---|---|"]
    for m in mutants:
        tests = ", ".join(f"`{test}`" for test in m.tests)
        rows.append(f"| {m.mistake} (`{m.name}`) | {m.source} | {m.severity} | {m.prevention} | {tests} |")
    return "\n".join(rows)


def with_table(page: str, mutants: Iterable[Mutant]) -> str:
    """The page with its table made anew."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{table(mutants)}\n\n{END}{after}"


def write(mutants: Iterable[Mutant], page: Path = PAGE) -> None:
    """Make the table of the page anew."""
    page.write_text(with_table(page.read_text(encoding="utf-8"), mutants), encoding="utf-8")
