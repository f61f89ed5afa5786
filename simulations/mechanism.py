"""How a virtual patient's record comes about, and how a label depends on it.

The order matters: first a record (visits, codes, vitals, what was measured), then P(disease | record) from
that record *as it is stored*, then the label as one coin (`cohort.py`). So the probability is exact for
whoever reads the record, and no model can beat it: a cohort's best possible AUROC is known.

What such a record shares with a real one: frailty drives visits and diagnoses; gaps are irregular; few codes
are common and many rare (Zipf); vitals wander around a patient's own level and some drift; a drug is given
when a vital is high and lowers it (confounding by indication); what is measured depends on how the patient is
(informative missingness); hospitals differ in age and level, in how often they see patients and in how they
code rare things. The label depends on order and timing of events besides their presence, so that a recurrent
model has something to gain over a bag of codes.

Decisions a reader would question:

- A site's intercept is solved on a reference draw of that site, from a stream of its own and the same for
  every seed, not on the patients drawn. Solved on the cohort, each patient's probability would depend on the
  other patients, and every cohort would have its prevalence exactly, which no hospital has. The terms of the
  score have fixed scales for the same reason.
- Values are kept as a hospital would record them (vitals to 0.001, age to 0.1 year, time to the minute), and
  the label reads the float32 numbers that are written. That makes P(label | record) exact, and cohorts equal
  across machines: a last-bit difference of exp() disappears in the rounding. The stream itself is numpy's:
  Philox is fixed, but `standard_normal`, `poisson` and `integers` may change in a future numpy (NEP 19); the
  golden hash in the tests would tell.
- A code appears once per visit: repeats would say nothing about the label.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import numpy.typing as npt

from simulations.recipe import SiteRecipe

VITALS = 6
CODE_COUNT = 400
CODES_PER_VISIT = 4
DRUG = 8
DIAGNOSIS = 12
RISK_CODES = (DIAGNOSIS, 21, 35, 58)
SHARED_CODES = 50  # every hospital uses the common codes alike; the rarer ones are rotated by habit

WINDOW_DAYS = 730
MINUTES_PER_DAY = 1440
FEWEST_VISITS, MOST_VISITS, USUAL_VISITS = 3, 40, 9.0

REFERENCE_PATIENTS = 10_000  # place a prevalence of .12 to about .002
REFERENCE_KEY = (2**64 - 1, 2**64 - 1)  # of Philox; seeds of cohorts end at 2**63

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Records:
    """n observed records padded to T visits; all that a reader of the data will know, all the label reads.

    visit: [n, T] bool, True first. minute: [n, T] int64 from the start of the window, strictly ascending over
        visits, 0 after.
    codes: [n, T, CODES_PER_VISIT] int16, 1..CODE_COUNT, 0 for none, no repeats within a visit.
    vitals: [n, T, VITALS] float32, NaN where not observed. age: [n] float32, years. female: [n] bool.
    """

    visit: npt.NDArray[np.bool_]
    minute: npt.NDArray[np.int64]
    codes: npt.NDArray[np.int16]
    vitals: npt.NDArray[np.float32]
    age: npt.NDArray[np.float32]
    female: npt.NDArray[np.bool_]

    def first(self, patients: int) -> Self:
        """The first records of these."""
        return type(self)(*(getattr(self, field.name)[:patients] for field in fields(self)))

    @property
    def last_minute(self) -> npt.NDArray[np.int64]:
        """Time of the last visit, [n]."""
        return np.asarray(self.minute.max(axis=1))


def draw_records(recipe: SiteRecipe, n: int, random: np.random.Generator) -> Records:
    """Draw n observed records of a site."""
    age = np.clip(62 + 4 * recipe.shift + 14 * random.standard_normal(n), 18, 95)
    female = random.random(n) < 0.5
    frailty = random.standard_normal(n)
    expected_visits = USUAL_VISITS * recipe.visit_frequency * np.exp(0.25 * frailty)
    visits = np.clip(random.poisson(expected_visits), FEWEST_VISITS, MOST_VISITS)
    visit = np.arange(visits.max()) < visits[:, None]
    minute = _visit_minutes(visit, random)
    codes, level = _care(recipe, visit, minute / MINUTES_PER_DAY, frailty, random)

    # The more abnormal a vital, and the busier the hospital, the likelier it is measured.
    measured = _sigmoid(-0.6 + 0.9 * np.abs(level) + 0.3 * np.log(recipe.visit_frequency))
    observed = (random.random(level.shape) < measured) & visit[..., None]
    reading = np.round(level + 0.1 * random.standard_normal(level.shape), 3).astype(np.float32)
    return Records(
        visit=visit,
        minute=minute,
        codes=codes,
        vitals=np.where(observed, reading, np.float32(np.nan)),
        age=np.round(age, 1).astype(np.float32),
        female=female,
    )


def _visit_minutes(visit: npt.NDArray[np.bool_], random: np.random.Generator) -> npt.NDArray[np.int64]:
    """Uniform times over the window, in order; visits in the same minute move on to the next free one."""
    minute = random.integers(0, WINDOW_DAYS * MINUTES_PER_DAY, visit.shape)
    minute = np.sort(np.where(visit, minute, 2**40), axis=1)
    place = np.arange(visit.shape[1])
    minute = np.maximum.accumulate(minute - place, axis=1) + place
    return np.where(visit, minute, 0)


def _care(
    recipe: SiteRecipe,
    visit: npt.NDArray[np.bool_],
    day: FloatArray,
    frailty: FloatArray,
    random: np.random.Generator,
) -> tuple[npt.NDArray[np.int16], FloatArray]:
    """Codes [n, T, 4] and true vitals [n, T, 6], visit by visit: each depends on the other's past.

    Vitals follow an Ornstein-Uhlenbeck walk (half-life about two months) around the patient's own level,
    which drifts in 45 % of patients and is lowered while the drug acts.
    """
    n, T = visit.shape
    gap = np.maximum(np.diff(day, axis=1, prepend=day[:, :1]), 0)
    own_level = 0.15 * recipe.shift + 0.7 * random.standard_normal((n, VITALS))
    drift = random.standard_normal(frailty.shape) * (random.random(frailty.shape) < 0.45)
    drift_of_vital = np.array([1, 0.6, 0, 0, 0.4, 0])
    drug_on_vital = np.array([-0.5, 0, 0, 0, -0.25, 0])

    ordinary = _ordinary_codes(recipe, random.random((n, T, CODES_PER_VISIT)))
    count = np.minimum(1 + random.poisson(1.6, (n, T)), CODES_PER_VISIT)
    recorded = (np.arange(CODES_PER_VISIT) < count[..., None]) & visit[..., None]
    shock = 0.5 * random.standard_normal((n, T, VITALS))
    treats = random.random((n, T)) < 0.35
    diagnoses = (frailty[:, None] > 0.3) & (random.random((n, T)) < 0.10)

    codes = np.zeros((n, T, CODES_PER_VISIT), np.int16)
    vitals = np.zeros((n, T, VITALS))
    level = own_level + 0.5 * random.standard_normal((n, VITALS))
    drug = np.zeros(n)  # how strongly the last dose still acts, 0 to 1
    for k in range(T):
        kept = np.exp(-gap[:, k, None] / 90)
        target = own_level + drift[:, None] * drift_of_vital * day[:, k, None] / WINDOW_DAYS
        target = target + drug[:, None] * drug_on_vital
        level = target + kept * (level - target) + np.sqrt(1.05 - kept**2) * shock[:, k]
        vitals[:, k] = level
        written = ordinary[:, k].copy()
        written[treats[:, k] & (level[:, 0] > 0.8), 0] = DRUG
        written[diagnoses[:, k], 1] = DIAGNOSIS
        codes[:, k] = np.where(recorded[:, k], written, 0)
        drug = np.where((codes[:, k] == DRUG).any(axis=1), 1.0, drug * np.exp(-gap[:, k] / 60))

    codes.sort(axis=2)
    codes[..., 1:][codes[..., 1:] == codes[..., :-1]] = 0  # once per visit
    return codes, vitals


def _ordinary_codes(recipe: SiteRecipe, uniform: FloatArray) -> npt.NDArray[np.int16]:
    """Codes 1..CODE_COUNT by a Zipf law (exponent 1.1); the hospital's habit rotates the rarer ones."""
    frequency = 1 / np.arange(1, CODE_COUNT + 1) ** 1.1
    cumulative = np.cumsum(frequency / frequency.sum())
    rank = np.minimum(np.searchsorted(cumulative, uniform, side="right"), CODE_COUNT - 1)
    code_of_rank = np.arange(1, CODE_COUNT + 1, dtype=np.int16)
    code_of_rank[SHARED_CODES:] = np.roll(code_of_rank[SHARED_CODES:], recipe.code_rotation)
    return np.asarray(code_of_rank[rank])


def label_probability(records: Records, recipe: SiteRecipe, signal: float) -> FloatArray:
    """P(label = 1 | record) at a site, [n], recording errors included."""
    disease = _sigmoid(signal * score(records) + intercept(recipe, signal))
    return disease * (1 - recipe.missed_label_rate) + (1 - disease) * recipe.false_label_rate


def score(records: Records) -> FloatArray:
    """Log-odds of disease up to factor and intercept, [n], from the observed record alone.

    Every term is put on a fixed scale (about mean 0, sd 1 at an average hospital), never on the cohort's own.
    """
    ago = (records.last_minute[:, None] - records.minute) / MINUTES_PER_DAY  # days before the last visit
    has = functools.partial(_visits_with, records)

    # Risk codes count less the longer ago they were written (half-life about four months).
    risk = (has(RISK_CODES) * np.exp(-ago / 180)).sum(axis=1)

    # Trend of vital 0: its recent mean minus its older mean, both shrunk to 0 where little was measured.
    vital = records.vitals[..., 0].astype(np.float64)
    measured = ~np.isnan(vital)
    recency = np.exp(-ago / 60)
    trend = _shrunk_mean(vital, measured * recency) - _shrunk_mean(vital, measured * (1 - recency))

    # Order: the drug protects only if some dose came after the first diagnosis.
    diagnosis, drug = has((DIAGNOSIS,)), has((DRUG,))
    treated_after = (drug & (np.cumsum(diagnosis, axis=1) - diagnosis > 0)).any(axis=1)

    busy = np.log1p((records.visit & (ago < 90)).sum(axis=1))
    watched = (~np.isnan(records.vitals[..., 3])).sum(axis=1) / records.visit.sum(axis=1)
    return np.asarray(
        0.75 * (risk - 0.35) / 0.55
        + 0.9 * trend / 0.55
        - 1.3 * treated_after
        + 0.3 * (busy - 1.1) / 0.45
        + 0.35 * (watched - 0.5) / 0.2
        + 0.45 * (records.age.astype(np.float64) - 62) / 14
        + 0.1 * records.female
    )


def _visits_with(records: Records, codes: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """Visits at which one of the codes was written, [n, T]."""
    return np.asarray(np.isin(records.codes, codes).any(axis=2))


def _shrunk_mean(value: FloatArray, weight: FloatArray) -> FloatArray:
    """Weighted mean over visits [n, T] -> [n], pulled to 0 as by a reading of 0 with weight .3."""
    return np.asarray((np.nan_to_num(value) * weight).sum(axis=1) / (weight.sum(axis=1) + 0.3))


@functools.cache
def intercept(recipe: SiteRecipe, signal: float) -> float:
    """The intercept that gives a site its prevalence, solved on a reference draw that no cohort shares."""
    random = np.random.Generator(np.random.Philox(key=list(REFERENCE_KEY)))
    reference = signal * score(draw_records(recipe, REFERENCE_PATIENTS, random))
    low, high = -50.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        if _sigmoid(reference + middle).mean() > recipe.prevalence:
            high = middle
        else:
            low = middle
    return (low + high) / 2


def _sigmoid(x: FloatArray) -> FloatArray:
    return 1 / (1 + np.exp(-x))
