"""Every example that is shipped loads, and every kind has one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from client.readers.formats import Extract, Format
from client.readers.reader import _READERS
from common.terms import load, parse
from tests.test_packaging import HEAVY, loaded_by

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = sorted((ROOT / "configs/sites").glob("extract-*.yaml"))
PAGE = ROOT / "docs/readers.md"
KINDS = {tag.__metadata__[0].tag for tag in get_args(get_args(Format)[0])}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_loads(path: Path) -> None:
    """An example is valid, and its name says its kind."""
    kind = load(path, Extract).format.kind
    assert path.name == f"extract-{kind.replace('_', '-')}.yaml"


def test_every_kind_has_a_reader_an_example_and_a_row_on_the_page() -> None:
    """What can be written under `kind:` is implemented, shown and explained."""
    assert set(_READERS) == KINDS
    assert {load(path, Extract).format.kind for path in EXAMPLES} == KINDS
    text = PAGE.read_text(encoding="utf-8")
    assert [kind for kind in KINDS if f"`{kind}`" not in text] == []


def test_the_yaml_of_the_page_loads() -> None:
    """What a reader copies from docs/readers.md is valid."""
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        parse(yaml.safe_load(block), Extract, str(PAGE))


def test_opening_a_site_file_does_not_load_what_reads_extracts() -> None:
    """The process that holds the connection reads `format:` too, and stays small."""
    assert loaded_by("import client.site_file, client.commands", ("polars", "pyarrow", "duckdb")) == []


def test_converting_needs_no_torch_and_a_folder_no_duckdb() -> None:
    """An extract can be converted on a machine that never trains."""
    modules = ", ".join(place.partition(":")[0] for place in _READERS.values())
    assert loaded_by(f"import client.readers.convert, {modules}", (*HEAVY, "duckdb")) == []
