"""From a sweep to its jobs: what is varied, what is shared, what is refused before anything runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigurationError
from common.schema import SPLITS
from common.study import load_study
from simulations.planning import Job, plan_jobs
from simulations.sweep import load_sweep
from simulations.typical import typical_clip
from tests.simulations.sweeps import GROUPS, ROOT, jobs_of, small_sweep

EVERY_LINE = ["best-possible", "pooled-no-privacy", "federated-no-privacy", "pooled-private", "fedavg-one-step"]
EVERY_LINE += ["fedavg-local", "naive", "logistic", "alone", "prevalence"]


def names(jobs: list[Job]) -> list[tuple[str, float | None]]:
    return [(job.line.name, job.epsilon) for job in jobs]


def test_lines_without_epsilon_are_one_job(tmp_path: Path) -> None:
    """A line over epsilon is a job per budget, one without is a job; `alone` is one per site; not all have a `none`."""
    jobs = jobs_of(tmp_path, lines=EVERY_LINE, epsilon=[1, 8, "none"])
    assert names(jobs) == [
        ("best-possible", None),
        ("pooled-no-privacy", None),
        ("federated-no-privacy", None),
        *(
            (line, e)
            for line, none in (("pooled-private", ()), ("fedavg-one-step", (None,)))
            for e in (1.0, 8.0, *none)
        ),
        *((line, e) for line in ("fedavg-local", "naive", "logistic") for e in (1.0, 8.0, None)),
        *((f"alone: {site}", e) for e in (1.0, 8.0) for site in ("east", "north")),
        ("prevalence", None),
    ]
    assert len({job.file_name for job in jobs}) == len(jobs)


def test_a_seed_is_shared_by_all_lines_and_budgets(tmp_path: Path) -> None:
    """Every line, budget and setting of a seed has its records and its number; another seed has others."""
    jobs = jobs_of(tmp_path, lines=["naive", "logistic"], epsilon=[1, 3], seeds=[4, 5], grid={"model.hidden": [4, 6]})
    assert [job.seed for job in jobs] == [4] * 8 + [5] * 8
    for job in jobs:
        assert job.line.study.simulation.seed == job.setup.study.simulation.seed == job.seed
    assert len({tuple(job.setup.directories.values()) for job in jobs}) == 2


def test_the_grid_is_every_combination(tmp_path: Path) -> None:
    """Dotted keys are set in the study, checked as its file is, and named in the row's settings."""
    jobs = jobs_of(tmp_path, grid={"model.cell": ["gru", "lstm"], "training.rounds": [2, 3]})
    settings = [job.setup.settings for job in jobs]
    assert [list(s.values()) for s in settings] == [["gru", 2], ["gru", 3], ["lstm", 2], ["lstm", 3]]
    assert [(j.line.study.model.cell, j.line.study.training.rounds) for j in jobs] == [
        tuple(s.values()) for s in settings
    ]


def test_a_list_is_a_value_too(tmp_path: Path) -> None:
    """A key that takes a list is varied over lists; the row shows one as text."""
    pooling = [["last_state"], ["last_state", "mean_state"]]
    jobs = jobs_of(tmp_path, grid={"model.pooling": pooling})
    assert [list(job.line.study.model.pooling) for job in jobs] == pooling
    assert jobs[1].setup.settings == {"model.pooling": '["last_state", "mean_state"]'}


def test_a_typical_clip_follows_the_other_settings(tmp_path: Path) -> None:
    """`typical` is the clip of each network, however the keys are ordered, beside numbers as they stand."""
    jobs = jobs_of(tmp_path, grid={"privacy.clip": ["typical", 2.0], "model.cell": ["gru", "rnn"]})
    clips = [job.line.study.privacy.clip for job in jobs]
    assert clips[:2] == [typical_clip(job.line.study) for job in jobs[:2]]
    assert clips[2:] == [2.0, 2.0]
    assert jobs[0].setup.settings["privacy.clip"] == "typical"


def test_sets_of_sites(tmp_path: Path) -> None:
    """Of the listed sites alone is anything trained, scored or declared; the quorum follows."""
    one, both = jobs_of(tmp_path, sites=[["north"], ["north", "east"]])
    assert (list(one.line.study.sites), one.setup.scored, one.line.study.quorum) == (["north"], ("north",), 1)
    assert (list(both.line.study.sites), both.setup.settings["sites"]) == (["east", "north"], "east+north")
    assert {job.setup.splits for job in (one, both)} == {("held_out",)}


def test_one_site_left_out(tmp_path: Path) -> None:
    """The others train, its patients are scored, and its records are at hand."""
    jobs = jobs_of(tmp_path, leave_out="each", lines=["logistic", "alone"])
    assert [(j.line.name, list(j.line.study.sites), j.setup.scored) for j in jobs] == [
        ("logistic", ["north"], ("east",)),
        ("alone: north", ["north"], ("east",)),
        ("logistic", ["east"], ("north",)),
        ("alone: east", ["east"], ("north",)),
    ]
    assert jobs[0].setup.settings == {"leave_out": "east"}
    assert {job.setup.splits for job in jobs} == {SPLITS}
    assert all(set(job.setup.directories) == {"east", "north"} for job in jobs)


@pytest.mark.skipif(importlib.util.find_spec("simulations.partition") is None, reason="no partitions in this version")
def test_partitions_deal_the_patients_out_anew(tmp_path: Path) -> None:
    """Each partition is a setting with sites, sizes and records of its own, found again when the sweep goes on."""
    specs = [{"by": "iid", "sites": 3}, {"by": "label", "sites": 2, "alpha": 0.5}]
    jobs = jobs_of(tmp_path, partition=specs)
    assert [job.setup.settings["partition"] for job in jobs] == ["by iid, sites 3", "by label, sites 2, alpha 0.5"]
    assert [list(job.line.study.sites) for job in jobs] == [["site-1", "site-2", "site-3"], ["site-1", "site-2"]]
    assert all(path.is_dir() for job in jobs for path in job.setup.directories.values())
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
    assert [job.key for job in jobs_of(tmp_path, partition=specs)] == [job.key for job in jobs]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")} == times


def test_the_key_is_everything_the_numbers_follow_from(tmp_path: Path) -> None:
    """Equal sweeps have equal keys; another study, seed, budget, grouping or way of scoring has another."""
    changes: list[dict[str, Any]] = [
        {},
        {"study": {"training": {"learning_rate": 0.02}}},
        {"study": {"sites": {"north": {"declared_patients": 150}, "east": {"declared_patients": 100}}}},
        {"study": {"simulation": {"cohort_scale": 0.05}}},
        {"seeds": [1]},
        {"epsilon": [4]},
        {"resamples": 21},
        {"scored_rounds": 2},
        {"subgroups": GROUPS},
        {"leave_out": ["east"]},
        {"lines": ["logistic"]},
    ]
    keys = [jobs_of(tmp_path, **change)[0].key for change in changes]
    assert len(set(keys)) == len(keys)
    assert jobs_of(tmp_path)[0].key == keys[0]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "line": ({"lines": ["naiv"]}, "no line `naiv`; did you mean `naive`"),
    "key": ({"grid": {"model.hiden": [3]}}, "model.hiden.*did you mean `hidden`"),
    "section": ({"grid": {"modl.hidden": [3]}}, "no section for `modl.hidden`"),
    "value": ({"grid": {"model.hidden": [0]}}, "model.hidden.*greater than or equal to 1"),
    "own axis": ({"grid": {"privacy.epsilon": [1]}}, "use `epsilon` of the sweep"),
    "twice": ({"seeds": [1, 1]}, "seeds.*stands there twice"),
    "no values": ({"grid": {"model.hidden": []}}, "needs one or more values"),
    "epsilon": ({"epsilon": [0]}, "epsilon.*greater than 0"),
    "site": ({"sites": [["north", "nowhere"]]}, "nowhere.*not in east, north"),
    "left out": ({"leave_out": ["nowhere"]}, "`nowhere` must be one of"),
    "delta": ({"study": {"privacy": {"delta": 0.005}}, "lines": ["pooled-private"]}, "delta = 0.005 must be < "),
    "group": ({"subgroups": {"x": {"static": "WEIGHT", "bands": [3]}}}, "static = WEIGHT"),
    "unknown": ({"epsilons": [1]}, "epsilons.*did you mean `epsilon`"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_run_is_refused_at_once(name: str, tmp_path: Path) -> None:
    """A sweep that cannot be run is one clear error before the first row."""
    changes, message = BAD[name]
    with pytest.raises(ConfigurationError, match=message):
        jobs_of(tmp_path, **changes)


def test_truth_needs_synthetic_records(tmp_path: Path, cohort: dict[str, Path]) -> None:
    """`best-possible` on records without truth is an error that says so."""
    data = tmp_path / "data"
    for site in ("north", "east"):
        (data / site).mkdir(parents=True)
        for part in ("data", "labels", "metadata"):
            (data / site / part).symlink_to(cohort[site] / part)
    file = small_sweep(tmp_path, lines=["best-possible"], study={"simulation": {"cohort": None, "cohort_scale": 1.0}})
    with pytest.raises(ConfigurationError, match="`best-possible` needs synthetic records"):
        plan_jobs(load_sweep(file), file, data, tmp_path / "out")


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "sweeps").glob("*.yaml")), ids=lambda file: file.name)
def test_every_sweep_that_is_shipped_loads(file: Path) -> None:
    """Its study is there, its lines are known, and its groups are columns or codes of the study."""
    from simulations.lines import sweep_lines
    from simulations.scoring import check_groupings

    sweep = load_sweep(file)
    study = load_study(file.parent / sweep.study)
    check_groupings(study.features, sweep.subgroups, str(file))
    assert [line for name in sweep.lines for line in sweep_lines(study, name)]
