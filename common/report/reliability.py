"""Predicted against observed risk, drawn and as a table."""

from __future__ import annotations

from collections.abc import Sequence

from common.report.chart import Axis, Chart, Point, Series, even_ticks
from common.report.page import Cell, Figure, Table
from common.report.words import about
from common.scores import MIN_EVENTS, Bin

MASKED = Cell("not shown")


def reliability(bins: Sequence[Bin], title: str, caption: str, outcome: str) -> Figure | None:
    """The figure; None if no bin has enough labels of each kind to be shown.

    Args:
        bins: from the lowest to the highest risk.
        title: of the drawing.
        caption: what is drawn; how to read it is added.
        outcome: what a positive label means, such as `the diagnosis`.
    """
    if not any(_readable(part) for part in bins):
        return None
    words = (
        f"{caption} Groups of equally many predictions; bars: 95 % interval of the observed share. On the dotted line, "
        "risks are true."
    )
    return Figure(_chart(bins, title, outcome), words, _table(bins, outcome))


def _chart(bins: Sequence[Bin], title: str, outcome: str) -> Chart:
    points = [Point(b.predicted, b.observed, b.low, b.high) for b in bins if _readable(b)]
    top = min(1.0, -int(-10 * max([*(p.high or 0 for p in points), *(p.x for p in points)]) - 1) / 10)
    percent = tuple((value, f"{100 * value:.0f} %") for value, _ in even_ticks(0, top, most=5))
    return Chart(
        name="calibration-curve",
        title=title,
        x=Axis("predicted risk", 0, top, percent),
        y=Axis(f"observed share with {outcome}", 0, top, percent),
        series=(Series("Observed", tuple(points), strong=True),),
        diagonal="Risks that are true",
    )


def _table(bins: Sequence[Bin], outcome: str) -> Table:
    return Table(
        "calibration-data",
        "Predicted and observed risk, groups from the lowest to the highest risk",
        ("group", "predictions", "mean predicted risk", "observed"),
        tuple(
            (
                Cell(str(number)),
                about(part.sequences),
                Cell(f"{100 * part.predicted:.1f} %", part.predicted),
                Cell(
                    f"{100 * part.observed:.1f} %",
                    part.observed,
                    part.low,
                    part.high,
                    f"{100 * part.low:.1f} to {100 * part.high:.1f} %",
                )
                if _readable(part)
                else MASKED,
            )
            for number, part in enumerate(bins, start=1)
        ),
        f"Groups with fewer than {MIN_EVENTS} predictions with, or without, {outcome} are not shown.",
    )


def _readable(part: Bin) -> bool:
    """Whether a bin has enough sequences with and without the label to be shown."""
    positives = round(part.observed * part.sequences)
    return min(positives, part.sequences - positives) >= MIN_EVENTS
