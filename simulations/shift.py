"""How far a virtual site's records are from the pooled ones.

The measure is the total variation distance between the frequencies of codes in the site's events and in all events:
half the sum over codes of |site's share - pooled share| (Levin and Peres, Markov Chains and Mixing Times, 2nd ed.
2017, proposition 4.2): the part of a site's events that would have to carry another code. It needs no binning and no
smoothing of zeros, unlike the population stability index or a Kullback-Leibler divergence, and has a bound: 0 alike,
1 disjoint.

A small group differs from the whole by chance already, the more the smaller it is. So the distance stands beside that
of as many patients taken at random; what is above it is shift.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import polars as pl

from common.schema import CODE, SUBJECT_ID

REDEALS = 20  # random groups behind a site's chance shift; their mean has an error of a few per cent


def code_counts(events: pl.DataFrame, patients: pl.Series) -> npt.NDArray[np.int64]:
    """How often each patient has each code: rows (patient's place in `patients`, code's number, count), [N, 3]."""
    place = pl.DataFrame({SUBJECT_ID: patients, "place": np.arange(len(patients))})
    return (
        events.join(place, on=SUBJECT_ID)
        .group_by("place", CODE)
        .len()
        .sort("place", CODE)
        .select("place", pl.col(CODE).rank("dense").cast(pl.Int64) - 1, pl.col("len").cast(pl.Int64))
        .to_numpy()
    )


def total_variation(counts: npt.NDArray[np.int64], place: npt.NDArray[np.int64], sites: int) -> npt.NDArray[np.float64]:
    """Distance of each of K sites to the pooled records, [K].

    Args:
        counts: As `code_counts`, [N, 3].
        place: Site of each patient, [P].
        sites: K.
    """
    codes = int(counts[:, 1].max()) + 1
    table = np.bincount(place[counts[:, 0]] * codes + counts[:, 1], counts[:, 2], minlength=sites * codes)
    table = table.reshape(sites, codes)
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    pooled = table.sum(axis=0) / table.sum()
    return np.asarray(np.abs(share - pooled).sum(axis=1) / 2)


def chance_shift(
    counts: npt.NDArray[np.int64], place: npt.NDArray[np.int64], sites: int, random: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Mean `total_variation` of sites of the same sizes, their patients taken at random, [K]."""
    dealt = [total_variation(counts, random.permutation(place), sites) for _ in range(REDEALS)]
    return np.asarray(np.mean(dealt, axis=0))
