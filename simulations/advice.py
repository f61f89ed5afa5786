"""What a study may be expected to reach, from its synthetic twin, and what that means in words.

The jobs are those of a sweep: the federation and every site alone, over budgets and seeds, on the same patients.

Decisions a reader would question:

- A site is scored on its own held-out patients, alone and together: the question is what it has from taking part.
- Differences within TIE are called none: with two seeds and a thousand held-out patients they are chance.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass
from pathlib import Path

from common.study import Study
from simulations.choosing import at_epsilon
from simulations.cohort import write_cohort
from simulations.cost import StepTime
from simulations.lines import Line, sweep_lines
from simulations.overrides import override
from simulations.planning import Job, Setup
from simulations.rows import POOLED, Row
from simulations.twin import Twin

ALONE, TOGETHER = "alone: ", "together"
TIE, NOTHING = 0.02, 0.55  # a gain within TIE is none; who ranks below NOTHING alone has learned next to nothing
BESIDE_STEPS = 1.3  # messages, server and scoring, per second of steps: measured on configs/demo.yaml
RESAMPLES = 10  # of the intervals that rows have and nobody reads here
DISCLAIMER = (
    "The expected AUROC is that of synthetic patients with this study's sizes, plan and network: it shows what budget "
    "and size do, not what your patients' records hold."
)


@dataclass(frozen=True)
class Expected:
    """A site at one epsilon, mean over seeds, on its own held-out synthetic patients.

    Attributes:
        alone: AUROC of training by itself with the whole budget; None for `pooled`.
        together: AUROC of the federation.
        best_possible: AUROC that no model can beat on these patients.
    """

    epsilon: float
    site: str
    declared_patients: int
    alone: float | None
    together: float
    best_possible: float

    @property
    def gain(self) -> float:
        """What taking part adds."""
        return 0.0 if self.alone is None else self.together - self.alone


def twin_jobs(twin: Twin, epsilons: list[float], seeds: int, folder: Path) -> list[Job]:
    """The federation and each site alone, by seed and budget; their records are to be written below `folder`."""
    jobs = []
    for seed in range(twin.study.simulation.seed, twin.study.simulation.seed + seeds):
        study = override(twin.study, seed=seed, source="synthetic twin")
        directories = {site: folder / str(seed) / site for site in study.sites}
        for epsilon in epsilons:
            at = at_epsilon(study, epsilon)
            setup = Setup(at, {}, directories, tuple(study.sites))
            lines = [Line(TOGETHER, at), *(sweep_lines(at, "alone") if len(at.sites) > 1 else [])]
            jobs += [Job(line, setup, epsilon, seed, RESAMPLES, 0, {}) for line in lines]
    return jobs


def write_records(twin: Twin, seeds: int, folder: Path) -> None:
    """The synthetic patients of every seed."""
    for seed in range(twin.study.simulation.seed, twin.study.simulation.seed + seeds):
        write_cohort(twin.preset, seed, folder / str(seed))


def seconds_of(jobs: list[Job], step: StepTime) -> float:
    """Rough time of the jobs in one process, from the time of a step of the twin."""
    steps = sum(job.line.study.plan().steps * len(job.line.study.sites) for job in jobs)
    return BESIDE_STEPS * (steps * step.fixed + sum(job.effort for job in jobs) * step.per_patient)


def expected_of(rows: list[Row], study: Study) -> list[Expected]:
    """Per budget every site, then all of them pooled; sites whose held-out patients have one class are left out."""
    found = []
    for epsilon in dict.fromkeys(row.epsilon for row in rows):
        assert epsilon is not None
        mine = [row for row in rows if row.epsilon == epsilon]
        for site in (*study.sites, POOLED):
            together = _mean([row for row in mine if row.line == TOGETHER], site)
            alone = _mean([row for row in mine if row.line == ALONE + site], site)
            best = [row.site(site).best_possible for row in mine if row.line == TOGETHER]
            known = [value for value in best if value is not None]
            if together is not None and known:
                declared = [t.declared_patients for name, t in study.sites.items() if site in (name, POOLED)]
                found.append(Expected(epsilon, site, sum(declared), alone, together, statistics.fmean(known)))
    return found


def _mean(rows: list[Row], site: str) -> float | None:
    scores = [score for score in (row.site(site).auroc.value for row in rows) if score is not None]
    return statistics.fmean(scores) if scores else None


def advice(expected: list[Expected]) -> list[str]:
    """Who gains at which budget, who learns nothing alone, and what a larger budget buys."""
    said = []
    budgets = sorted({each.epsilon for each in expected})
    for epsilon in budgets:
        sites = [each for each in expected if each.epsilon == epsilon and each.alone is not None]
        said += [_one_site(each) for each in sorted(sites, key=lambda each: -each.gain)]
    pooled = {each.epsilon: each.together for each in expected if each.site == POOLED}
    for low, high in itertools.pairwise(budgets):
        more = pooled[high] - pooled[low]
        worth = f"gains {more:.2f}" if more > TIE else "gains next to nothing"
        said.append(f"from epsilon {low:g} to {high:g} the federation {worth} ({pooled[low]:.2f}, {pooled[high]:.2f})")
    if len(budgets) > 1:
        at = {(each.site, each.epsilon): each for each in expected}
        for site in dict.fromkeys(each.site for each in expected):
            alone = at[site, budgets[-1]].alone
            together = at[site, budgets[0]].together
            if alone is not None and together >= max(alone, NOTHING):
                said.append(
                    f"{site} has no less from the others at epsilon {budgets[0]:g} ({together:.2f}) than alone at "
                    f"epsilon {budgets[-1]:g} ({alone:.2f})"
                )
    return said


def _one_site(each: Expected) -> str:
    assert each.alone is not None
    who = f"epsilon {each.epsilon:g}: {each.site} with {each.declared_patients:,} patients"
    numbers = f"{each.alone:.2f} alone, {each.together:.2f} together"
    if max(each.alone, each.together) < NOTHING:
        return f"{who} learns next to nothing, alone or together ({numbers})"
    if each.alone < NOTHING and each.gain > TIE:
        return f"{who} learns next to nothing alone; together it gains {each.gain:.2f} ({numbers})"
    if each.gain > TIE:
        return f"{who} gains {each.gain:.2f} by taking part ({numbers})"
    if each.gain < -TIE:
        return f"{who} loses {-each.gain:.2f} by taking part ({numbers}): the others outweigh its own patients"
    return f"{who} gains next to nothing by taking part ({numbers})"
