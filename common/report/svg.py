"""A chart as inline SVG: text stays text, colours come from the page's style sheet, so it prints and goes dark with it.

Made by hand instead of by matplotlib: its SVG has no title or description, fixed colours and a size that a phone
shrinks until it cannot be read, and repairing that costs more than drawing lines. Each chart is drawn twice, for a
wide and a narrow page, and the style sheet shows one of them: letters keep their size on a phone.

Nothing is told by colour alone: a series has a letter at its right end, a marker and a dash.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from xml.etree import ElementTree

from common.report.chart import LETTERS, Chart, Point, Series

NEAR = 20.0  # series that end so close to each other share a column of letters
COLOURS = 6  # classes c0..c5 of the style sheet
DASHES = ("", "7 3", "2 3", "10 3 2 3", "5 5", "12 4")
MARKERS = (  # around (0, 0), about 4 units in each direction; every second one is drawn hollow
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z",  # circle
    "M-3.6 -3.6H3.6V3.6H-3.6Z",  # square
    "M0 -4.6L4.4 3.4H-4.4Z",  # triangle
    "M0 -5L5 0L0 5L-5 0Z",  # diamond
    "M0 4.6L4.4 -3.4H-4.4Z",  # triangle, point down
    "M-1.5 -4.5H1.5V-1.5H4.5V1.5H1.5V4.5H-1.5V1.5H-4.5V-1.5H-1.5Z",  # plus
    "M-4.5 -3L-3 -4.5L0 -1.5L3 -4.5L4.5 -3L1.5 0L4.5 3L3 4.5L0 1.5L-3 4.5L-4.5 3L-1.5 0Z",  # cross
)


@dataclass(frozen=True)
class Format:
    """Size of a drawing in units, which are CSS pixels at the width it is made for."""

    name: str
    width: int
    height: int
    dodge: float  # how far apart the bars of two series at one place stand
    left: int = 44
    right: int = 30
    top: int = 30
    bottom: int = 46
    text: int = 13


WIDE = Format("wide", 720, 430, dodge=7)
NARROW = Format("narrow", 330, 400, dodge=3.2, left=38, right=22)


def style_of(index: int) -> tuple[str, str, str, bool]:
    """(letter, dash, marker path, hollow) of the series at this place; no two of the first 42 are alike."""
    return LETTERS[index], DASHES[index % len(DASHES)], MARKERS[index % len(MARKERS)], index % 2 == 1


def draw(chart: Chart, shape: Format) -> str:
    """The chart as one `<svg role="img">` with title and description; markup, names escaped."""
    return _Drawing(chart, shape).markup()


def swatch(index: int, *, level: bool, joined: bool = True) -> str:
    """A small sample of a series' line and marker, for the legend; hidden from screen readers, which read the words."""
    svg = ElementTree.Element("svg", {"class": f"swatch c{index % COLOURS}", "viewBox": "0 0 34 14"})
    svg.set("aria-hidden", "true")
    svg.set("focusable", "false")
    _, dash, marker, hollow = style_of(index)
    if joined:
        ElementTree.SubElement(svg, "path", _line_of("M1 7H33", dash, "level" if level else "line"))
    if not level:
        shape = {"class": "marker hollow" if hollow else "marker", "d": marker, "transform": "translate(17 7)"}
        ElementTree.SubElement(svg, "path", shape)
    return _text_of(svg)


class _Drawing:
    """One drawing in the making."""

    def __init__(self, chart: Chart, shape: Format) -> None:
        self.chart, self.shape = chart, shape
        self.right = shape.width - shape.right
        self.foot = shape.height - shape.bottom
        ids = f"{chart.name}-{shape.name}"
        self.svg = ElementTree.Element(
            "svg",
            {
                "class": f"chart {shape.name}",
                "role": "img",
                "viewBox": f"0 0 {shape.width} {shape.height}",
                "aria-labelledby": f"{ids}-title",
                "aria-describedby": f"{ids}-desc",
            },
        )
        ElementTree.SubElement(self.svg, "title", {"id": f"{ids}-title"}).text = chart.title
        ElementTree.SubElement(self.svg, "desc", {"id": f"{ids}-desc"}).text = chart.described()

    def markup(self) -> str:
        self._axes()
        ends = [(LETTERS[index], *self._series(index, series)) for index, series in enumerate(self.chart.series)]
        together: list[list[tuple[str, float, float]]] = []
        for end in sorted(ends, key=lambda end: end[1]):
            if together and end[1] - together[-1][-1][1] < NEAR:
                together[-1].append(end)
            else:
                together.append([end])
        for letters in together:
            self._letters(letters)
        return _text_of(self.svg)

    def _letters(self, letters: list[tuple[str, float, float]]) -> None:
        """The letters of series that end side by side, right of all of them, one below the other, with leaders."""
        x = max(end for _, end, _ in letters) + 7
        for (letter, _, y), place in zip(letters, spread([y for *_, y in letters], self.shape.text + 1), strict=True):
            self._path(f"M{x:.1f} {y:.1f}L{x + 7:.1f} {place:.1f}", "leader")
            self._words(letter, x + 9, place + 4, "letter")

    def x(self, value: float) -> float:
        axis = self.chart.x
        return self.shape.left + (value - axis.low) / (axis.high - axis.low) * (self.right - self.shape.left)

    def y(self, value: float) -> float:
        axis = self.chart.y
        return self.foot - (value - axis.low) / (axis.high - axis.low) * (self.foot - self.shape.top)

    def _axes(self) -> None:
        left, top, text = self.shape.left, self.shape.top, self.shape.text
        for value, words in self.chart.y.ticks:
            self._path(f"M{left} {self.y(value):.1f}H{self.right}", "grid")
            self._words(words, left - 6, self.y(value) + 4, "tick end")
        for value, words in self.chart.x.ticks:
            self._path(f"M{self.x(value):.1f} {self.foot}v5", "axis")
            self._words(words, self.x(value), self.foot + 7 + text, "tick middle")
        if self.chart.gap is not None:
            at = self.x(self.chart.gap)
            self._path(f"M{at:.1f} {top}V{self.foot}", "gap")
        self._path(f"M{left} {self.foot}H{self.right}", "axis")
        self._words(self.chart.y.label, 4, text + 2, "label")
        self._words(self.chart.x.label, (left + self.right) / 2, self.shape.height - 6, "label middle")
        if self.chart.diagonal:
            low, high = max(self.chart.x.low, self.chart.y.low), min(self.chart.x.high, self.chart.y.high)
            self._path(f"M{self.x(low):.1f} {self.y(low):.1f}L{self.x(high):.1f} {self.y(high):.1f}", "gap")

    def _series(self, index: int, series: Series) -> tuple[float, float]:
        """Draw a series; where in the drawing it ends."""
        _, dash, marker, hollow = style_of(index)
        group = ElementTree.SubElement(self.svg, "g", {"class": f"c{index % COLOURS}" + " strong" * series.strong})
        if series.level:
            y = self.y(series.points[0].y)
            ElementTree.SubElement(group, "path", _line_of(f"M{self.shape.left} {y:.1f}H{self.right}", dash, "level"))
            return self.right - 5.0, y
        # Each series stands a little beside its place: bars of several at one place would hide one another.
        measured = [i for i, other in enumerate(self.chart.series) if any(p.low is not None for p in other.points)]
        rank = measured.index(index) if index in measured else (len(measured) - 1) / 2
        shift = self._dodge(len(measured)) * (rank - (len(measured) - 1) / 2)
        points = sorted(series.points, key=lambda point: point.x)
        places = [(self.x(point.x) + shift, self.y(point.y)) for point in points]
        line = "".join(
            f"{'M' if i == 0 or self._apart(points[i - 1], points[i]) else 'L'}{x:.1f} {y:.1f}"
            for i, (x, y) in enumerate(places)
        )
        if series.joined:
            ElementTree.SubElement(group, "path", _line_of(line, dash, "line"))
        for point, (x, y) in zip(points, places, strict=True):
            if point.low is not None and point.high is not None:
                low, high = self.y(point.low), self.y(point.high)
                bar = f"M{x - 2.5:.1f} {low:.1f}h5m-2.5 0V{high:.1f}m-2.5 0h5"
                ElementTree.SubElement(group, "path", {"class": "bar", "d": bar})
            shape = {"class": "marker hollow" if hollow else "marker", "d": marker}
            ElementTree.SubElement(group, "path", {**shape, "transform": f"translate({x:.1f} {y:.1f})"})
        return places[-1]

    def _dodge(self, number: int) -> float:
        """How far apart bars at one place stand: never so far that they reach into the next place."""
        places = sorted(
            {self.x(point.x) for series in self.chart.series if not series.level for point in series.points}
        )
        nearest = min((b - a for a, b in pairwise(places)), default=self.shape.width)
        return min(self.shape.dodge, 0.8 * nearest / max(number, 1))

    def _apart(self, before: Point, after: Point) -> bool:
        return self.chart.gap is not None and before.x < self.chart.gap < after.x

    def _path(self, d: str, kind: str) -> None:
        ElementTree.SubElement(self.svg, "path", {"class": kind, "d": d})

    def _words(self, words: str, x: float, y: float, kind: str) -> None:
        # What the drawing says is in its description; its letters and numbers one by one would only be noise.
        at = {"class": kind, "x": f"{x:.1f}", "y": f"{y:.1f}", "aria-hidden": "true"}
        ElementTree.SubElement(self.svg, "text", at).text = words


def spread(places: list[float], apart: float) -> list[float]:
    """The places moved as little as needed to be at least `apart` from each other, in the same order of height.

    Clusters that touch are merged and centred on the mean of what they want (pool adjacent violators).
    """
    order = sorted(range(len(places)), key=lambda i: places[i])
    clusters: list[list[int]] = []
    for index in order:
        clusters.append([index])
        while len(clusters) > 1 and _first(clusters[-1], places, apart) - _last(clusters[-2], places, apart) < apart:
            clusters[-2:] = [clusters[-2] + clusters[-1]]
    moved = list(places)
    for cluster in clusters:
        for rank, index in enumerate(cluster):
            moved[index] = _first(cluster, places, apart) + rank * apart
    return moved


def _first(cluster: list[int], places: list[float], apart: float) -> float:
    return sum(places[index] for index in cluster) / len(cluster) - apart * (len(cluster) - 1) / 2


def _last(cluster: list[int], places: list[float], apart: float) -> float:
    return _first(cluster, places, apart) + apart * (len(cluster) - 1)


def _line_of(d: str, dash: str, kind: str) -> dict[str, str]:
    return {"class": kind, "d": d} | ({"stroke-dasharray": dash} if dash else {})


def _text_of(svg: ElementTree.Element) -> str:
    return ElementTree.tostring(svg, encoding="unicode")
