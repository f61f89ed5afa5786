"""The clip of a study, from made-up patients: the gradient norm of a typical positive at the start, rounded down.

A clip below that norm weakens exactly the rare label (a negative's gradient is several times smaller at a public
prevalence of .14), and small clips cost more accuracy than noise does. The rule looks at no record: values are
standard normal on the schema's scale, measured at the schema's charting rates, so that the number is public.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from common.batching import Dataset
from common.models.network import build_network
from common.schema import FeatureSchema
from common.sequences import Sequences
from common.study import Study
from common.training import patient_losses

MADE_UP_PATIENTS = 201
USUAL_RATE = 0.3  # of a value whose schema names no charting rate
CODES_PER_STEP = 2
USUAL_STEPS = 10  # steps of a record without bins; binned records fill all of theirs
ROUND_TO = 0.5


def typical_clip(study: Study, seed: int = 0) -> float:
    """Median gradient norm of made-up positive patients at the study's starting weights, rounded down to .5.

    Args:
        study: schema, records, model and prevalence; its own clip is not read.
        seed: of the made-up patients and the starting weights.

    Returns:
        At least .5.
    """
    network = build_network(study, seed)
    dataset = Dataset(made_up_positives(study, seed), centre_mask=study.model.centre_mask)
    norms = []
    for patient in range(dataset.n_patients):
        network.zero_grad(set_to_none=True)
        patient_losses(network, dataset.batch(np.array([patient]))).sum().backward()
        square = sum(float(p.grad.square().sum()) for p in network.parameters() if p.grad is not None)
        norms.append(math.sqrt(square))
    return max(ROUND_TO, math.floor(float(np.median(norms)) / ROUND_TO) * ROUND_TO)


def made_up_positives(study: Study, seed: int) -> Sequences:
    """Records of `MADE_UP_PATIENTS` positive patients who never lived."""
    random, schema = np.random.default_rng(seed), study.features
    length = min(study.records.max_steps, USUAL_STEPS if study.records.bin_hours is None else study.records.max_steps)
    patients, steps = MADE_UP_PATIENTS, MADE_UP_PATIENTS * length
    measured = random.random((patients, length, schema.n_values)) < _charting_rates(study.features, study)
    values = np.where(measured, random.normal(size=measured.shape), 0.0)
    latest = np.maximum.accumulate(np.where(measured, np.arange(length)[None, :, None], 0), axis=1)
    carried = np.take_along_axis(values, latest, axis=1)
    codes = random.integers(0, max(1, schema.n_codes), steps * CODES_PER_STEP if schema.n_codes else 0)
    return Sequences(
        patient_id=np.arange(patients),
        patient=np.arange(patients),
        start=np.arange(patients + 1) * length,
        values=carried.reshape(steps, -1).astype(np.float32),
        measured=measured.reshape(steps, -1),
        gap=np.zeros(steps, np.float32),
        codes=codes,
        code_start=np.arange(steps + 1) * (CODES_PER_STEP if schema.n_codes else 0),
        statics=random.normal(size=(patients, schema.n_statics)).astype(np.float32),
        label=np.ones(patients, np.float32),
        prediction_time=np.zeros(patients, "datetime64[us]"),
    )


def _charting_rates(schema: FeatureSchema, study: Study) -> NDArray[np.float64]:
    """P(measured in a step) of each value: its hourly rate over the hours of a bin; a visit counts as one hour."""
    hours = study.records.bin_hours or 1.0
    hourly = np.array([schema.values[code].rate or USUAL_RATE for code in schema.value_codes])
    missed: NDArray[np.float64] = (1 - np.minimum(hourly, 0.999)) ** hours
    return 1 - missed
