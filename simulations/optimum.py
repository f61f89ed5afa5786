"""The best that any model can do on patients whose P(label = 1 | record) is known exactly.

All three numbers are expectations over the labels, not the score of one draw of them. For AUROC and AUPRC they are the
ratio of the expected numerator to the expected denominator, which differs from the expected ratio by O(1 / patients).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from common.errors import DataError
from common.metrics import auroc

FloatArray = npt.NDArray[np.float64]


class Optimum(NamedTuple):
    """What no model can beat: AUROC and AUPRC from above, the Brier score from below."""

    auroc: float
    auprc: float
    brier: float


def optimum(probability: npt.ArrayLike) -> Optimum:
    """All three for patients with these exact probabilities, [P]. Raises DataError as `best_possible`."""
    return Optimum(best_possible(probability), best_possible_auprc(probability), best_possible_brier(probability))


def best_possible(probability: npt.ArrayLike) -> float:
    """The AUROC that no model can beat on patients with these exact probabilities P(label = 1 | record), [P].

    Analytic: the expected number of (positive, negative) pairs of different patients in the right order, over
    the expected number of such pairs, when patients are ranked by the probability itself. That ranking is
    optimal (Neyman and Pearson 1933). One draw of labels scatters around it.

    Raises:
        DataError: fewer than two patients, or probabilities outside [0, 1] or that make one class certain.
    """
    p = np.asarray(probability, dtype=np.float64)
    if p.size < 2:
        raise DataError("ranking needs at least two patients; raise the scale of the cohort")
    # Every patient is a positive with weight p and a negative with weight 1 - p; the pairs of a patient with
    # itself, which a ranking counts one half each, are taken out again.
    both = auroc(np.repeat([True, False], len(p)), np.concatenate([p, p]), np.concatenate([p, 1 - p]))
    pairs, with_itself = p.sum() * (1 - p).sum(), p @ (1 - p)
    return float((both * pairs - with_itself / 2) / (pairs - with_itself))


def best_possible_auprc(probability: npt.ArrayLike) -> float:
    """The average precision that no model can beat on patients with these exact probabilities, [P].

    A positive patient adds the precision at its own threshold: itself, and the expected positives among all others at
    or above it, over all patients at or above it. Ranking by the probability is optimal here too: whoever dominates in
    ROC space dominates in precision and recall (Davis and Goadrich, ICML 2006).

    Raises:
        DataError: no patient, or probabilities outside [0, 1] or that make one class certain.
    """
    p = np.sort(_checked(probability))[::-1]
    if not 0 < p.sum() < len(p):
        raise DataError("the probabilities make one class certain; average precision needs both")
    last = np.flatnonzero(np.append(p[1:] != p[:-1], True))  # ties share the threshold of the last of them
    flagged = last + 1
    expected = np.cumsum(p)[last]
    start = np.concatenate([[0], flagged[:-1]])
    of_group, of_pairs = np.add.reduceat(p, start), np.add.reduceat(p**2, start)
    return float(((of_group * (1 + expected) - of_pairs) / flagged).sum() / p.sum())


def best_possible_brier(probability: npt.ArrayLike) -> float:
    """The Brier score that no model can beat: the mean of p (1 - p), reached by predicting p itself, [P].

    Raises:
        DataError: no patient, or probabilities outside [0, 1].
    """
    p = _checked(probability)
    return float(np.mean(p * (1 - p)))


def _checked(probability: npt.ArrayLike) -> FloatArray:
    p = np.asarray(probability, dtype=np.float64)
    if p.ndim != 1 or p.size == 0:
        raise DataError(f"probabilities have shape {p.shape}, expected one per patient and at least one patient")
    if not ((p >= 0) & (p <= 1)).all():
        raise DataError("probabilities must lie in [0, 1]; pass P(label = 1 | record)")
    return p
