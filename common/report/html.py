"""A page as one HTML file that needs nothing else: no script, no request, system fonts. jinja2 is imported on use.

Every text is escaped by jinja2 (autoescape); the only markup that is passed through is the drawings' own, made by
ElementTree, which escapes too, and the style sheet. A Content-Security-Policy inside the file forbids script and
every request, so that a name that slipped through could still do nothing.
"""

from __future__ import annotations

import re
from pathlib import Path

from common.report.chart import LETTERS
from common.report.page import Bullets, Figure, Notice, Page, Paragraph, Table
from common.report.svg import NARROW, WIDE, draw, swatch

FOLDER = Path(__file__).parent
KINDS = {"paragraph": Paragraph, "notice": Notice, "bullets": Bullets, "table": Table, "figure": Figure}
THIN = (
    '<svg class="swatch" viewBox="0 0 34 14" aria-hidden="true" focusable="false"><path class="gap" d="M1 7H33"/></svg>'
)


def render(page: Page) -> str:
    """The page as a whole HTML document."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup  # comes with jinja2

    environment = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    for name, kind in KINDS.items():
        environment.tests[name] = lambda block, kind=kind: isinstance(block, kind)
    return environment.get_template("page.html.jinja").render(
        page=page,
        style=Markup((FOLDER / "page.css").read_text(encoding="utf-8")),  # noqa: S704 (our own file)
        foot=Markup(_plain(" ".join(stamp.title for stamp in page.stamps))),  # noqa: S704 (letters and spaces only)
        draw=lambda chart, shape: Markup(draw(chart, shape)),  # noqa: S704 (escaped by ElementTree)
        swatch=lambda index, series: Markup(swatch(index, level=series.level, joined=series.joined)),  # noqa: S704 (holds no text)
        thin=Markup(THIN),  # noqa: S704 (a constant)
        shapes=(WIDE, NARROW),
        letters=LETTERS,
    )


def _plain(text: str) -> str:
    """The text without any character that means something in a style sheet."""
    return re.sub(r"[^\w .,:;()-]", "", text)
