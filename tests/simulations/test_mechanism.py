"""The label mechanism against a slow reading of the written events, and what records promise."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from common.errors import ConfigurationError
from common.metrics import auroc, calibration
from simulations.cohort import CODES, SiteRecords, best_possible, generate_site, read_truth, write_cohort
from simulations.mechanism import REFERENCE_KEY, RISK_CODES, intercept
from simulations.recipe import PRESETS, SiteRecipe

MEDIUM = PRESETS["medium"]


def _probability_from_events(events: list[tuple[datetime | None, str, float | None]], site: SiteRecipe) -> float:
    """P(label = 1) of one patient from its rows in the data file alone, as a sentence per term."""
    age = next(value for _, code, value in events if code == "AGE")
    assert age is not None
    female = any(code == "SEX//F" for _, code, _ in events)
    timed = [(time, code, value) for time, code, value in events if time is not None]
    end = max(time for time, _, _ in timed)
    visits = sorted({time for time, _, _ in timed})
    ago = {time: (end - time).total_seconds() / 86400 for time in visits}

    risk_codes = {f"CODE//{code}" for code in RISK_CODES}
    risk_visits = {time for time, code, _ in timed if code in risk_codes}
    risk = sum(math.exp(-ago[time] / 180) for time in risk_visits)

    recent = older = recent_weight = older_weight = 0.0
    for time, code, value in timed:
        if code == "VITAL//0":
            assert value is not None
            weight = math.exp(-ago[time] / 60)
            recent, recent_weight = recent + weight * value, recent_weight + weight
            older, older_weight = older + (1 - weight) * value, older_weight + 1 - weight
    trend = recent / (recent_weight + 0.3) - older / (older_weight + 0.3)

    diagnosed = [time for time, code, _ in timed if code == "CODE//12"]
    dosed = [time for time, code, _ in timed if code == "CODE//8"]
    protected = bool(diagnosed) and any(time > min(diagnosed) for time in dosed)
    busy = math.log1p(sum(ago[time] < 90 for time in visits))
    watched = sum(code == "VITAL//3" for _, code, _ in timed) / len(visits)

    score = 0.75 * (risk - 0.35) / 0.55 + 0.9 * trend / 0.55 - 1.3 * protected
    score += 0.3 * (busy - 1.1) / 0.45 + 0.35 * (watched - 0.5) / 0.2 + 0.45 * (age - 62) / 14 + 0.1 * female
    disease = 1 / (1 + math.exp(-(1.4 * score + intercept(site, 1.4))))
    return disease * (1 - site.missed_label_rate) + (1 - disease) * site.false_label_rate


def test_truth_follows_from_the_written_events_alone(tmp_path: Path) -> None:
    """Each stored probability equals the one read off the patient's own rows on disk, at every site."""
    for folder, recipe in zip(write_cohort(MEDIUM, 3, tmp_path / "cohort", scale=0.03), MEDIUM.sites, strict=True):
        events: dict[int, list[tuple[datetime | None, str, float | None]]] = {}
        for subject, *event in pl.read_parquet(folder / "data" / "0.parquet").iter_rows():
            time, code, value = event
            events.setdefault(subject, []).append((time, code, value))
        truth = read_truth(folder)
        assert list(events) == truth["subject_id"].to_list()
        expected = [_probability_from_events(rows, recipe) for rows in events.values()]
        np.testing.assert_allclose(truth["probability"].to_numpy(), expected, rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def sites() -> list[SiteRecords]:
    """The four hospitals of `medium`, twice their usual size: 52,800 patients."""
    return [generate_site(recipe, 21, index, scale=2) for index, recipe in enumerate(MEDIUM.sites)]


def test_the_truth_is_calibrated(sites: list[SiteRecords]) -> None:
    """In each tenth of patients by probability, and in a recalibration, labels come as promised."""
    for site in sites:
        for tenth in np.array_split(np.argsort(site.probability), 10):
            p = site.probability[tenth]
            spread = math.sqrt(p @ (1 - p)) / len(p)
            assert abs(site.label[tenth].mean() - p.mean()) < 4 * spread
    label = np.concatenate([site.label for site in sites])
    slope, level = calibration(label, np.concatenate([site.probability for site in sites]))
    assert abs(slope - 1) < 0.05  # 4 sd
    assert abs(level) < 0.1


def test_sites_have_their_prevalence(sites: list[SiteRecords]) -> None:
    """The share of labels at each site is the recipe's, recording errors included, within chance."""
    for site, recipe in zip(sites, MEDIUM.sites, strict=True):
        expected = recipe.recorded_prevalence
        chance = math.sqrt(expected * (1 - expected) / len(site.label))
        reference = math.sqrt(expected * (1 - expected) / 10_000)  # the intercept's own error is smaller than this
        assert abs(site.label.mean() - expected) < 4 * math.hypot(chance, reference)


def test_labels_reach_the_analytic_optimum(sites: list[SiteRecords]) -> None:
    """The AUROC of the true probability on the drawn labels agrees with the analytic one within chance."""
    for site in sites:
        # sd of an AUROC is below sqrt(A (1 - A) / min(positives, negatives)) (Birnbaum and Klose 1957)
        best = best_possible(site.probability)
        bound = math.sqrt(best * (1 - best) / min(site.label.sum(), (~site.label).sum()))
        assert abs(auroc(site.label, site.probability) - best) < 4 * bound


def test_events_do_not_depend_on_the_label() -> None:
    """Another prevalence, signal or recording error changes labels and probabilities, never an event."""
    recipe = MEDIUM.sites[0]
    plain = generate_site(recipe, 1, 0, scale=0.1)
    for other in (
        generate_site(replace(recipe, prevalence=0.4), 1, 0, scale=0.1),
        generate_site(recipe, 1, 0, scale=0.1, signal=0.5),
        generate_site(replace(recipe, missed_label_rate=0.3), 1, 0, scale=0.1),
    ):
        for column in ("event_subject", "event_time", "event_code", "event_value", "prediction_time"):
            np.testing.assert_array_equal(getattr(other, column), getattr(plain, column))
        assert np.any(other.probability != plain.probability)


def test_the_intercept_is_solved_on_patients_of_no_cohort() -> None:
    """The reference stream's key lies beyond every seed, and one intercept serves every seed and size."""
    assert min(REFERENCE_KEY) >= 2**63
    with pytest.raises(ConfigurationError, match="seed="):
        generate_site(MEDIUM.sites[0], REFERENCE_KEY[0], 0)
    intercept.cache_clear()
    first = intercept(MEDIUM.sites[0], 1.4)
    generate_site(MEDIUM.sites[0], 9, 0, scale=0.01)
    intercept.cache_clear()
    assert intercept(MEDIUM.sites[0], 1.4) == first


def test_recording_errors_enter_the_probability_exactly() -> None:
    """With P(disease) p, P(label) is p (1 - missed) + (1 - p) false."""
    recipe = SiteRecipe("north", 200, 0.2)
    disease = generate_site(recipe, 1, 0).probability
    noisy = replace(recipe, missed_label_rate=0.1, false_label_rate=0.02)
    recorded = generate_site(noisy, 1, 0).probability
    np.testing.assert_allclose(recorded, disease * 0.9 + (1 - disease) * 0.02, rtol=1e-14)


def test_a_stronger_signal_raises_the_optimum() -> None:
    """The best possible AUROC grows with `signal`; without any signal it is one half."""
    recipe = MEDIUM.sites[0]
    weak, usual, strong = (
        best_possible(generate_site(recipe, 1, 0, scale=0.25, signal=signal).probability) for signal in (0.0, 1.0, 2.0)
    )
    assert weak == pytest.approx(0.5)
    assert 0.75 < usual < strong - 0.05


def test_common_codes_are_shared_and_rare_ones_rotated() -> None:
    """A coding habit leaves the 50 commonest codes as they are and moves each rarer one's frequency."""
    shares = []
    for rotation in (0, 60):
        site = generate_site(SiteRecipe("north", 6000, 0.1, code_rotation=rotation), 1, 0)
        shares.append(np.bincount(site.event_code, minlength=len(CODES))[6:406] / len(site.event_code))
    np.testing.assert_allclose(shares[0][:50], shares[1][:50], rtol=0.15)
    assert np.corrcoef(shares[0][50:], shares[1][50:])[0, 1] < 0.5
    assert np.corrcoef(shares[0][50:], np.roll(shares[1][50:], 60))[0, 1] > 0.9


def test_sick_patients_are_measured_more(sites: list[SiteRecords]) -> None:
    """Missingness is informative: recorded vitals lie further from 0 than all; about half are recorded.

    Vital 5 has no drift and no drug: its law in the population is known (mean 0, sd about .86).
    """
    site = sites[0]
    vital = site.event_value[site.event_code == CODES.index("VITAL//5")]
    visits = len(np.unique(np.stack([site.event_subject, site.event_time.astype(np.int64)]), axis=1).T)
    visits -= len(site.subject_id)  # facts without a time
    assert 0.4 < len(vital) / visits < 0.6
    assert np.mean(vital**2) > 1.2 * (0.7**2 + 0.5**2)
