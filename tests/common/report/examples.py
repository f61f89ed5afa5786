"""A page with one of everything, and names that would do harm if anything were passed through unescaped."""

from __future__ import annotations

from common.report.chart import Axis, Chart, Point, Series
from common.report.page import Bullets, Cell, Figure, Listing, Notice, Page, Paragraph, Section, Table

HOSTILE = (
    """</title></style></svg><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>"'&{{7*7}}"""
)


def small_chart(name: str = "curve") -> Chart:
    """Three series: one measured with intervals and a gap, one without, and a level."""
    return Chart(
        name=name,
        title=f"Chart of {HOSTILE}",
        x=Axis("epsilon", -1, 3, ((0.0, "1"), (1.0, HOSTILE), (2.0, "none"))),
        y=Axis("AUROC", 0.4, 0.9, ((0.5, "0.5"), (0.7, "0.7"))),
        series=(
            Series(HOSTILE, (Point(1, 0.7, 0.65, 0.75), Point(0, 0.6, 0.55, 0.65), Point(2, 0.8)), strong=True),
            Series("other", (Point(0, 0.5), Point(1, 0.62))),
            Series("best possible", (Point(0, 0.85),), level=True),
        ),
        gap=1.5,
        diagonal=HOSTILE,
    )


def small_table(name: str = "curve-data") -> Table:
    """A table with a number, a masked cell and a hostile one."""
    rows = ((Cell(HOSTILE), Cell("0.700", 0.7, 0.65, 0.75, HOSTILE)), (Cell("=1+1"), Cell("not shown")))
    return Table(name, f"Numbers of {HOSTILE}", (HOSTILE, "AUROC"), rows, HOSTILE)


def small_page() -> Page:
    """One of everything."""
    return Page(
        title=f"Report of {HOSTILE}",
        stamps=(Notice(HOSTILE, HOSTILE),),
        sections=(
            Section(
                "first",
                f"Section {HOSTILE}",
                (
                    Paragraph(HOSTILE, lead=True),
                    Notice("A note", HOSTILE, kind="note"),
                    Bullets((HOSTILE, (HOSTILE, HOSTILE))),
                    Figure(small_chart(), HOSTILE, small_table()),
                ),
            ),
            Section("second", "Another", (small_table("other-data"), Listing("file", HOSTILE, HOSTILE))),
        ),
        made_by=HOSTILE,
    )
