"""What else can be predicted from a virtual patient's record: ten phenotypes, time to readmission, the next visit.

As with the diagnosis (`mechanism.py`) the record comes first, each outcome is drawn from a law that reads nothing but
the record, and so P(phenotype | record) and the rate of readmission are known exactly.

- Phenotypes 0 to 8 depend on three codes each (recent ones more), a vital sign and age.
- Phenotype 9 is the rare one: its signal is a code that under one patient in a hundred carries (by the hospital's
  visits and coding), who has it in six cases of ten. It shows what clipping and noise do to the long tail.
- Readmission comes at a constant rate, e^(.6 score) / 700 days with the diagnosis's score; follow-up ends 180 to 720
  days after the prediction, uniformly and whatever the record says. The label is the earlier of the two, in days, and
  whether it is the readmission.
- The next visit: the codes written at the last visit, to be predicted at the one before.

Decisions a reader would question:

- The law of a phenotype is the same at every hospital, solved for its prevalence at an average one. So phenotypes
  differ between sites by case mix alone (covariate shift), the diagnosis by prevalence and recording errors too.
- The random numbers are drawn after those of the diagnosis, from the same stream: the diagnosis stays what it was.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from simulations import mechanism
from simulations.mechanism import CODE_COUNT, MINUTES_PER_DAY, FloatArray, Records, sigmoid, solve_intercept
from simulations.recipe import SiteRecipe

RARE_CODE = 340
CARRIER_LOG_ODDS = 5.5
DAYS_PER_READMISSION = 700.0
FOLLOW_UP_DAYS = (180.0, 720.0)
AVERAGE_HOSPITAL = SiteRecipe("average", 1, 0.12)


@dataclass(frozen=True)
class Phenotype:
    """One of the ten labels: codes, the vital and the weight of its mean, weight of age, prevalence.

    The weights are on log-odds: of one visit with a code today, of one unit of the vital, of 14 years.
    """

    codes: tuple[int, ...]
    vital: int
    code_weight: float
    vital_weight: float
    age_weight: float
    prevalence: float


PHENOTYPES: tuple[Phenotype, ...] = (
    Phenotype((13, 22, 40), 0, 2.0, 0.7, 0.5, 0.30),
    Phenotype((14, 23, 41), 1, 2.0, -0.7, 0.3, 0.25),
    Phenotype((15, 24, 42), 2, 2.5, 0.9, 0.0, 0.20),
    Phenotype((16, 25, 43), 3, 2.5, -0.9, 0.5, 0.15),
    Phenotype((17, 26, 44), 4, 2.5, 0.7, -0.4, 0.12),
    Phenotype((18, 27, 45), 5, 3.0, 0.5, 0.6, 0.10),
    Phenotype((19, 28, 46), 0, 3.0, -0.7, 0.0, 0.08),
    Phenotype((20, 29, 47), 2, 3.0, 0.7, 0.4, 0.06),
    Phenotype((21, 30, 48), 4, 3.0, 0.9, -0.3, 0.04),
    Phenotype((RARE_CODE,), 0, 0.0, 0.0, 0.0, 0.012),
)
_RARE = len(PHENOTYPES) - 1
_PHENOTYPE_OF_CODE = np.full(CODE_COUNT + 1, -1)
for _number, _phenotype in enumerate(PHENOTYPES):
    _PHENOTYPE_OF_CODE[list(_phenotype.codes)] = _number


@dataclass(frozen=True)
class Outcomes:
    """Of n patients. phenotype: [n, 10] bool, with phenotype_probability, [n, 10]. readmission_days: [n] float32, to
    readmission or the end of follow-up; readmission_seen: [n] bool, which; readmission_rate: [n], per day.
    """

    phenotype: npt.NDArray[np.bool_]
    phenotype_probability: FloatArray
    readmission_days: npt.NDArray[np.float32]
    readmission_seen: npt.NDArray[np.bool_]
    readmission_rate: FloatArray


def draw_outcomes(records: Records, diagnosis_score: FloatArray, n: int, random: np.random.Generator) -> Outcomes:
    """Draw the outcomes of the records, taking the random numbers of n >= len(records) patients from the stream."""
    size = len(records.age)
    coin = random.random((n, len(PHENOTYPES)))[:size]
    waited = random.standard_exponential(n)[:size]
    followed = random.uniform(*FOLLOW_UP_DAYS, n)[:size]
    probability = phenotype_probability(records)
    rate = np.exp(0.6 * diagnosis_score) / DAYS_PER_READMISSION
    days = waited / rate
    return Outcomes(
        phenotype=coin < probability,
        phenotype_probability=probability,
        readmission_days=np.round(np.minimum(days, followed), 2).astype(np.float32),
        readmission_seen=days <= followed,
        readmission_rate=rate,
    )


def phenotype_probability(records: Records) -> FloatArray:
    """P(phenotype | record), [n, 10]."""
    return sigmoid(phenotype_scores(records) + _intercepts())


def phenotype_scores(records: Records) -> FloatArray:
    """Log-odds of each phenotype up to its intercept, [n, 10], from the observed record alone."""
    n, count = len(records.age), len(PHENOTYPES)
    owner = _PHENOTYPE_OF_CODE[records.codes]
    patient, visit, cell = np.nonzero(owner >= 0)
    ago = (records.last_minute[patient] - records.minute[patient, visit]) / MINUTES_PER_DAY
    place = patient * count + owner[patient, visit, cell]
    recent = np.bincount(place, np.exp(-ago / 180), n * count).reshape(n, count)
    carrier = recent[:, _RARE] > 0

    measured = ~np.isnan(records.vitals)
    mean = np.where(measured, records.vitals, 0).sum(axis=1, dtype=np.float64) / (measured.sum(axis=1) + 0.3)
    age = (records.age.astype(np.float64) - 62) / 14
    score = recent * [p.code_weight for p in PHENOTYPES]
    score += mean[:, [p.vital for p in PHENOTYPES]] * [p.vital_weight for p in PHENOTYPES]
    score += age[:, None] * [p.age_weight for p in PHENOTYPES]
    score[:, _RARE] += CARRIER_LOG_ODDS * carrier
    return np.asarray(score)


@functools.cache
def _intercepts() -> FloatArray:
    """The ten intercepts that give an average hospital the prevalences."""
    reference = phenotype_scores(mechanism.reference_records(AVERAGE_HOSPITAL))
    return np.array([solve_intercept(reference[:, number], p.prevalence) for number, p in enumerate(PHENOTYPES)])
