"""Rows of a sweep put together over seeds: one value with one interval per line, budget, weighting and hospital.

Decisions a reader would question:

- The value is the mean over the runs (seeds). The interval is the widest: from the lowest lower to the highest upper
  end of the runs' own 95 % intervals over resampled patients. A consortium trains once and meets one seed and one set
  of patients, so the bar says where such a run may end; averaging would show it narrower than it is.
- Two lines are compared seed by seed (`Gap`): runs of one seed share patients, starting weights and noise, so their
  difference is firmer than two overlapping bars suggest.
- Rows that differ in settings are never mixed. The first setting of a sweep is the report's subject; the others are
  listed beside it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from common.errors import DataError
from simulations.rows import POOLED, Estimate, Row

AGGREGATION = "training.aggregation"
WEIGHTINGS = ("precision", "declared", "uniform")
RECIPES = ("fedavg-one-step", "fedavg-local")
ALONE = "alone: "

Settings = tuple[tuple[str, object], ...]


@dataclass(frozen=True)
class Spot:
    """A metric over several runs.

    Attributes:
        value: mean over the runs.
        low, high: the widest of the runs' 95 % intervals; None where a run has none.
        runs: how many.
        deviation: standard deviation over the runs; None for a single one.
    """

    value: float
    low: float | None
    high: float | None
    runs: int
    deviation: float | None


@dataclass(frozen=True)
class Gap:
    """Two lines compared run by run, on the seeds that both have.

    Attributes:
        first, second: their means over these seeds.
        higher: in how many of the `runs` the first was higher.
    """

    first: float
    second: float
    higher: int
    runs: int

    @property
    def mean(self) -> float:
        """How far the first is above the second."""
        return self.first - self.second

    @property
    def clear(self) -> bool:
        """Whether every run agrees on the sign, and there is more than one."""
        return self.runs > 1 and self.higher in (0, self.runs)


def settings_of(row: Row) -> Settings:
    """What a row differs in from its sweep's study; how sites are weighted is a line's own matter."""
    return tuple(sorted((key, value) for key, value in row.settings.items() if key != AGGREGATION))


class Sweep:
    """The rows of a sweep by setting, line and budget.

    Raises:
        DataError: no rows.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        if not rows:
            raise DataError("the sweep has no finished run; nothing to report: run it first")
        self.all = tuple(rows)
        groups = dict.fromkeys(settings_of(row) for row in rows)
        self.settings = min(groups, key=len)  # the study itself if it was run, else the first of the sweep
        self.others = [group for group in groups if group != self.settings]
        self.rows = self.under(self.settings)

    def under(self, settings: Settings) -> tuple[Row, ...]:
        """The rows of one setting."""
        return tuple(row for row in self.all if settings_of(row) == settings)

    @property
    def main(self) -> str:
        """The line that the report is about: a federated recipe if one was run, else the first line."""
        return next((name for name in RECIPES if name in self.lines), self.lines[0])

    @property
    def lines(self) -> list[str]:
        """Names of the lines, in the order in which they first appear."""
        return list(dict.fromkeys(row.line for row in self.rows))

    @property
    def budgets(self) -> list[float]:
        """The epsilons of the curve, ascending, without `none`."""
        return sorted({row.epsilon for row in self.rows if row.epsilon is not None})

    @property
    def sites(self) -> list[str]:
        """Names of the hospitals that were scored."""
        return list(dict.fromkeys(site.site for row in self.rows for site in row.sites if site.site != POOLED))

    def declared(self, site: str) -> int:
        """What a hospital has published of its size; 0 for one that only tests."""
        return max((s.declared_patients for row in self.rows for s in row.sites if s.site == site), default=0)

    @property
    def seeds(self) -> list[int]:
        """Seeds of the runs, ascending."""
        return sorted({row.seed for row in self.rows})

    def weighting(self, line: str) -> str | None:
        """How a line averages the sites where nothing else is said: its own way, else precision."""
        rows = [row for row in self.rows if row.line == line]
        own = [row for row in rows if AGGREGATION not in row.settings]
        known = {row.weighting for row in own or rows}
        return next((name for name in WEIGHTINGS if name in known), None)

    def pick(
        self,
        line: str,
        epsilon: float | None,
        *,
        weighting: str | None = "",
        settings: Settings | None = None,
    ) -> list[Row]:
        """The rows of a line at a budget, one per seed in order; `weighting` "" is the line's own."""
        wanted = self.weighting(line) if weighting == "" else weighting
        rows = self.rows if settings is None else self.under(settings)
        found: dict[int, Row] = {}
        for row in rows:
            if row.line == line and row.epsilon == epsilon and row.weighting == wanted:
                found.setdefault(row.seed, row)
        return [found[seed] for seed in sorted(found)]

    def headline(self, preferred: float | None) -> float | None:
        """The budget that sentences speak of: the study's if it was run, else the one nearest to 3 from below."""
        mine = [epsilon for epsilon in self.budgets if self.pick(self.main, epsilon)]
        if not mine:
            return None
        if preferred in mine:
            return preferred
        return max((epsilon for epsilon in mine if epsilon <= 3), default=mine[0])


def spot(estimates: Iterable[Estimate | None]) -> Spot | None:
    """Several runs' estimates as one; None where no run has a value."""
    known = [estimate for estimate in estimates if estimate is not None and estimate.value is not None]
    values = [estimate.value for estimate in known if estimate.value is not None]
    if not values:
        return None
    lows = [estimate.low for estimate in known if estimate.low is not None]
    highs = [estimate.high for estimate in known if estimate.high is not None]
    whole = len(lows) == len(highs) == len(values)
    return Spot(
        value=statistics.fmean(values),
        low=min(lows) if whole else None,
        high=max(highs) if whole else None,
        runs=len(values),
        deviation=statistics.stdev(values) if len(values) > 1 else None,
    )


def auroc_at(rows: Iterable[Row], site: str = POOLED) -> Spot | None:
    """AUROC of rows (one per seed) on a site's held-out patients."""
    return spot(_auroc(row, site) for row in rows)


def gap(first: Iterable[Row], second: Iterable[Row], site: str = POOLED) -> Gap | None:
    """AUROC of `first` minus `second` on a site's patients, seed by seed; None without a common seed."""
    one = {row.seed: _auroc(row, site) for row in first}
    other = {row.seed: _auroc(row, site) for row in second}
    pairs = [
        (a.value, b.value)
        for seed in sorted(set(one) & set(other))
        if (a := one[seed]) is not None and (b := other[seed]) is not None
        if a.value is not None and b.value is not None
    ]
    if not pairs:
        return None
    means = [statistics.fmean(values) for values in zip(*pairs, strict=True)]
    return Gap(means[0], means[1], sum(a > b for a, b in pairs), len(pairs))


def best_possible(rows: Iterable[Row], site: str = POOLED) -> float | None:
    """Mean over seeds of the best possible AUROC; None where it is not known for all of them."""
    by_seed: dict[int, float] = {}
    for row in rows:
        best = next((score.best_possible for score in row.sites if score.site == site), None)
        if best is None:
            return None
        by_seed[row.seed] = best
    return statistics.fmean(by_seed.values()) if by_seed else None


def _auroc(row: Row, site: str) -> Estimate | None:
    return next((score.auroc for score in row.sites if score.site == site), None)
