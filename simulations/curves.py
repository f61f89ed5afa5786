"""Rows -> mean and spread over seeds: the numbers of a curve, and the table at the end of a sweep."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from rich.table import Table

from simulations.rows import POOLED, Row, Setting


@dataclass(frozen=True)
class Point:
    """A line at one epsilon under one setting: AUROC of each seed on the held-out patients of `site`."""

    line: str
    settings: tuple[tuple[str, Setting], ...]
    epsilon: float | None
    aurocs: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.aurocs)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None for one seed."""
        return statistics.stdev(self.aurocs) if len(self.aurocs) > 1 else None


def points(rows: list[Row], site: str = POOLED) -> list[Point]:
    """One point per line, setting and epsilon, in the order of the rows; seeds without a score are left out."""
    found: dict[tuple[str, tuple[tuple[str, Setting], ...], float | None], list[float]] = {}
    for row in rows:
        auroc = row.site(site).auroc.value
        if auroc is not None:
            found.setdefault((row.line, tuple(row.settings.items()), row.epsilon), []).append(auroc)
    return [Point(*key, tuple(aurocs)) for key, aurocs in found.items()]


def curve_table(rows: list[Row], title: str) -> Table:
    """Line x epsilon: mean AUROC ± standard deviation over seeds, on all scored patients."""
    found = points(rows)
    budgets = sorted({p.epsilon for p in found if p.epsilon is not None})
    columns: list[float | None] = [*budgets, *([None] if any(p.epsilon is None for p in found) else [])]
    names = list(dict.fromkeys(key for p in found for key, _ in p.settings))
    out = Table(title=title, title_justify="left")
    out.add_column("line")
    for name in names:
        out.add_column(name, overflow="fold")
    for epsilon in columns:
        out.add_column("no epsilon" if epsilon is None else f"epsilon {epsilon:g}", justify="right", no_wrap=True)
    for line, settings in dict.fromkeys((p.line, p.settings) for p in found):
        cells = {p.epsilon: p for p in found if (p.line, p.settings) == (line, settings)}
        shown = dict(settings)
        out.add_row(
            line,
            *(str(shown.get(name, "")) for name in names),
            *(_cell(cells[epsilon]) if epsilon in cells else "" for epsilon in columns),
        )
    return out


def _cell(point: Point) -> str:
    return f"{point.mean:.3f}" + ("" if point.spread is None else f" ± {point.spread:.3f}")
