"""Held-out patients' scores as a histogram per class: the one thing of them that a site may send, with noise.

Where the bins lie is public: they follow from the study's prevalence and its number of bins, never from scores. Rows
are the labels 0 and 1, columns the bins of the logit from the lowest up; the outer two are open.

Decisions a reader would question:

- A patient's k sequences count 1/k each, as in the loss. One sequence per patient (the last) would bound a patient as
  well, but score another population, and throw records away.
- The shares are whole numbers of 2^-24, 1/k rounded down: so a patient's are at most 1 together, and sums of up to
  2^29 patients are exact. With float64's 1/k, three thirds of many patients would not be.
- Bins of the logit around the prevalence, not of the probability: where the label is rare, nearly all probabilities
  would fall into the first bin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SENSITIVITY = 1.0
REACH = 4.0  # logits from the prevalence to the outer edges
UNITS = 2**24
CLASSES = 2
HISTOGRAM = "histogram"  # its name among the arrays of a reply


@dataclass(frozen=True)
class ScoreBins:
    """`number` bins of the logit, at least 3, of equal width between `REACH` below and above logit(prevalence)."""

    number: int
    prevalence: float

    @property
    def edges(self) -> NDArray[np.float64]:
        """[number - 1] logits between the bins, ascending."""
        centre = math.log(self.prevalence / (1 - self.prevalence))
        return centre + np.linspace(-REACH, REACH, self.number - 1)

    @property
    def middles(self) -> NDArray[np.float64]:
        """[number] logits that stand for the bins; an open one's lies half a width beyond its edge."""
        edges = self.edges
        half = (edges[1] - edges[0]) / 2
        return np.append(edges - half, edges[-1] + half)

    def of(self, logit: NDArray[np.float64]) -> NDArray[np.int64]:
        """Bin of each logit [S]. A logit that is no number is in the highest: every score has a bin."""
        return np.searchsorted(self.edges, logit).astype(np.int64)  # NaN sorts last


def histogram(
    bins: ScoreBins, patient: NDArray[np.int64], label: NDArray[np.float32], logit: NDArray[np.float64]
) -> NDArray[np.float64]:
    """How many patients have each label and score, [2, bins]; a patient of k sequences counts 1/k in each.

    Args:
        bins: public.
        patient: [S] owner of each sequence.
        label: [S] 0 or 1.
        logit: [S] any numbers, also infinite ones and NaN.

    Guarantee:
        Adding or removing all sequences of one patient moves the result by at most `SENSITIVITY` = 1 in L2, whatever
        the scores are, if each is a function of its own patient. The k shares of a patient are whole numbers of
        2^-24, not negative, each at most 1/k. So they add up to at most 1: that bounds the L1 norm of what the patient
        adds, and the L2 norm is never larger. One sequence, or several in one cell, reaches it. Sums are exact.
    """
    sequences = np.bincount(patient, minlength=1)
    cells = np.zeros((CLASSES, bins.number), np.int64)
    np.add.at(cells, ((label > 0.5).astype(np.int64), bins.of(logit)), UNITS // sequences[patient])
    return cells / UNITS
