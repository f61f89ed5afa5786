"""Local recalibration: two numbers that make a shared model's risks true at one hospital.

    logit(risk here) = intercept + slope * logit(risk of the shared model)

fitted on this hospital's tuning patients, who have trained nothing, and kept in a file of this hospital. The order of
patients stays as it was, so AUROC and AUPRC do, too.

It is a further use of the records, which no epsilon covers: the two numbers are exact statistics of patients. That is
why it is done after the shared weights are final, for this hospital's own predictions, and why the file stays here:
nothing of wardround sends it, and anything that influences a released update must be public or noised.

Source: Cox, Biometrika 45 (1958); Platt, Advances in Large Margin Classifiers (1999); Steyerberg, Clinical Prediction
Models (2009), ch. 15 (logistic recalibration as the modest way of updating a model).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import yaml
from pydantic import Field

from client.durable import replace_durably
from client.prediction.evaluation import enough
from common.errors import ConfigurationError, DataError
from common.metrics import Calibration, FloatArray, calibration
from common.terms import Terms, load

if TYPE_CHECKING:
    from client.prediction.asked import Asked
    from client.prediction.weights import FinalWeights
    from common.study import Study

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Recalibration(Terms):
    """The file: for which study and weights it was fitted, and the two numbers.

    Attributes:
        study: digest of the study's terms.
        weights: sha256 of the file of weights.
        slope, intercept: see the module docstring.
    """

    version: Literal[1] = 1
    study: Digest
    weights: Digest
    slope: float = Field(gt=0, le=1000)
    intercept: float = Field(ge=-1000, le=1000)

    @property
    def calibration(self) -> Calibration:
        """The two numbers."""
        return Calibration(self.slope, self.intercept)


def fit(study: Study, weights: FinalWeights, asked: Asked, probability: FloatArray) -> Recalibration:
    """Fit to the labelled sequences of `asked`, each of them counting once.

    Args:
        study, weights: for which it is.
        asked: of tuning patients.
        probability: of the shared model, [S].

    Raises:
        DataError: too few patients or labels of one kind, or risks that do not rise with the label.
    """
    label, patient = asked.sequences.label[asked.known], asked.sequences.patient[asked.known]
    if not enough(patient, label):
        raise DataError(
            "the tuning patients are too few for a recalibration (50 patients, 10 labels of each kind); go without it"
        )
    found = calibration(label, probability[asked.known])
    if not found.slope > 0:
        raise DataError(
            "among the tuning patients risk does not rise with the label, and a recalibration would turn the model's "
            "order round; do not use this model here"
        )
    return Recalibration(study=study.digest(), weights=weights.sha256, slope=found.slope, intercept=found.intercept)


def write(path: Path, recalibration: Recalibration) -> None:
    """Put it into a new file, whole, for this user alone. Raises ConfigurationError: it exists, or cannot be made."""
    if os.path.lexists(path):
        raise ConfigurationError(f"{path}: exists and is not overwritten; move it away first")
    try:
        replace_durably(path, yaml.safe_dump(recalibration.model_dump(), sort_keys=False).encode())
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be written ({error.strerror}); choose another folder") from None


def read(path: Path, study: Study, weights: FinalWeights) -> Recalibration:
    """Read it for these weights of this study.

    Raises:
        ConfigurationError: no such file, damaged, or fitted for other weights or another study.
    """
    found = load(path, Recalibration)
    for what, fitted, here in (("study", found.study, study.digest()), ("weights", found.weights, weights.sha256)):
        if fitted != here:
            raise ConfigurationError(
                f"{path}: was fitted for {what} {fitted[:12]}, these are {here[:12]}; fit it anew with "
                "`wardround client recalibrate`"
            )
    return found
