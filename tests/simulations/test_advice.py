"""From rows to what may be expected, and to words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from common.study import load_study
from simulations.advice import ALONE, BESIDE_STEPS, TOGETHER, Expected, advice, expected_of, seconds_of, twin_jobs
from simulations.cost import StepTime
from simulations.rows import POOLED, Estimate, Row
from simulations.twin import synthetic_twin
from tests.simulations.sweeps import ROOT, row

DEMO = load_study(ROOT / "configs" / "demo.yaml")


def scored(line: str, seed: int, auroc: float | None, epsilon: float = 1.0) -> Row:
    """A row in which every site has the same score."""
    site = replace(row().sites[0], auroc=Estimate(auroc), best_possible=0.86)
    sites = tuple(replace(site, site=name) for name in (*DEMO.sites, POOLED))
    return row(line=line, seed=seed, epsilon=epsilon, sites=sites)


def test_the_jobs_are_the_federation_and_each_site_alone(tmp_path: Path) -> None:
    """Per seed and budget one federation and one job per site, on the same records, at the whole budget."""
    jobs = twin_jobs(synthetic_twin(DEMO), [1.0, 3.0], 2, tmp_path)
    assert [job.line.name for job in jobs[:5]] == [TOGETHER, *(ALONE + site for site in DEMO.sites)]
    assert len(jobs) == len({job.key for job in jobs}) == 2 * 2 * 5
    for job in jobs:
        assert job.line.study.privacy.epsilon == job.epsilon
        assert job.setup.directories == {site: tmp_path / str(job.seed) / site for site in DEMO.sites}
        assert job.setup.scored == tuple(DEMO.sites)
    assert {job.seed for job in jobs} == {0, 1}


def test_a_study_of_one_site_has_nothing_beside_it(tmp_path: Path) -> None:
    """Where there is nobody to join, alone and together are the same training, which is run once."""
    one = DEMO.model_copy(update={"sites": {"north": DEMO.sites["north"]}, "quorum": 1})
    assert [job.line.name for job in twin_jobs(synthetic_twin(one), [1.0], 1, tmp_path)] == [TOGETHER]


def test_the_time_is_that_of_all_steps(tmp_path: Path) -> None:
    """Every site of every job takes every step, and something comes on top: twice the seeds, twice the time."""
    twin = synthetic_twin(DEMO)
    once, twice = (seconds_of(twin_jobs(twin, [1.0], n, tmp_path), StepTime(0.01, 0.0, 1)) for n in (1, 2))
    assert once == pytest.approx(BESIDE_STEPS * 160 * (4 + 4) * 0.01)
    assert twice == pytest.approx(2 * once)


def test_expected_is_the_mean_over_seeds_on_a_sites_own_patients() -> None:
    """Alone and together are means over seeds; pooled has no alone; a score that does not exist is left out."""
    rows = [scored(TOGETHER, 0, 0.7), scored(TOGETHER, 1, 0.8), scored("alone: north", 0, 0.6)]
    rows += [scored("alone: north", 1, None)]
    found = {each.site: each for each in expected_of(rows, DEMO)}
    assert list(found) == [*DEMO.sites, POOLED]
    assert found["north"] == Expected(1.0, "north", 4000, pytest.approx(0.6), pytest.approx(0.75), pytest.approx(0.86))
    assert found[POOLED].alone is None
    assert found[POOLED].declared_patients == 8800


@pytest.mark.parametrize(
    ("alone", "together", "said"),
    [
        (0.52, 0.66, "west with 300 patients learns next to nothing alone; together it gains 0.14"),
        (0.60, 0.66, "west with 300 patients gains 0.06 by taking part (0.60 alone, 0.66 together)"),
        (0.65, 0.66, "west with 300 patients gains next to nothing by taking part"),
        (0.66, 0.60, "west with 300 patients loses 0.06 by taking part"),
        (0.51, 0.54, "west with 300 patients learns next to nothing, alone or together"),
    ],
)
def test_advice_says_who_gains(alone: float, together: float, said: str) -> None:
    """Gain, tie, loss, and nothing learned each have their words, with size and both numbers."""
    pooled = Expected(1.0, POOLED, 8800, None, 0.7, 0.86)
    (line,) = advice([Expected(1.0, "west", 300, alone, together, 0.86), pooled])
    assert line.startswith(f"epsilon 1: {said}")


def test_advice_says_what_a_larger_budget_buys() -> None:
    """Between neighbouring budgets the gain of the federation; and a site that others help more than budget does."""
    found = [
        *(Expected(e, "west", 300, a, t, 0.86) for e, a, t in ((1.0, 0.5, 0.68), (3.0, 0.55, 0.7), (8.0, 0.6, 0.71))),
        *(Expected(e, POOLED, 300, None, t, 0.86) for e, t in ((1.0, 0.68), (3.0, 0.75), (8.0, 0.76))),
    ]
    assert advice(found)[3:] == [
        "from epsilon 1 to 3 the federation gains 0.07 (0.68, 0.75)",
        "from epsilon 3 to 8 the federation gains next to nothing (0.75, 0.76)",
        "west has no less from the others at epsilon 1 (0.68) than alone at epsilon 8 (0.60)",
    ]
