"""The code in the docs runs as it stands."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from wardround import ROOMS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(path for path in (ROOT / "docs").glob("*.md") if "```python" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_examples_of_a_page_run(page: Path) -> None:
    """The Python blocks of a page, one after the other, are a program that ends well and prints its epsilon."""
    program = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"epsilon \d+\.\d\d\n", done.stdout), done.stdout


EVERY_PAGE = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]


def commands_of(page: str) -> list[list[str]]:
    """The `wardround ...` commands in the shell blocks of a page, as words."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    words = (shlex.split(part, comments=True) for block in blocks for part in re.split(r"\n|&&", block))
    return [found[1:] for found in words if found and found[0].endswith("wardround")]


@pytest.mark.parametrize("page", [page for page in EVERY_PAGE if commands_of(page)])
def test_every_command_of_a_page_exists(page: str) -> None:
    """Room, sub-command, arguments and options are those of the command line; tests/e2e/test_pages.py runs them."""
    for room, *words in commands_of(page):
        command: Any = typer.main.get_command(importlib.import_module(ROOMS[room][0]).app)
        name, chosen, rest = command.resolve_command(command.make_context(room, list(words)), words)
        chosen.make_context(name, rest)  # parses, and runs nothing


@pytest.mark.parametrize("page", EVERY_PAGE)
def test_files_and_tests_that_a_page_names_exist(page: str) -> None:
    """A path or test that the docs name is there."""
    text = (ROOT / page).read_text(encoding="utf-8")
    paths = re.findall(
        r"(?<![\w/.])((?:docs|common|client|server|simulations|tests|configs)/[\w/.-]+\.(?:md|py|yaml))", text
    )
    places = (ROOT, ROOT / "tests")  # a table of tests names them from there
    assert [path for path in paths if not any((place / path).is_file() for place in places)] == []
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    named = set(re.findall(r"\b(test_\w+)`", text)) - {path.stem for path in (ROOT / "tests").rglob("*.py")}
    assert [name for name in sorted(named) if f"def {name}(" not in sources] == []
