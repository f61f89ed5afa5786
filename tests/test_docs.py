"""The code in the docs runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
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
