"""A job becomes its row: the numbers of the code that trains, whatever ran in the process before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from common.privacy.accounting import epsilon_of
from simulations import run_job as module
from simulations import sources
from simulations.experiment import HeldOut, simulate
from simulations.hospitals import Hospitals
from simulations.planning import Job
from simulations.rows import POOLED, Row
from simulations.run_job import run_job
from tests.simulations.sweeps import GROUPS, jobs_of

LINES = ["best-possible", "pooled-no-privacy", "federated-no-privacy", "pooled-private", "fedavg-one-step"]
LINES += ["naive", "logistic", "alone", "prevalence"]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """Every line once, at epsilon 3."""
    return {job.line.name: job for job in jobs_of(tmp_path_factory.mktemp("jobs"), lines=LINES, subgroups=GROUPS)}


@pytest.fixture(scope="module")
def rows(jobs: dict[str, Job]) -> dict[str, Row]:
    """Their rows, one after the other in this process."""
    return {name: run_job(job, "code") for name, job in jobs.items()}


def forget() -> None:
    """As if the process were new."""
    module._held_out.clear()
    sources._already_read.clear()


def test_a_row_does_not_depend_on_what_ran_before(jobs: dict[str, Job], rows: dict[str, Row]) -> None:
    """In a fresh process, alone, each line gives the row that it gave after all the others."""
    for name in ("naive", "pooled-no-privacy", "alone: east"):
        forget()
        assert run_job(jobs[name], "code").identity() == rows[name].identity()


def test_a_federated_row_is_the_simulation(jobs: dict[str, Job], rows: dict[str, Row]) -> None:
    """Scores, plan, rounds and epsilon are those that `simulate` gives for the same study and seed."""
    job, row = jobs["fedavg-one-step"], rows["fedavg-one-step"]
    study = job.line.study
    result = simulate(Hospitals(study, job.setup.directories, job.seed), resamples=20, scored_rounds=1)
    assert row.sites == result.scores
    assert row.plan == study.plan()
    assert row.spent == epsilon_of(study.plan())
    assert row.spent <= 3.0
    (last,) = row.rounds
    assert last.round == study.training.rounds
    assert last.auroc == row.site().auroc.value
    assert row.weights == study.aggregation_weights()
    assert row.parameters == sum(array.size for array in result.weights.values())


def test_bytes_are_those_of_the_weights(rows: dict[str, Row]) -> None:
    """Down and up a round moves the weights and little else, at every site that trains with others."""
    row = rows["fedavg-one-step"]
    assert set(row.bytes_per_round) == {"east", "north"}
    for moved in row.bytes_per_round.values():
        assert 4 * row.parameters < moved.up <= moved.down + 16 < 4 * row.parameters + 3000
    assert rows["alone: east"].bytes_per_round == rows["pooled-private"].bytes_per_round == {}


def test_every_line_is_scored_on_the_same_patients(rows: dict[str, Row]) -> None:
    """Sites, patients and positives are equal over all lines, and so is what is possible on them."""
    sizes = {tuple((s.site, s.patients, s.positives, s.best_possible) for s in row.sites) for row in rows.values()}
    assert len(sizes) == 1
    assert [site for site, *_ in sizes.pop()] == ["east", "north", POOLED]


def test_truth_and_prevalence_bracket_the_rest(rows: dict[str, Row]) -> None:
    """The truth ranks best, up to chance on these patients, and the prevalence not at all; neither has a plan."""
    truth, none = rows["best-possible"], rows["prevalence"]
    assert none.site().auroc.value == 0.5
    assert truth.site().auroc.value == pytest.approx(truth.site().best_possible, abs=0.05)
    assert max(rows, key=lambda name: rows[name].site().auroc.value or 0) == "best-possible"
    assert (truth.plan, truth.spent, none.plan, none.parameters, none.rounds) == (None, None, None, 0, ())


def test_a_curator_declares_everybody(rows: dict[str, Row]) -> None:
    """One virtual site, one noise: the plan is that of a study, the patients are those of all sites."""
    row = rows["pooled-private"]
    assert row.plan == rows["fedavg-one-step"].plan
    assert [site.declared_patients for site in row.sites] == [100, 160, 260]
    assert row.weighting is None


def test_a_line_without_privacy_says_what_was_chosen(rows: dict[str, Row]) -> None:
    """The candidate, its rounds and whom it was chosen on stand in the row, and neither epsilon nor plan."""
    for name, candidates in (
        ("pooled-no-privacy", {"plain", "weight decay", "clip and token noise"}),
        ("federated-no-privacy", {"clip", "clip and token noise"}),
    ):
        row = rows[name]
        assert row.terms["chosen"] in candidates
        assert row.terms["chosen_on"] == "a fifth of the training patients"
        assert (row.epsilon, row.spent, row.plan) == (None, None, None)
        assert row.rounds[-1].round == row.terms["rounds"]


def test_a_row_holds_no_patient(jobs: dict[str, Job], rows: dict[str, Row]) -> None:
    """No whole number in any row is a patient's identifier, and none stands in a text."""
    ids: set[int] = set()
    for directory in jobs["naive"].setup.directories.values():
        ids |= set(pl.read_parquet(directory / "metadata" / "subject_splits.parquet")["subject_id"])
    # Training patients of the first site are 1, 2, .., as counts are; all others have eight digits or more.
    telling = {i for i in ids if i > 1_000_000}
    assert len(telling) > 300
    for row in rows.values():
        for leaf in leaves(row.to_json()):
            assert leaf not in telling
            assert not (isinstance(leaf, str) and any(str(i) in leaf for i in telling))


def leaves(data: Any) -> Iterator[Any]:
    """Keys, texts and numbers of plain data; numbers with a fraction are no identifiers."""
    if isinstance(data, dict):
        yield from data
    for part in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
        yield from leaves(part)
    if isinstance(data, str | int):
        yield data


def test_subgroups_are_in_the_row(jobs: dict[str, Job], rows: dict[str, Row]) -> None:
    """Every group of the sweep stands in every row, masked or with its AUROC."""
    groups = [(g.attribute, g.group) for g in rows["logistic"].subgroups]
    assert groups == [("sex", "female"), ("sex", "male"), ("age", "< 60"), ("age", ">= 60")]
    held_out = HeldOut(Hospitals(jobs["logistic"].line.study, jobs["logistic"].setup.directories, 0))
    shown = [g for g in rows["logistic"].subgroups if g.attribute == "sex" and g.patients is not None]
    assert sum(g.patients or 0 for g in shown) <= len(np.unique(held_out.patient))


def test_a_site_left_out_takes_no_part(tmp_path: Path) -> None:
    """Its patients alone are scored, all of them, by a model that was trained without it."""
    (job,) = jobs_of(tmp_path, leave_out=["east"])
    row = run_job(job, "code")
    assert [(s.site, s.declared_patients) for s in row.sites] == [("east", 0), (POOLED, 160)]
    assert row.settings == {"leave_out": "east"}
    everybody = pl.read_parquet(job.setup.directories["east"] / "labels" / f"{job.line.study.task.name}.parquet")
    assert row.site("east").patients == everybody["subject_id"].n_unique()
    east = module.held_out_of(job)
    alone = simulate(Hospitals(job.line.study, job.setup.directories, 0), resamples=20, held_out=east)
    assert row.site("east").auroc == alone.score("east").auroc
