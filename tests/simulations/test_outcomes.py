"""The other labels against a slow reading of the written events, their laws, and local codes."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from common.metrics import auroc
from common.schema import FeatureSchema
from common.terms import load
from simulations.cohort import CODES, LOCAL_CODES, PHENOTYPE_TASKS, SiteRecords, generate_site, write_cohort
from simulations.mechanism import SHARED_CODES
from simulations.outcomes import FOLLOW_UP_DAYS, PHENOTYPES, RARE_CODE, _intercepts
from simulations.recipe import PRESETS, Preset, SiteRecipe

MEDIUM = PRESETS["medium"]
FEATURES = Path(__file__).resolve().parents[2] / "configs" / "features" / "synthetic.yaml"


def _phenotype_from_events(events: list[tuple[datetime | None, str, float | None]], number: int) -> float:
    """P(phenotype) of one patient from its rows in the data file alone."""
    law = PHENOTYPES[number]
    timed = [(time, code, value) for time, code, value in events if time is not None]
    end = max(time for time, _, _ in timed)
    codes = {f"CODE//{code}" for code in law.codes}
    recent = sum(math.exp(-(end - time).total_seconds() / 86400 / 180) for time, code, _ in timed if code in codes)
    readings = [value for _, code, value in timed if code == f"VITAL//{law.vital}" and value is not None]
    age = next(value for _, code, value in events if code == "AGE")
    assert age is not None
    score = 5.5 * bool(recent) if law.codes == (RARE_CODE,) else law.code_weight * recent
    score += law.vital_weight * sum(readings) / (len(readings) + 0.3) + law.age_weight * (age - 62) / 14
    return 1 / (1 + math.exp(-score - float(_intercepts()[number])))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A small `medium` on disk."""
    return write_cohort(MEDIUM, 4, tmp_path_factory.mktemp("outcomes") / "cohort", scale=0.02)


def test_phenotype_truth_follows_from_the_written_events_alone(folders: list[Path]) -> None:
    """Each stored probability of each phenotype equals the one read off the patient's own rows, at every site alike."""
    for folder in folders:
        events: dict[int, list[tuple[datetime | None, str, float | None]]] = {}
        for subject, time, code, value in pl.read_parquet(folder / "data" / "0.parquet").iter_rows():
            events.setdefault(subject, []).append((time, code, value))
        truth = pl.read_parquet(folder / "truth.parquet")
        for number, task in enumerate(PHENOTYPE_TASKS):
            expected = [_phenotype_from_events(rows, number) for rows in events.values()]
            np.testing.assert_allclose(truth[task].to_numpy(), expected, rtol=0, atol=1e-6)  # vitals are float32


def test_the_next_visit_is_the_last_one_seen_from_the_one_before(folders: list[Path]) -> None:
    """Its label rows are the codes of the last visit, and its prediction time is that of the visit before."""
    for folder in folders:
        data = pl.read_parquet(folder / "data" / "0.parquet").drop_nulls("time")
        rows = pl.read_parquet(folder / "labels" / "next_visit.parquet")
        found: dict[int, tuple[datetime, list[str]]] = {}
        for (subject,), visits in data.group_by("subject_id", maintain_order=True):
            times = visits["time"].unique().sort()
            last = visits.filter((pl.col("time") == times[-1]) & pl.col("code").str.starts_with("CODE//"))
            found[int(str(subject))] = (times[-2], last["code"].to_list())
        assert rows["subject_id"].unique(maintain_order=True).to_list() == list(found)
        for (subject,), own in rows.group_by("subject_id", maintain_order=True):
            before, codes = found[int(str(subject))]
            assert own["prediction_time"].unique().to_list() == [before]
            assert own["categorical_value"].to_list() == codes


def test_label_files_hold_what_was_drawn(folders: list[Path]) -> None:
    """Phenotypes and readmission on disk are the arrays of the same seed, a file per task, a row per patient."""
    for index, (folder, recipe) in enumerate(zip(folders, MEDIUM.sites, strict=True)):
        site = generate_site(recipe, 4, index, scale=0.02)
        for number, task in enumerate(PHENOTYPE_TASKS):
            rows = pl.read_parquet(folder / "labels" / f"{task}.parquet")
            assert rows["subject_id"].to_list() == site.subject_id.tolist()
            assert rows["boolean_value"].to_list() == site.phenotype[:, number].tolist()
        rows = pl.read_parquet(folder / "labels" / "time_to_readmission.parquet")
        np.testing.assert_array_equal(rows["float_value"].to_numpy(), site.readmission_days)
        assert rows["boolean_value"].to_list() == site.readmission_seen.tolist()
        rate = pl.read_parquet(folder / "truth.parquet")["readmission_rate"].to_numpy()
        np.testing.assert_array_equal(rate, site.readmission_rate)


@pytest.fixture(scope="module")
def average() -> SiteRecords:
    """18,000 patients of an average hospital."""
    return generate_site(SiteRecipe("average", 6000, 0.12), 11, 0)


def test_phenotypes_are_calibrated_and_have_their_prevalence(average: SiteRecords) -> None:
    """In each fifth of patients by probability labels come as promised; an average hospital has the stated shares."""
    for number, law in enumerate(PHENOTYPES):
        probability, label = average.phenotype_probability[:, number], average.phenotype[:, number]
        for fifth in np.array_split(np.argsort(probability), 5):
            p = probability[fifth]
            assert abs(label[fifth].mean() - p.mean()) < 4 * math.sqrt(p @ (1 - p)) / len(p)
        chance = math.sqrt(law.prevalence * (1 - law.prevalence) * (1 / 18_000 + 1 / 10_000))
        assert abs(label.mean() - law.prevalence) < 4 * chance


def test_a_phenotypes_law_is_the_same_at_every_hospital(average: SiteRecords) -> None:
    """Another prevalence, signal or recording error of the diagnosis changes no phenotype, nor its probability."""
    recipe = SiteRecipe("average", 300, 0.12)
    plain = generate_site(recipe, 1, 0)
    for other in (
        generate_site(replace(recipe, prevalence=0.3, missed_label_rate=0.2), 1, 0),
        generate_site(recipe, 1, 0, signal=2.0, order=0.5),
    ):
        np.testing.assert_array_equal(other.phenotype_probability, plain.phenotype_probability)
        np.testing.assert_array_equal(other.phenotype, plain.phenotype)


def test_the_rare_code_is_rare_and_tells(average: SiteRecords) -> None:
    """Under one patient in a hundred carries the code; most of them have phenotype 9, hardly anybody else has."""
    carriers = np.isin(
        average.subject_id, average.event_subject[average.event_code == CODES.index(f"CODE//{RARE_CODE}")]
    )
    assert 0.004 < carriers.mean() < 0.01
    rare = average.phenotype[:, 9]
    assert 0.5 < rare[carriers].mean() < 0.8
    assert rare[~carriers].mean() < 0.012


def test_readmission_waits_as_long_as_its_rate_says(average: SiteRecords) -> None:
    """Events per person-day over groups of like rate are the rate; follow-up is uniform and says nothing of the record.

    With exponential times and censoring that ignores them, events have expectation rate x time under observation.
    """
    for tenth in np.array_split(np.argsort(average.readmission_rate), 10):
        expected = float(average.readmission_rate[tenth] @ average.readmission_days[tenth].astype(float))
        assert abs(average.readmission_seen[tenth].sum() - expected) < 4 * math.sqrt(expected)
    low, high = FOLLOW_UP_DAYS
    censored = average.readmission_days[~average.readmission_seen]
    assert censored.min() >= low - 0.01
    assert censored.max() <= high + 0.01
    assert 0.3 < average.readmission_seen.mean() < 0.6
    early = average.readmission_seen & (average.readmission_days < low)  # before anybody is censored
    assert auroc(early, average.readmission_rate) > 0.6


def test_local_codes_are_another_name_for_the_same_record() -> None:
    """A hospital's local codes change the spelling of its common codes and nothing else: no label, time or value."""
    recipe = SiteRecipe("west", 400, 0.15)
    plain = generate_site(recipe, 2, 3)
    local = generate_site(replace(recipe, local_code_share=0.4), 2, 3)
    for name in ("label", "probability", "phenotype", "readmission_days", "event_time", "event_subject"):
        np.testing.assert_array_equal(getattr(local, name), getattr(plain, name))
    renamed = local.event_code >= len(CODES)
    np.testing.assert_array_equal(local.event_code[~renamed], plain.event_code[~renamed])
    names = np.array(CODES + LOCAL_CODES)
    assert [name.removesuffix(".1") for name in names[local.event_code[renamed]]] == names[
        plain.event_code[renamed]
    ].tolist()
    common = np.isin(plain.event_code, [CODES.index(f"CODE//{code}") for code in range(1, SHARED_CODES + 1)])
    assert abs(renamed[common].mean() - 0.4) < 0.01
    assert not renamed[~common].any()


def test_local_codes_are_explained_in_the_code_table(tmp_path: Path) -> None:
    """codes.parquet of a hospital with local codes names their parents; a schema with `shorten` reads them as these."""
    preset = Preset("mine", (SiteRecipe("west", 60, 0.2, local_code_share=1.0), SiteRecipe("east", 60, 0.2)))
    west, east = write_cohort(preset, 0, tmp_path / "cohort")
    table = pl.read_parquet(west / "metadata" / "codes.parquet")
    assert set(pl.read_parquet(west / "data" / "0.parquet")["code"]) <= set(table["code"])
    parents = dict(table.drop_nulls("parent_codes").select("code", pl.col("parent_codes").list.first()).iter_rows())
    assert set(parents) == set(LOCAL_CODES)
    assert pl.read_parquet(east / "metadata" / "codes.parquet")["code"].to_list() == list(CODES)
    plain = load(FEATURES, FeatureSchema)
    shortening = FeatureSchema(**{**plain.model_dump(), "shorten": {"CODE//": {"before": "."}}})
    assert shortening.counts_as(LOCAL_CODES) == parents
    assert plain.counts_as(LOCAL_CODES) == {}


def test_measurement_frequency_and_share_of_women_are_the_recipes() -> None:
    """Measuring twice as often raises the odds of a reading and moves no visit; the share of women is the recipe's."""
    recipe = SiteRecipe("north", 2000, 0.12)
    plain, often = generate_site(recipe, 0, 0), generate_site(replace(recipe, measurement_frequency=2.0), 0, 0)
    np.testing.assert_array_equal(plain.prediction_time, often.prediction_time)
    readings = [int((site.event_code < 6).sum()) for site in (plain, often)]
    assert 1.2 < readings[1] / readings[0] < 1.5
    women = generate_site(replace(recipe, female_share=0.3), 0, 0)
    share = float((women.event_code == CODES.index("SEX//F")).sum() / len(women.label))
    assert abs(share - 0.3) < 4 * math.sqrt(0.21 / 6000)
