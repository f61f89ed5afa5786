"""A line chart as plain values: axes with their ticks, series with intervals, levels across the whole width.

Coordinates are the caller's: an axis of epsilon is drawn by giving each budget its place (its logarithm) and its tick
the words. Every series gets a letter, a marker and a dash of its own, in the order in which they are given, so that
none has to be told apart by colour.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from common.errors import ConfigurationError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Point:
    """A value at a place; `low` and `high` are its interval, drawn as a bar."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Points of one kind, joined by a line in the order of x.

    Attributes:
        level: one number across the whole width, drawn as a thin line without markers: nothing was measured there.
        strong: drawn thicker: what the report is about.
        joined: whether a line leads from point to point; not where x has no order.
    """

    name: str
    points: tuple[Point, ...]
    level: bool = False
    strong: bool = False
    joined: bool = True

    def __post_init__(self) -> None:
        for point in self.points:
            for number in (point.x, point.y, point.low, point.high):
                if number is not None and not math.isfinite(number):
                    raise ConfigurationError(f"report: series {self.name} holds {number}; leave such points out")
        if not self.points or (self.level and len(self.points) != 1):
            raise ConfigurationError(f"report: series {self.name} has {len(self.points)} points; a level has one")


@dataclass(frozen=True)
class Axis:
    """An axis: what it shows, where it begins and ends, and its ticks (place, words)."""

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ConfigurationError(f"report: axis {self.label} from {self.low} to {self.high} is empty")

    def words(self, place: float) -> str:
        """What stands at the tick of this place, else the number."""
        return next((words for at, words in self.ticks if at == place), f"{place:g}")


@dataclass(frozen=True)
class Chart:
    """A line chart.

    Attributes:
        name: unique on the page: the beginning of its ids.
        title: what it shows, in a few words.
        gap: no line is drawn across this x: what lies beyond is not on the same scale (`none` on an epsilon axis).
        diagonal: draw y = x as a thin line (calibration).
        decimals: how many a y is described with.
    """

    name: str
    title: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    gap: float | None = None
    diagonal: str = ""
    decimals: int = 3

    def __post_init__(self) -> None:
        if len(self.series) > len(LETTERS):
            raise ConfigurationError(f"report: chart {self.name} has {len(self.series)} series, at most {len(LETTERS)}")

    def described(self) -> str:
        """The drawing in words, from its own points: for whoever cannot see it."""
        parts = [f"Line chart. Across: {self.x.label}. Up: {self.y.label}."]
        for letter, series in zip(LETTERS, self.series, strict=False):
            if series.level:
                what = f"{series.points[0].y:.{self.decimals}f} throughout"
            else:
                points = sorted(series.points, key=lambda point: point.x)
                what = ", ".join(f"{p.y:.{self.decimals}f} at {self.x.words(p.x)}" for p in points)
            parts.append(f"{letter}, {series.name}: {what}.")
        return " ".join(parts)


def even_ticks(low: float, high: float, *, most: int = 6) -> tuple[tuple[float, str], ...]:
    """At most `most` + 1 round numbers from `low` to `high` (1, 2 or 5 times a power of ten apart), with words."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple((number * step, f"{number * step:,.{decimals}f}") for number in range(first, last + 1))
