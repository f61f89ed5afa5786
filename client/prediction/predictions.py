"""Weights and sequences -> probabilities, and the table in which they are written.

The columns are those of MEDS evaluation (meds-evaluation, `schema.py`), so that its tools read the file as it is.
A patient with several prediction times has a row for each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from client.prediction.asked import Asked
from common.batching import Dataset
from common.device import resolve
from common.errors import DataError
from common.metrics import Calibration, FloatArray, recalibrate
from common.models.network import build_network
from common.schema import BOOLEAN_VALUE, PREDICTION_TIME, SUBJECT_ID
from common.training import load_state, predict
from common.weights import Weights

if TYPE_CHECKING:
    from common.study import Study

PREDICTED_VALUE, PREDICTED_PROBABILITY = "predicted_boolean_value", "predicted_boolean_probability"


def probabilities(
    study: Study, weights: Weights, asked: Asked, device: str, recalibration: Calibration | None = None
) -> FloatArray:
    """Predicted probability of a positive label [S].

    Args:
        study: whose network it is.
        weights: of that network, checked.
        asked: S sequences.
        device: where to compute, as in the site file.
        recalibration: applied to the network's probabilities.

    Raises:
        DataError: the network says something that is no number.
    """
    network = build_network(study)
    load_state(network, weights)
    placed = resolve(device)
    dataset = Dataset(asked.sequences, centre_mask=study.model.centre_mask, device=placed)
    found = predict(network.to(placed), dataset)
    if not np.isfinite(found).all():
        raise DataError("the network's predictions are not finite: the weights are absurd; ask the coordinator")
    return found if recalibration is None else recalibrate(found, recalibration)


def table(asked: Asked, probability: FloatArray, threshold: float) -> pl.DataFrame:
    """The five columns, a row per sequence, by patient and time. Rows are patients: local only.

    Args:
        asked: S sequences; the label of those that are not `known` is null.
        probability: [S].
        threshold: `predicted_boolean_value` says whether the probability is at least this.
    """
    sequences = asked.sequences
    label = pl.Series(sequences.label > 0)
    return pl.DataFrame(
        {
            SUBJECT_ID: sequences.patient_id[sequences.patient],
            PREDICTION_TIME: sequences.prediction_time,
            BOOLEAN_VALUE: label.set(pl.Series(~asked.known), None),
            PREDICTED_VALUE: probability >= threshold,
            PREDICTED_PROBABILITY: probability,
        }
    )
