"""Who goes to which virtual site: every function gives each patient [P] the number of one site, 0 .. K - 1.

Decisions a reader would question:

- Dirichlet label skew is per class: the patients of a class go to the sites in shares drawn from Dirichlet(alpha) (Hsu,
  Qi and Brown 2019, `Measuring the effects of non-identical data distribution`; in this per-class form Li, Diao, Chen
  and He, ICDE 2022). So sites differ in size too, as there.
- Shares are dealt out exactly, rounded, in a random order, instead of drawing a site for every patient: the skew of a
  seed is then the shares', without binomial noise on top.
- Quantiles are by middle rank, so that patients of equal value go to the same site: a site is a range of the covariate.
  Patients without a number are dealt out evenly.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import polars as pl

from common.errors import DataError
from common.schema import CODE, NUMERIC_VALUE, SUBJECT_ID

Place = npt.NDArray[np.int64]
MODIFIER = "//"  # MEDS separates the parts of a code with it


def by_shares(strata: npt.NDArray[np.int64], shares: npt.NDArray[np.float64], random: np.random.Generator) -> Place:
    """Deal out each stratum by its row of `shares`, in random order.

    Args:
        strata: Stratum of each patient, [P], 0 .. S - 1.
        shares: Of the sites in each stratum, [S, K], rows summing to 1.
        random: Of the order.
    """
    place = np.empty(len(strata), np.int64)
    for stratum, row in enumerate(shares):
        members = np.flatnonzero(strata == stratum)
        bounds = np.round(np.concatenate([[0.0], np.cumsum(row)[:-1], [1.0]]) * len(members)).astype(np.int64)
        place[members] = random.permutation(np.repeat(np.arange(len(row)), np.diff(bounds)))
    return place


def equal_shares(sites: int) -> npt.NDArray[np.float64]:
    """[K] of 1 / K."""
    return np.full(sites, 1 / sites)


def log_normal_shares(sites: int, sigma: float, random: np.random.Generator) -> npt.NDArray[np.float64]:
    """[K] shares proportional to exp(sigma z), z standard normal."""
    raw = np.exp(sigma * random.standard_normal(sites))
    return np.asarray(raw / raw.sum())


def by_quantile(value: npt.NDArray[np.float64], sites: int, random: np.random.Generator) -> Place:
    """Site k holds the (k + 1)-th of K equal ranges of the ranks of `value` [P]; NaN is dealt out evenly."""
    place = np.empty(len(value), np.int64)
    known = ~np.isnan(value)
    _, group, count = np.unique(value[known], return_inverse=True, return_counts=True)
    middle = (np.cumsum(count) - count / 2) / max(1, known.sum())
    place[known] = np.floor(sites * middle).astype(np.int64)[group]
    missing = int((~known).sum())
    place[~known] = by_shares(np.zeros(missing, np.int64), equal_shares(sites)[None], random)
    return place


def home_by_column(events: pl.DataFrame, patients: pl.Series, column: str) -> pl.Series:
    """The value of `column` that most of a patient's events carry, as text, [P]; of equally many the first by name.

    Raises:
        DataError: no such column, or patients without a value in it.
    """
    if column not in events.columns:
        raise DataError(f"the events have no column `{column}`; their columns are {', '.join(events.columns)}")
    counted = events.select(SUBJECT_ID, pl.col(column).cast(pl.String).alias("home")).drop_nulls()
    counted = (
        counted.group_by(SUBJECT_ID, "home").len().sort(SUBJECT_ID, "len", "home", descending=[False, True, False])
    )
    return _home_of(counted, patients, f"a value in column `{column}`")


def home_by_code(events: pl.DataFrame, patients: pl.Series, code: str) -> pl.Series:
    """The first hospital that a code names in a patient's record, as text, [P].

    The name is what follows `code//`, or else the event's `text_value`, or else its number.

    Raises:
        DataError: patients without such an event.
    """
    name = pl.when(pl.col(CODE) != code).then(pl.col(CODE).str.strip_prefix(code + MODIFIER))
    text = [pl.col("text_value").cast(pl.String)] if "text_value" in events.columns else []
    number = pl.col(NUMERIC_VALUE)
    whole = pl.when(number == number.floor()).then(number.cast(pl.Int64, strict=False).cast(pl.String))
    found = events.filter((pl.col(CODE) == code) | pl.col(CODE).str.starts_with(code + MODIFIER)).select(
        SUBJECT_ID, pl.coalesce(name, *text, whole, number.cast(pl.String)).alias("home")
    )
    return _home_of(found.drop_nulls(), patients, f"an event `{code}` that names a hospital")


def first_number(events: pl.DataFrame, patients: pl.Series, code: str) -> npt.NDArray[np.float64]:
    """The first number that a patient's record has under `code`, [P], NaN where it has none.

    Raises:
        DataError: nobody has one.
    """
    found = events.filter((pl.col(CODE) == code) & pl.col(NUMERIC_VALUE).is_finite())
    if found.is_empty():
        raise DataError(f"0 patients have a number under code `{code}`; name a code that carries one")
    first = found.unique(SUBJECT_ID, keep="first", maintain_order=True).select(SUBJECT_ID, NUMERIC_VALUE)
    joined = patients.to_frame(SUBJECT_ID).join(first, on=SUBJECT_ID, how="left", maintain_order="left")
    return joined[NUMERIC_VALUE].cast(pl.Float64).fill_null(np.nan).to_numpy()


def _home_of(found: pl.DataFrame, patients: pl.Series, what: str) -> pl.Series:
    """Each patient's first row of `found`."""
    first = found.unique(SUBJECT_ID, keep="first", maintain_order=True)
    home = patients.to_frame(SUBJECT_ID).join(first, on=SUBJECT_ID, how="left", maintain_order="left")["home"]
    if home.null_count():
        raise DataError(
            f"{home.null_count()} of {len(home)} patients have not {what}; remove them or choose another way"
        )
    return home
