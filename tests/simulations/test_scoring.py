"""Scores on held-out patients against plain counting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from common.errors import ConfigurationError, DataError
from common.metrics import auroc, brier
from common.study import Study, load_study
from common.terms import parse
from simulations.hospitals import Hospitals
from simulations.rows import MIN_EVENTS, POOLED
from simulations.scoring import Grouping, HeldOut, calibrate, check_groupings, score_sites, score_subgroups
from tests.simulations.sweeps import ROOT

STUDY = load_study(ROOT / "configs" / "demo.yaml")
FEMALE = Grouping(static="SEX//F", levels={"female": 1, "male": 0})
AGES = Grouping(static="AGE", bands=(45.0, 60.0))


@pytest.fixture(scope="module")
def held_out(cohort: dict[str, Path]) -> HeldOut:
    """All four tiny hospitals: 352 held-out patients."""
    return HeldOut(Hospitals(STUDY, cohort, 0))


@pytest.fixture(scope="module")
def risk(held_out: HeldOut) -> NDArray[np.float64]:
    """Risks that know something: the truth, blurred."""
    truth = np.concatenate([t for t in held_out.truth.values() if t is not None])
    return 1 / (1 + (1 / truth - 1) * np.exp(np.random.default_rng(0).normal(0, 0.5, len(truth))))


def ages_and_sexes(cohort: dict[str, Path], held_out: HeldOut) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Age and female, read from the events by another way, in the order of the sequences."""
    ages, females = [], []
    for site, part in zip(held_out.datasets, held_out.sequences, strict=True):
        events = pl.read_parquet(cohort[site] / "data" / "0.parquet")
        age = dict(events.filter(pl.col("code") == "AGE").select("subject_id", "numeric_value").iter_rows())
        female = set(events.filter(pl.col("code") == "SEX//F")["subject_id"])
        ids = part.patient_id[part.patient]
        ages += [age[i] for i in ids]
        females += [i in female for i in ids]
    return np.array(ages), np.array(females)


def test_a_site_is_scored_on_its_own_patients(held_out: HeldOut, risk: NDArray[np.float64]) -> None:
    """Sizes, AUROC and Brier of a site are those of its rows; `pooled` are all, with declared patients added up."""
    rows = {row.site: row for row in score_sites(STUDY, held_out, risk, 20)}
    mine = held_out.site == "east"
    assert list(rows) == ["east", "north", "south", "west", POOLED]
    assert rows["east"].auroc.value == auroc(held_out.label[mine], risk[mine])
    assert rows[POOLED].brier.value == pytest.approx(brier(held_out.label, risk))
    assert (rows["east"].sequences, rows["east"].positives) == (mine.sum(), held_out.label[mine].sum())
    assert rows["east"].declared_patients == 2500
    assert rows[POOLED].declared_patients == 8800
    assert rows[POOLED].auroc.low <= rows[POOLED].auroc.value <= rows[POOLED].auroc.high  # type: ignore[operator]


def test_a_site_that_did_not_train_declares_nothing(held_out: HeldOut, risk: NDArray[np.float64]) -> None:
    """Of a site that is scored but not in the study, the row says 0 patients."""
    rest = STUDY.model_copy(update={"sites": {"north": STUDY.sites["north"]}})
    rows = {row.site: row.declared_patients for row in score_sites(rest, held_out, risk, 1)}
    assert rows == {"east": 0, "north": 4000, "south": 0, "west": 0, POOLED: 4000}


def test_what_is_undefined_is_none_and_stops_nothing(cohort: dict[str, Path]) -> None:
    """A site with labels of one class has no AUROC, but a Brier score; the others are scored as ever."""
    held_out = HeldOut(Hospitals(STUDY, cohort, 0))
    held_out.label = np.where(held_out.site == "west", 0.0, held_out.label).astype(np.float32)
    rows = {row.site: row for row in score_sites(STUDY, held_out, np.full(len(held_out.label), 0.2), 20)}
    assert rows["west"].auroc.value is None
    assert rows["west"].brier.value == pytest.approx(0.04)
    assert rows["north"].auroc.value == 0.5


def test_risks_that_are_no_numbers_are_refused(held_out: HeldOut) -> None:
    """A network that diverged is said to have, instead of having no score."""
    with pytest.raises(DataError, match=r"not finite: training diverged; lower training\.learning_rate"):
        score_sites(STUDY, held_out, np.full(len(held_out.label), np.nan), 1)


def test_calibration_bins_are_counts(held_out: HeldOut, risk: NDArray[np.float64]) -> None:
    """Bins hold equally many sequences of neighbouring risk; predicted, observed and interval are theirs."""
    found = calibrate(held_out, risk)
    order = np.argsort(risk)
    assert sum(b.sequences for b in found.bins) == len(risk)
    assert max(b.sequences for b in found.bins) - min(b.sequences for b in found.bins) <= 2
    lowest = order[: found.bins[0].sequences]
    assert found.bins[0].predicted == pytest.approx(risk[lowest].mean())
    assert found.bins[0].observed == pytest.approx(held_out.label[lowest].mean())
    assert all(0 <= b.low <= b.observed <= b.high <= 1 for b in found.bins)
    assert found.slope is not None


def test_one_risk_for_everybody_is_one_bin(held_out: HeldOut) -> None:
    """Equal predictions are not told apart, and have no slope but a level."""
    found = calibrate(held_out, np.full(len(held_out.label), 0.14))
    assert [b.sequences for b in found.bins] == [len(held_out.label)]
    assert (found.slope, found.intercept) == (None, None)
    assert found.in_the_large is not None


def test_subgroups_are_those_of_the_records(
    cohort: dict[str, Path], held_out: HeldOut, risk: NDArray[np.float64]
) -> None:
    """Groups by sex and by age in years hold the patients whose events say so, with their own AUROC."""
    age, female = ages_and_sexes(cohort, held_out)
    groups = {"sex": FEMALE, "age": AGES}
    found = {g.group: g for g in score_subgroups(STUDY.features, groups, held_out, risk, 20)}
    expected = {"female": female, "male": ~female, "< 45": age < 45, "45 to < 60": (age >= 45) & (age < 60)}
    expected[">= 60"] = age >= 60
    assert list(found) == list(expected)
    for name, mine in expected.items():
        events = int(held_out.label[mine].sum())
        if events < MIN_EVENTS:
            assert (found[name].patients, found[name].events, found[name].auroc) == (None, None, None)
            continue
        assert (found[name].patients, found[name].events) == (mine.sum(), events)
        assert found[name].auroc.value == auroc(held_out.label[mine], risk[mine])  # type: ignore[union-attr]


def test_a_group_with_few_events_is_masked(held_out: HeldOut, risk: NDArray[np.float64]) -> None:
    """Below ten events nothing of a group is in the row, not even its size."""
    oldest = Grouping(static="AGE", bands=(100.0,))
    (_, old) = score_subgroups(STUDY.features, {"age": oldest}, held_out, risk, 1)
    assert (old.group, old.patients, old.events, old.auroc) == (">= 100", None, None, None)


def test_groups_by_code_are_those_with_the_code(
    cohort: dict[str, Path], held_out: HeldOut, risk: NDArray[np.float64]
) -> None:
    """A patient is in a code's group if the code stands anywhere in the sequence."""
    code = "CODE//1"
    (group,) = score_subgroups(STUDY.features, {"x": Grouping(codes={"has": code})}, held_out, risk, 1)
    index, count = STUDY.features.codes.index(code), 0
    for part in held_out.sequences:
        for s in range(part.n_sequences):
            count += index in part.codes[part.code_start[part.start[s]] : part.code_start[part.start[s + 1]]]
    assert group.patients == count


@pytest.mark.parametrize(
    ("grouping", "message"),
    [
        ({"static": "AGE"}, "give `static` with one of"),
        ({"bands": [3]}, "give `static` with one of"),
        ({"static": "AGE", "bands": [60, 45]}, "bands must rise"),
        ({"static": "AGE", "codes": {"a": "b"}}, "give `static` with one of"),
    ],
)
def test_a_grouping_that_means_nothing_is_refused(grouping: dict[str, object], message: str) -> None:
    """One way of grouping, said in full."""
    with pytest.raises(ConfigurationError, match=message):
        parse(grouping, Grouping, "sweep.yaml")


@pytest.mark.parametrize(
    ("grouping", "message"),
    [
        (Grouping(static="WEIGHT", bands=(70.0,)), "static = WEIGHT: the static columns of synthetic are AGE, SEX//F"),
        (Grouping(codes={"a": "CODE//0"}), "CODE//0 is not listed"),
    ],
)
def test_a_grouping_by_what_is_not_read_is_refused(grouping: Grouping, message: str) -> None:
    """Before anything is trained, a grouping by an unknown column or code is an error."""
    with pytest.raises(ConfigurationError, match=message):
        check_groupings(STUDY.features, {"x": grouping}, "sweep.yaml")


def test_study_is_not_needed_for_truth(cohort: dict[str, Path]) -> None:
    """Records without truth have no best possible AUROC, alone or pooled."""
    held_out = HeldOut(Hospitals(_two_sites(), cohort, 0))
    assert held_out.best_possible("north") is not None
    held_out.truth["north"] = None
    assert held_out.best_possible("north") is None
    assert held_out.best_possible() is None


def _two_sites() -> Study:
    return STUDY.model_copy(update={"sites": {name: STUDY.sites[name] for name in ("east", "north")}})
