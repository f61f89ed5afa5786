"""Mean and spread over seeds are those of the rows."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from simulations.curves import curve_table, points
from simulations.rows import Estimate, Row
from tests.simulations.sweeps import row


def scored(auroc: float | None, **changes: object) -> Row:
    base = row(**changes)
    return replace(base, sites=tuple(replace(site, auroc=Estimate(auroc)) for site in base.sites))


def test_points_are_means_over_seeds() -> None:
    """Rows that differ in the seed alone are one point; a seed without a score is left out."""
    rows = [scored(0.7, seed=0), scored(0.8, seed=1), scored(None, seed=2), scored(0.6, seed=0, epsilon=1.0)]
    two, one = points(rows)
    assert (two.epsilon, two.aurocs, one.epsilon, one.spread) == (3.0, (0.7, 0.8), 1.0, None)
    assert two.mean == pytest.approx(0.75)
    assert two.spread == pytest.approx(0.0707, abs=1e-4)


def test_settings_are_apart() -> None:
    """Rows under other settings are another point."""
    assert len(points([scored(0.7), scored(0.8, settings={"model.cell": "lstm"})])) == 2


def test_the_table_has_lines_by_epsilon() -> None:
    """One row per line and setting, columns by rising epsilon, those without one last."""
    rows = [scored(0.7, epsilon=8.0), scored(0.6, epsilon=1.0), scored(0.5, epsilon=None, line="prevalence")]
    console = Console(width=120, file=io.StringIO())
    with console.capture() as printed:
        console.print(curve_table(rows, "title"))
    text = printed.get()
    assert text.index("epsilon 1") < text.index("epsilon 8") < text.index("no epsilon")
    assert [word for word in text.split() if word.startswith("0.")] == ["0.600", "0.700", "0.500"]
