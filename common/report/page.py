"""What a report consists of, as plain values: sections of paragraphs, notices, lists, tables, figures and listings.

A page knows nothing of HTML, and nothing of what it reports. `html.render` makes one offline file of it and
`data.to_json` and `data.to_csv` the same content for programs, so the three cannot disagree.

Decisions a reader would question:

- A cell holds its number and its text. The text is for people (rounded, masked), the number for programs; a number
  that is not finite is refused here, so that no NaN can ever be printed.
- A figure always carries its data as a table and a sentence that says what it shows: there is no way to make one
  without a text alternative. The description of the drawing is written by `svg`, from the same points.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from common.errors import ConfigurationError
from common.report.chart import Chart

Value = str | int | float | bool | None


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: what a person reads.
        value: the same as data; None where there is no number.
        low, high: its 95 % interval, where it has one.
        note: small print below the text, such as the interval in words.
    """

    text: str
    value: Value = None
    low: float | None = None
    high: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        for number in (self.value, self.low, self.high):
            if isinstance(number, float) and not math.isfinite(number):
                raise ConfigurationError(f"report: a cell with the number {number}; write None and say why in its text")


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of plain words; `lead` makes it the section's large first one."""

    text: str
    lead: bool = False


@dataclass(frozen=True)
class Notice:
    """Something that must not be overlooked. `title` says what kind, in words, so colour is not needed."""

    title: str
    text: str
    kind: Literal["warning", "note"] = "warning"


@dataclass(frozen=True)
class Bullets:
    """A list of short points; each is text, or a (term, explanation) pair."""

    items: tuple[str | tuple[str, str], ...]


@dataclass(frozen=True)
class Table:
    """A table with a caption. The first cell of each row heads the row.

    Attributes:
        name: a word that is unique on the page: its id in HTML, its name in JSON and CSV.
        columns: headings, one per cell of a row.
        note: what a reader must know to read it, below the caption.
    """

    name: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    def __post_init__(self) -> None:
        _check_name(self.name)
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ConfigurationError(
                    f"report: table {self.name} has {len(self.columns)} columns and a row of {len(row)} cells"
                )


@dataclass(frozen=True)
class Figure:
    """A chart with what it says in a sentence, and its numbers as a table."""

    chart: Chart
    caption: str
    data: Table


@dataclass(frozen=True)
class Listing:
    """Text shown as it is: a command, or a configuration. `name` as in Table."""

    name: str
    caption: str
    text: str

    def __post_init__(self) -> None:
        _check_name(self.name)


Block = Paragraph | Notice | Bullets | Table | Figure | Listing


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it; `name` is its id, unique on the page."""

    name: str
    heading: str
    blocks: tuple[Block, ...]

    def __post_init__(self) -> None:
        _check_name(self.name)


@dataclass(frozen=True)
class Page:
    """A whole report.

    Attributes:
        title: the only first-level heading.
        stamps: what must be said beside every number of the page: below its title, and their own titles at the foot
            of every printed sheet, which may be handed on alone.
        sections: in the order of reading.
        made_by: one line at the foot.
    """

    title: str
    stamps: tuple[Notice, ...]
    sections: tuple[Section, ...]
    made_by: str

    def __post_init__(self) -> None:
        names = [section.name for section in self.sections]
        names += [table.name for table in self.tables()] + [listing.name for listing in self.listings()]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigurationError(f"report: the name {twice[0]} appears twice; every section and table has its own")

    def blocks(self) -> list[Block]:
        """Every block, in the order of reading."""
        return [block for section in self.sections for block in section.blocks]

    def tables(self) -> list[Table]:
        """Every table, those of figures included."""
        found = []
        for block in self.blocks():
            if isinstance(block, Table):
                found.append(block)
            elif isinstance(block, Figure):
                found.append(block.data)
        return found

    def listings(self) -> list[Listing]:
        """Every listing."""
        return [block for block in self.blocks() if isinstance(block, Listing)]


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise ConfigurationError(f"report: {name!r} must be a lower-case word; it becomes an id of the page")
