"""The line without privacy is chosen on training patients, and never on those who are tested."""

from __future__ import annotations

import shutil
from pathlib import Path

import polars as pl
import pytest

from simulations import choosing
from simulations.choosing import Candidate, choose, federated_candidates, pooled_candidates, training_parts
from simulations.lines import pooled
from simulations.sources import read_sequences
from tests.small import small_study

STUDY = small_study()
SITES = tuple(STUDY.sites)


def directories(cohort: dict[str, Path]) -> dict[str, Path]:
    return {site: cohort[site] for site in SITES}


def ids(parts: choosing.Parts) -> set[tuple[str, int]]:
    return {(site, int(patient)) for site, part in parts.items() for patient in part.patient_id}


def test_without_a_tuning_split_a_fifth_is_set_aside(cohort: dict[str, Path]) -> None:
    """The training patients of every site are dealt out to fit and rest, each once, and nobody else."""
    fit, rest, chosen_on = training_parts(STUDY, directories(cohort), 3)
    everybody = ids({site: read_sequences(STUDY, cohort[site], ("train",)) for site in SITES})
    assert ids(fit) | ids(rest) == everybody
    assert not ids(fit) & ids(rest)
    assert {site: part.n_patients for site, part in rest.items()} == {"east": 10, "north": 16}
    assert chosen_on == "a fifth of the training patients"


def test_another_seed_sets_others_aside(cohort: dict[str, Path]) -> None:
    """Who is set aside follows from the seed."""
    one, again, other = (ids(training_parts(STUDY, directories(cohort), seed)[1]) for seed in (3, 3, 4))
    assert one == again != other


@pytest.mark.parametrize("train", [["train"], ["train", "tuning"]])
def test_a_tuning_split_is_what_is_chosen_on(cohort: dict[str, Path], tmp_path: Path, train: list[str]) -> None:
    """Where the records have a tuning split, it is the rest, whether or not the study trains on it in the end."""
    for site in SITES:
        shutil.copytree(cohort[site], tmp_path / site)
        splits = tmp_path / site / "metadata" / "subject_splits.parquet"
        table = pl.read_parquet(splits).with_row_index()
        moved = pl.when((pl.col("split") == "train") & (pl.col("index") % 4 == 0)).then(pl.lit("tuning"))
        table.select("subject_id", moved.otherwise("split").alias("split")).write_parquet(splits)
    study = small_study(simulation={"train": train})
    own = {site: tmp_path / site for site in SITES}
    fit, rest, chosen_on = training_parts(study, own, 3)
    assert ids(fit) == ids({site: read_sequences(study, own[site], ("train",)) for site in SITES})
    assert ids(rest) == ids({site: read_sequences(study, own[site], ("tuning",)) for site in SITES})
    assert chosen_on == "tuning split"


def test_token_noise_is_half_that_of_epsilon_8() -> None:
    """Enough to regularise: half the noise of epsilon 8, and with it an epsilon that protects nobody."""
    candidate = federated_candidates(STUDY)[1].study
    eight = choosing.at_epsilon(STUDY, 8.0).plan().noise_multiplier
    assert candidate.plan().noise_multiplier == pytest.approx(max(0.25, eight / 2), abs=2e-4)
    assert candidate.privacy.epsilon is not None
    assert candidate.privacy.epsilon > 16


def test_the_best_on_the_rest_is_chosen(cohort: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all candidates and rounds the one with the highest AUROC on the rest, the first of equals."""
    scores = {"plain": [(1, 0.6), (2, 0.7)], "weight decay": [(1, 0.5), (3, 0.8)], "clip and token noise": [(3, 0.8)]}
    monkeypatch.setattr(choosing, "_ranked", lambda candidate, *_: scores[candidate.name])
    choice = choose(pooled_candidates(pooled(STUDY)), STUDY, directories(cohort), 0)
    assert (choice.candidate.name, choice.rounds, choice.auroc) == ("weight decay", 3, 0.8)


def test_held_out_patients_are_not_read(cohort: dict[str, Path], tmp_path: Path) -> None:
    """Choosing works, and chooses the same, where the held-out patients' records are gone."""
    own = {}
    for site in SITES:
        own[site] = tmp_path / site
        shutil.copytree(cohort[site], own[site])
        splits = pl.read_parquet(own[site] / "metadata" / "subject_splits.parquet")
        kept = splits.filter(pl.col("split") != "held_out")
        kept.write_parquet(own[site] / "metadata" / "subject_splits.parquet")
        for path in [own[site] / "data" / "0.parquet", own[site] / "labels" / "diagnosis.parquet"]:
            pl.read_parquet(path).join(kept, on="subject_id", how="semi", maintain_order="left").write_parquet(path)
    candidates = [Candidate("clip", choosing.at_epsilon(STUDY, None))]
    assert choose(candidates, STUDY, own, 1) == choose(candidates, STUDY, directories(cohort), 1)
