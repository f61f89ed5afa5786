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
Cells = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


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
    female = random.random(n) < recipe.female_share
    frailty = random.standard_normal(n)
    expected_visits = USUAL_VISITS * recipe.visit_frequency * np.exp(0.25 * frailty)
    visits = np.clip(random.poisson(expected_visits), FEWEST_VISITS, MOST_VISITS)
    visit = np.arange(visits.max()) < visits[:, None]
    minute = _visit_minutes(visit, random)
    cells = _cells(visit)
    codes, level = _care(recipe, visit, cells, minute / MINUTES_PER_DAY, frailty, random)

    # The more abnormal a vital, and the busier the hospital, the likelier it is measured.
    habit = 0.3 * np.log(recipe.visit_frequency) + np.log(recipe.measurement_frequency)
    measured = sigmoid(-0.6 + 0.9 * np.abs(level) + habit)
    observed = random.random((*visit.shape, VITALS))[cells] < measured
    noise = random.standard_normal((*visit.shape, VITALS))[cells]
    vitals = np.full((*visit.shape, VITALS), np.nan, np.float32)
    vitals[cells] = np.where(observed, np.round(level + 0.1 * noise, 3).astype(np.float32), np.float32(np.nan))
    return Records(
        visit=visit,
        minute=minute,
        codes=codes,
        vitals=vitals,
        age=np.round(age, 1).astype(np.float32),
        female=female,
    )


def _cells(visit: npt.NDArray[np.bool_]) -> Cells:
    """(patient, place in time) of each of C visits, first visits first, patients with most visits first.

    Random numbers are drawn for padded visits too, two in three, and nothing else is computed for them.
    """
    most_first = np.argsort(-visit.sum(axis=1), kind="stable")
    place, patient = np.nonzero(visit[most_first].T)
    return most_first[patient], place


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
    cells: Cells,
    day: FloatArray,
    frailty: FloatArray,
    random: np.random.Generator,
) -> tuple[npt.NDArray[np.int16], FloatArray]:
    """Codes [n, T, 4] and the true vitals of the cells [C, 6], visit by visit: each depends on the other's past.

    Vitals follow an Ornstein-Uhlenbeck walk (half-life about two months) around the patient's own level,
    which drifts in 45 % of patients and is lowered while the drug acts.
    """
    n, T = visit.shape
    gap = np.maximum(np.diff(day, axis=1, prepend=day[:, :1]), 0)[cells]
    day = day[cells]
    own_level = 0.15 * recipe.shift + 0.7 * random.standard_normal((n, VITALS))
    drift = random.standard_normal(frailty.shape) * (random.random(frailty.shape) < 0.45)
    drift_of_vital = np.array([1, 0.6, 0, 0, 0.4, 0])
    drug_on_vital = np.array([-0.5, 0, 0, 0, -0.25, 0])

    written = _ordinary_codes(recipe, random.random((n, T, CODES_PER_VISIT))[cells])
    count = np.minimum(1 + random.poisson(1.6, (n, T)), CODES_PER_VISIT)[cells]
    recorded = np.arange(CODES_PER_VISIT) < count[:, None]
    shock = 0.5 * random.standard_normal((n, T, VITALS))[cells]
    treats = random.random((n, T))[cells] < 0.35
    diagnoses = (frailty[cells[0]] > 0.3) & (random.random((n, T))[cells] < 0.10)
    level = own_level + 0.5 * random.standard_normal((n, VITALS))

    in_order = cells[0][:n]  # everybody has a first visit
    level, own_level, drift = level[in_order], own_level[in_order], drift[in_order]
    drug = np.zeros(n)  # how strongly the last dose still acts, 0 to 1
    vitals = np.zeros((len(gap), VITALS))
    end = 0
    for still in visit.sum(axis=0):  # the first so many patients come once more
        start, end = end, end + still
        now = slice(start, end)
        kept = np.exp(-gap[now, None] / 90)
        target = own_level[:still] + drift[:still, None] * drift_of_vital * day[now, None] / WINDOW_DAYS
        target = target + drug[:still, None] * drug_on_vital
        level = target + kept * (level[:still] - target) + np.sqrt(1.05 - kept**2) * shock[now]
        vitals[now] = level
        written[now, 0] = np.where(treats[now] & (level[:, 0] > 0.8), DRUG, written[now, 0])
        written[now, 1] = np.where(diagnoses[now], DIAGNOSIS, written[now, 1])
        written[now] *= recorded[now]
        drug = np.where((written[now] == DRUG).any(axis=1), 1.0, drug[:still] * np.exp(-gap[now] / 60))

    written.sort(axis=1)
    written[:, 1:][written[:, 1:] == written[:, :-1]] = 0  # once per visit
    codes = np.zeros((n, T, CODES_PER_VISIT), np.int16)
    codes[cells] = written
    return codes, vitals


def _ordinary_codes(recipe: SiteRecipe, uniform: FloatArray) -> npt.NDArray[np.int16]:
    """Codes 1..CODE_COUNT by a Zipf law (exponent 1.1); the hospital's habit rotates the rarer ones."""
    frequency = 1 / np.arange(1, CODE_COUNT + 1) ** 1.1
    cumulative = np.cumsum(frequency / frequency.sum())
    rank = np.minimum(np.searchsorted(cumulative, uniform, side="right"), CODE_COUNT - 1)
    code_of_rank = np.arange(1, CODE_COUNT + 1, dtype=np.int16)
    code_of_rank[SHARED_CODES:] = np.roll(code_of_rank[SHARED_CODES:], recipe.code_rotation)
    return np.asarray(code_of_rank[rank])


def label_probability(scores: FloatArray, recipe: SiteRecipe, signal: float, order: float = 1.0) -> FloatArray:
    """P(label = 1 | record) at a site, [n], recording errors included, for records of these `score`s of this order."""
    disease = sigmoid(signal * scores + intercept(recipe, signal, order))
    return disease * (1 - recipe.missed_label_rate) + (1 - disease) * recipe.false_label_rate


def score(records: Records, order: float = 1.0) -> FloatArray:
    """Log-odds of disease up to factor and intercept, [n], from the observed record alone.

    `order` is a factor on the two terms that a bag of codes and means cannot see: trend, and drug after diagnosis.

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
        + 0.9 * trend / 0.55 * order
        - 1.3 * treated_after * order
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
def intercept(recipe: SiteRecipe, signal: float, order: float = 1.0) -> float:
    """The intercept that gives a site its prevalence, solved on a reference draw that no cohort shares."""
    return solve_intercept(signal * score(reference_records(recipe), order), recipe.prevalence)


def reference_records(recipe: SiteRecipe) -> Records:
    """Records of a site that no cohort shares, the same for every seed."""
    random = np.random.Generator(np.random.Philox(key=list(REFERENCE_KEY)))
    return draw_records(recipe, REFERENCE_PATIENTS, random)


def solve_intercept(log_odds: FloatArray, prevalence: float) -> float:
    """What must be added to `log_odds` [n] for a mean probability of `prevalence`."""
    low, high = -50.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        if sigmoid(log_odds + middle).mean() > prevalence:
            high = middle
        else:
            low = middle
    return (low + high) / 2


def sigmoid(x: FloatArray) -> FloatArray:
    """Probability of a log-odds."""
    return 1 / (1 + np.exp(-x))
