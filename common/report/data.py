"""The content of a page for programs: JSON of everything, CSV of every number with the table, row and column it has."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

from common.report.page import Bullets, Cell, Figure, Listing, Notice, Page, Paragraph, Table

VERSION = 1
COLUMNS = ("table", "row", "column", "value", "low", "high", "text")
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would run instead of show


def to_json(page: Page) -> str:
    """The page as JSON: sections with their blocks in order; cells with their unrounded values."""
    data = {
        "version": VERSION,
        "title": page.title,
        "stamps": [_block(stamp) for stamp in page.stamps],
        "sections": [
            {"name": section.name, "heading": section.heading, "blocks": [_block(block) for block in section.blocks]}
            for section in page.sections
        ],
        "made_by": page.made_by,
    }
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def to_csv(page: Page) -> str:
    """Every cell of every table as a line: table, row (its first cell), column, value, low, high, text."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for table in page.tables():
        for head, *cells in table.rows:
            for column, cell in zip(table.columns[1:], cells, strict=True):
                text = f"{cell.text} {cell.note}".replace("\n", "; ").strip()
                line = (table.name, head.text, column, cell.value, cell.low, cell.high, text)
                writer.writerow([_harmless(part) for part in line])
    return out.getvalue()


def _block(block: object) -> dict[str, Any]:
    match block:
        case Paragraph(text=text):
            return {"paragraph": text}
        case Notice(title=title, text=text, kind=kind):
            return {"notice": title, "text": text, "kind": kind}
        case Bullets(items=items):
            return {"list": [item if isinstance(item, str) else {item[0]: item[1]} for item in items]}
        case Table():
            return _table(block)
        case Figure(chart=chart, caption=caption, data=data):
            return {"figure": chart.title, "caption": caption, "description": chart.described(), "data": _table(data)}
        case Listing(name=name, caption=caption, text=text):
            return {"listing": name, "caption": caption, "text": text}
        case _:
            raise TypeError(type(block).__name__)


def _table(table: Table) -> dict[str, Any]:
    return {
        "table": table.name,
        "caption": table.caption,
        "columns": list(table.columns),
        "rows": [[_cell(cell) for cell in row] for row in table.rows],
        "note": table.note,
    }


def _cell(cell: Cell) -> dict[str, Any]:
    known = {"value": cell.value, "low": cell.low, "high": cell.high, "note": cell.note or None}
    return {"text": cell.text, **{name: value for name, value in known.items() if value is not None}}


def _harmless(part: object) -> object:
    """Text that a spreadsheet would take for a formula, made to begin with an apostrophe."""
    return f"'{part}" if isinstance(part, str) and part.startswith(FORMULA) else part
