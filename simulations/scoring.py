"""Scores on the held-out patients of virtual hospitals: per site and pooled, calibration, subgroups.

Scoring is the simulation's privilege: it sees every virtual hospital's held-out records. Nothing that is scored
flows back into training.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from torch import nn

from common import metrics, scores
from common.errors import DataError
from common.groups import Grouping as Grouping
from common.groups import check_groupings as check_groupings
from common.groups import members
from common.schema import FeatureSchema
from common.scores import estimate
from common.sequences import Sequences
from common.study import Study
from common.training import predict
from simulations.cohort import best_possible, read_truth, true_tasks
from simulations.hospitals import HELD_OUT, Hospitals
from simulations.meds_folder import TRUTH
from simulations.rows import MIN_EVENTS, POOLED, CalibrationRow, SiteRow, Subgroup


class HeldOut:
    """The held-out patients of all sites, ready to be scored again and again.

    `patient`, `label` and `site` have one entry per sequence, sites one after another; `truth` is the exact
    probability of every sequence of a synthetic site, else None. `splits`: of a hospital that took no part, all
    patients are held out, whatever their split.
    """

    def __init__(self, hospitals: Hospitals, splits: tuple[str, ...] = (HELD_OUT,)) -> None:
        self.datasets = {site: hospitals.dataset(site, splits) for site in hospitals.study.sites}
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
                auroc=estimate(metrics.auroc, patient, label, risk, resamples),
                auprc=estimate(metrics.auprc, patient, label, risk, resamples),
                brier=estimate(metrics.brier, patient, label, risk, resamples),
                best_possible=held_out.best_possible(site),
            )
        )
    return tuple(rows)


def calibrate(held_out: HeldOut, probability: NDArray[np.float64]) -> CalibrationRow:
    """Calibration on all held-out patients, see `common.scores.calibrate`."""
    return scores.calibrate(held_out.label, probability)


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
        for group, mine in members(schema, grouping, held_out.sequences).items():
            patient, label = held_out.patient[mine], held_out.label[mine]
            events = int(label.sum())
            if min(events, len(label) - events) < MIN_EVENTS:
                found.append(Subgroup(attribute, group, None, None, None))
                continue
            auroc = estimate(metrics.auroc, patient, label, probability[mine], resamples)
            found.append(Subgroup(attribute, group, len(np.unique(patient)), events, auroc))
    return tuple(found)


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
