"""Numbers as a person reads them: rounded, masked, and never NaN."""

from __future__ import annotations

import math

from common.report.page import Cell

UNKNOWN = "unknown"
MINUS = "\u2212"


def score(value: float | None, low: float | None = None, high: float | None = None, *, decimals: int = 3) -> Cell:
    """A metric with its interval below it; `unknown` where there is no value."""
    if value is None or not math.isfinite(value):
        return Cell(UNKNOWN)
    note = ""
    if low is not None and high is not None:
        note = f"{fixed(low, decimals)} to {fixed(high, decimals)}"
    return Cell(fixed(value, decimals), value, low, high, note)


def fixed(value: float, decimals: int = 3) -> str:
    """The number with a true minus sign, which screen readers speak; no negative zero."""
    text = f"{abs(value):.{decimals}f}"
    return MINUS + text if value < 0 and float(text) else text


def signed(value: float | None, decimals: int = 3) -> Cell:
    """A difference with its sign."""
    if value is None or not math.isfinite(value):
        return Cell(UNKNOWN)
    return Cell(("+" if value > 0 else "") + fixed(value, decimals), value)


def whole(value: int) -> Cell:
    """A count that is public."""
    return Cell(f"{value:,}", value)


def about(value: int) -> Cell:
    """A count of people to the nearest ten, so that no two counts can be subtracted to find a small one."""
    rounded = 10 * round(value / 10)
    return Cell(f"about {rounded:,}", rounded)


def budget(epsilon: float | None) -> str:
    """An epsilon as it was set: `3`, `0.5`, or `none`."""
    return "none" if epsilon is None else f"{epsilon:g}"


def price(epsilon: float | None) -> Cell:
    """An epsilon that was computed, rounded up: what is printed is never less than what is spent."""
    if epsilon is None or not math.isfinite(epsilon):
        return Cell("no limit")
    up = math.ceil(epsilon * 1000) / 1000
    return Cell(f"{up:.3f}", up)


def size(count: float) -> Cell:
    """Bytes in the unit that a person would use."""
    for unit, factor in (("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return Cell(f"{count / factor:,.1f} {unit}", count)
    return Cell(f"{count:,.0f} bytes", count)


def listed(words: list[str]) -> str:
    """`a, b and c`."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1] if words else "none"
