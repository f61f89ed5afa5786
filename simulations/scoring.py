"""Scores on the held-out patients of virtual hospitals: per site and pooled, calibration, subgroups.

Scoring is the simulation's privilege: it sees every virtual hospital's held-out records. Nothing that is scored
flows back into training.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import nn

from common import metrics
from common.errors import ConfigurationError, DataError
from common.schema import FeatureSchema, NumericFeature
from common.sequences import Sequences
from common.study import Study
from common.terms import Terms
from common.training import predict
from simulations.cohort import best_possible, read_truth, true_tasks
from simulations.hospitals import HELD_OUT, Hospitals
from simulations.meds_folder import TRUTH
from simulations.rows import MIN_EVENTS, POOLED, Bin, CalibrationRow, Estimate, SiteRow, Subgroup

BINS, LEAST_IN_BIN = 10, 20
WILSON_Z = 1.96


class Grouping(Terms):
    """How held-out patients fall into groups: by a static column of the schema, or by codes of the record.

    static: column name; with `bands` (their inner bounds, in the static's unit) or `levels` (group -> number).
    codes: group -> code that stands in the record.

    A static that was never recorded lies at the schema's centre and is counted there.
    """

    static: str | None = None
    bands: tuple[float, ...] = ()
    levels: dict[str, float] = Field(default_factory=dict)
    codes: dict[str, Annotated[str, Field(min_length=1)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if sum(map(bool, (self.bands, self.levels, self.codes))) != 1 or (self.static is None) != bool(self.codes):
            raise ValueError("give `static` with one of `bands` and `levels`, or `codes` alone")
        if list(self.bands) != sorted(set(self.bands)):
            raise ValueError("bands must rise")
        return self


class HeldOut:
    """The held-out patients of all sites, ready to be scored again and again.

    `patient`, `label` and `site` have one entry per sequence, sites one after another; `truth` is the exact
    probability of every sequence of a synthetic site, else None.
    """

    def __init__(self, hospitals: Hospitals) -> None:
        self.datasets = {site: hospitals.dataset(site, (HELD_OUT,)) for site in hospitals.study.sites}
        parts = self.sequences
        offset = np.cumsum([0, *(part.n_patients for part in parts)])
        self.patient = np.concatenate([part.patient + start for part, start in zip(parts, offset, strict=False)])
        self.label = np.concatenate([part.label for part in parts])
        self.site = np.repeat(list(self.datasets), [part.n_sequences for part in parts])
        if len(np.unique(self.label)) < 2:
            raise DataError("the held-out patients of all sites have labels of one class only; AUROC needs both")
        task = hospitals.study.task.name
        self.truth = {site: _truth(hospitals.directories[site], task, d.sequences) for site, d in self.datasets.items()}

    @property
    def sequences(self) -> list[Sequences]:
        """The records, site by site."""
        return [dataset.sequences for dataset in self.datasets.values()]

    def probabilities(self, network: nn.Module) -> NDArray[np.float64]:
        """Predicted probability of every held-out sequence, sites one after another."""
        return np.concatenate([predict(network, dataset) for dataset in self.datasets.values()])

    def best_possible(self, site: str = POOLED) -> float | None:
        """AUROC that no model can beat on these patients, if all of them are synthetic."""
        known = list(self.truth.values()) if site == POOLED else [self.truth[site]]
        found = [part for part in known if part is not None]
        return best_possible(np.concatenate(found)) if len(found) == len(known) else None


def score_sites(
    study: Study, held_out: HeldOut, probability: NDArray[np.float64], resamples: int
) -> tuple[SiteRow, ...]:
    """One row per scored site, then all held-out patients pooled. Intervals: patient bootstrap.

    Raises:
        DataError: predictions that are no numbers.
    """
    if not np.isfinite(probability).all():
        raise DataError("predictions are not finite: training diverged; lower training.learning_rate")
    rows = []
    for site in (*held_out.datasets, POOLED):
        mine = held_out.site == site if site != POOLED else np.ones(len(held_out.site), bool)
        patient, label, risk = held_out.patient[mine], held_out.label[mine], probability[mine]
        rows.append(
            SiteRow(
                site=site,
                declared_patients=sum(
                    terms.declared_patients for name, terms in study.sites.items() if site in (name, POOLED)
                ),
                patients=len(np.unique(patient)),
                sequences=len(label),
                positives=int(label.sum()),
                auroc=_estimate(metrics.auroc, patient, label, risk, resamples),
                auprc=_estimate(metrics.auprc, patient, label, risk, resamples),
                brier=_estimate(metrics.brier, patient, label, risk, resamples),
                best_possible=held_out.best_possible(site),
            )
        )
    return tuple(rows)


def calibrate(held_out: HeldOut, probability: NDArray[np.float64]) -> CalibrationRow:
    """Calibration on all held-out patients; equal predictions share a bin, so that there may be fewer than BINS.

    Wilson's interval takes sequences as independent: too narrow where patients have several.
    """
    label = held_out.label.astype(np.float64)
    wanted = max(1, min(BINS, len(label) // LEAST_IN_BIN))
    edges = np.quantile(probability, np.arange(1, wanted) / wanted)
    place = np.searchsorted(edges, probability, side="left")
    bins = tuple(_bin(label[place == b], probability[place == b]) for b in np.unique(place))
    return CalibrationRow(bins, *_recalibrated(label, probability))


def score_subgroups(
    schema: FeatureSchema,
    groupings: Mapping[str, Grouping],
    held_out: HeldOut,
    probability: NDArray[np.float64],
    resamples: int,
) -> tuple[Subgroup, ...]:
    """AUROC of each group of held-out patients, all sites together; groups with few events are masked."""
    found = []
    for attribute, grouping in groupings.items():
        for group, mine in _members(schema, grouping, held_out.sequences).items():
            patient, label = held_out.patient[mine], held_out.label[mine]
            events = int(label.sum())
            if min(events, len(label) - events) < MIN_EVENTS:
                found.append(Subgroup(attribute, group, None, None, None))
                continue
            auroc = _estimate(metrics.auroc, patient, label, probability[mine], resamples)
            found.append(Subgroup(attribute, group, len(np.unique(patient)), events, auroc))
    return tuple(found)


def check_groupings(schema: FeatureSchema, groupings: Mapping[str, Grouping], where: str) -> None:
    """Refuse a grouping by what the schema does not read. Raises ConfigurationError."""
    for attribute, grouping in groupings.items():
        if grouping.static is not None and grouping.static not in schema.static_columns:
            known = ", ".join(schema.static_columns) or "none"
            raise ConfigurationError(
                f"{where}: subgroups.{attribute}.static = {grouping.static}: the static columns of {schema.name} are "
                f"{known}"
            )
        unknown = sorted(set(grouping.codes.values()) - set(schema.codes))
        if unknown:
            raise ConfigurationError(f"{where}: subgroups.{attribute}.codes: {unknown[0]} is not listed in the schema")


def _members(schema: FeatureSchema, grouping: Grouping, parts: list[Sequences]) -> dict[str, NDArray[np.bool_]]:
    """Group -> which sequences [S] are in it."""
    if grouping.codes:
        return {name: _with_code(schema.codes.index(code), parts) for name, code in grouping.codes.items()}
    assert grouping.static is not None
    column = schema.static_columns.index(grouping.static)
    number = np.concatenate([part.statics[:, column] for part in parts]).astype(np.float64)
    feature = schema.statics.get(grouping.static)
    if isinstance(feature, NumericFeature):
        number = number * feature.scale + feature.centre
        number = np.expm1(number) if feature.log else number
    if grouping.levels:
        return {name: np.isclose(number, level, atol=1e-3) for name, level in grouping.levels.items()}
    bounds = (-math.inf, *grouping.bands, math.inf)
    return {
        # Scaled in float32, 60 may come back as 59.9999.
        _band(low, high): (number >= low - 1e-3) & (number < high - 1e-3)
        for low, high in itertools.pairwise(bounds)
    }


def _band(low: float, high: float) -> str:
    if math.isinf(low):
        return f"< {high:g}"
    return f">= {low:g}" if math.isinf(high) else f"{low:g} to < {high:g}"


def _with_code(index: int, parts: list[Sequences]) -> NDArray[np.bool_]:
    """Whether each sequence has the code in one of its steps, [S]."""
    found = []
    for part in parts:
        before = np.concatenate([[0], np.cumsum(part.codes == index)])
        bounds = before[part.code_start[part.start]]
        found.append(np.diff(bounds) > 0)
    return np.concatenate(found)


def _estimate(
    metric: metrics.Metric,
    patient: NDArray[np.int64],
    label: NDArray[np.float32],
    probability: NDArray[np.float64],
    resamples: int,
) -> Estimate:
    """A metric with its interval, or as much of it as exists: a small site is no reason to stop."""
    try:
        return Estimate(*metrics.bootstrap(metric, patient, label, probability, resamples=resamples, seed=0))
    except DataError:
        once = np.ones(len(label))
        try:
            return Estimate(metric(label.astype(np.float64), probability, once))
        except DataError:
            return Estimate(None)


def _recalibrated(
    label: NDArray[np.float64], probability: NDArray[np.float64]
) -> tuple[float | None, float | None, float | None]:
    """Slope, intercept and calibration in the large, as far as they exist."""
    try:
        large = metrics.in_the_large(label, probability)
    except DataError:
        return None, None, None
    try:
        return *metrics.calibration(label, probability), large
    except DataError:
        return None, None, large


def _bin(label: NDArray[np.float64], probability: NDArray[np.float64]) -> Bin:
    n, observed = len(label), float(label.mean())
    spread = WILSON_Z**2 / n
    centre = (observed + spread / 2) / (1 + spread)
    half = math.sqrt(observed * (1 - observed) * spread + spread**2 / 4) / (1 + spread)
    return Bin(n, float(probability.mean()), observed, max(0.0, centre - half), min(1.0, centre + half))


def _truth(directory: Path, task: str, sequences: Sequences) -> NDArray[np.float64] | None:
    """Exact P(label | record) of the held-out patients where the records are synthetic."""
    if task not in true_tasks(directory):
        return None
    known = read_truth(directory, task)
    order = pl.DataFrame({"subject_id": sequences.patient_id[sequences.patient]})
    found = order.join(known, on="subject_id", how="left", maintain_order="left")["probability"]
    if found.null_count():
        raise DataError(f"{directory}/{TRUTH}: {found.null_count()} held-out patients are missing; rewrite it")
    return found.to_numpy()
