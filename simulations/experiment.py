"""One federated simulation, from a study to a result: train over a grid, score the held-out patients.

Scoring is the simulation's privilege: it sees every virtual hospital's held-out records. Nothing that is scored
flows back into training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import nn

from common.errors import DataError
from common.metrics import Interval, auroc, bootstrap
from common.models.network import build_network
from common.privacy.accounting import epsilon_of
from common.records import Status
from common.sequences import Sequences
from common.study import Study
from common.training import load_state, predict, state_of
from common.weights import Weights
from server.rounds import RoundRecord, run
from server.strategy import FederatedAveraging
from simulations.cohort import best_possible, read_truth
from simulations.hospitals import HELD_OUT, Hospitals
from simulations.local_grid import LocalGrid

SCORED_ROUNDS = 10  # rounds at which the pooled AUROC is taken for the figure, evenly spaced
POOLED = "pooled"


@dataclass(frozen=True)
class SiteScore:
    """A line of the final table; `site` is `pooled` for all held-out patients together."""

    site: str
    declared_patients: int
    epsilon: float
    auroc: Interval
    best_possible: float | None


@dataclass(frozen=True)
class Progress:
    """What is known after a round: who took part, the price of the steps so far, the pooled AUROC if it was taken."""

    round_number: int
    rounds: int
    epsilon: dict[str, float]
    refused: dict[str, str]
    seconds: float
    auroc: float | None


@dataclass
class Result:
    """A finished simulation."""

    study: Study
    seed: int
    weights: Weights
    scores: list[SiteScore]
    predictions: pl.DataFrame
    history: list[Progress] = field(default_factory=list)

    def score(self, site: str = POOLED) -> SiteScore:
        """The table's line for `site`."""
        return next(score for score in self.scores if score.site == site)


class HeldOut:
    """The held-out patients of all sites, ready to be scored again and again.

    `patient`, `label` and `site` have one entry per sequence, sites one after another; `truth` is the exact
    probability of every sequence of a synthetic site, else None.
    """

    def __init__(self, hospitals: Hospitals) -> None:
        self.datasets = {site: hospitals.dataset(site, (HELD_OUT,)) for site in hospitals.study.sites}
        parts = [dataset.sequences for dataset in self.datasets.values()]
        offset = np.cumsum([0, *(part.n_patients for part in parts)])
        self.patient = np.concatenate([part.patient + start for part, start in zip(parts, offset, strict=False)])
        self.label = np.concatenate([part.label for part in parts])
        self.site = np.repeat(list(self.datasets), [part.n_sequences for part in parts])
        if len(np.unique(self.label)) < 2:
            raise DataError("the held-out patients of all sites have labels of one class only; AUROC needs both")
        self.truth = {site: _truth(hospitals.directories[site], d.sequences) for site, d in self.datasets.items()}

    def probabilities(self, network: nn.Module) -> NDArray[np.float64]:
        """Predicted probability of every held-out sequence, sites one after another."""
        return np.concatenate([predict(network, dataset) for dataset in self.datasets.values()])


def simulate(
    hospitals: Hospitals,
    *,
    workers: int = 1,
    resamples: int = 1000,
    held_out: HeldOut | None = None,
    on_round: Callable[[Progress], None] = lambda _progress: None,
) -> Result:
    """Run the study over its virtual hospitals.

    Args:
        hospitals: the study, its records and the seed; equal arguments give equal results to the last bit.
        workers: processes of one thread each; does not change the result.
        resamples: bootstrap resamples of patients behind each interval.
        held_out: the held-out patients, if a caller with several runs has them already.
        on_round: called after every round.
    """
    study, seed = hospitals.study, hospitals.seed
    held_out = held_out or HeldOut(hospitals)
    network = build_network(study, seed)
    plan, rounds = study.plan(), study.training.rounds
    scored = set(np.linspace(rounds / SCORED_ROUNDS, rounds, SCORED_ROUNDS).round().astype(int).tolist())
    steps = dict.fromkeys(study.sites, 0)
    result = Result(study, seed, {}, [], pl.DataFrame())

    def note(record: RoundRecord) -> None:
        failed = [site for site, reason in record.refused.items() if reason == Status.LOCAL_FAILURE]
        for site in (*record.sites, *failed):  # an attempt that failed stays spent
            steps[site] += study.training.local_steps
        score = None
        if record.round_number in scored:
            load_state(network, record.weights)
            score = auroc(held_out.label, held_out.probabilities(network))
        spent = {site: epsilon_of(plan, taken) for site, taken in steps.items()} if score is not None else {}
        progress = Progress(record.round_number, rounds, spent, record.refused, record.seconds, score)
        result.history.append(progress)
        on_round(progress)

    with one_thread(), LocalGrid(hospitals.open, study.sites, workers=workers) as grid:
        strategy = FederatedAveraging(study, state_of(network), lambda: grid.roster)
        result.weights = run(grid, strategy, rounds=rounds, on_round=note)
        load_state(network, result.weights)
        probability = held_out.probabilities(network)
    result.predictions = predictions_table(held_out, probability)
    result.scores = score_sites(study, held_out, probability, resamples)
    return result


def score_sites(study: Study, held_out: HeldOut, probability: NDArray[np.float64], resamples: int) -> list[SiteScore]:
    """The final table: one line per site, then all held-out patients pooled. Intervals: patient bootstrap."""
    epsilon = epsilon_of(study.plan())
    rows = []
    for site in (*held_out.datasets, POOLED):
        mine = held_out.site == site if site != POOLED else np.ones(len(held_out.site), bool)
        known = held_out.truth.values() if site == POOLED else [held_out.truth[site]]
        best = [part for part in known if part is not None]
        interval = _interval(held_out.patient[mine], held_out.label[mine], probability[mine], resamples)
        rows.append(
            SiteScore(
                site=site,
                declared_patients=sum(
                    terms.declared_patients for name, terms in study.sites.items() if site in (name, POOLED)
                ),
                epsilon=epsilon,
                auroc=interval,
                best_possible=best_possible(np.concatenate(best)) if len(best) == len(list(known)) else None,
            )
        )
    return rows


def _interval(
    patient: NDArray[np.int64], label: NDArray[np.float32], probability: NDArray[np.float64], resamples: int
) -> Interval:
    """AUROC with its interval; NaN where a site's held-out patients are too few for one, which is no reason to stop."""
    try:
        return bootstrap(auroc, patient, label, probability, resamples=resamples, seed=0)
    except DataError:
        both = len(np.unique(label)) == 2
        return Interval(auroc(label, probability) if both else math.nan, math.nan, math.nan)


def predictions_table(held_out: HeldOut, probability: NDArray[np.float64]) -> pl.DataFrame:
    """Predictions in the MEDS evaluation columns, with the site beside them. Rows are patients: local only."""
    parts = [dataset.sequences for dataset in held_out.datasets.values()]
    return pl.DataFrame(
        {
            "site": held_out.site,
            "subject_id": np.concatenate([part.patient_id[part.patient] for part in parts]),
            "prediction_time": np.concatenate([part.prediction_time for part in parts]),
            "boolean_value": held_out.label.astype(bool),
            "predicted_boolean_value": probability >= 0.5,
            "predicted_boolean_probability": probability,
        }
    )


def _truth(directory: Path, sequences: Sequences) -> NDArray[np.float64] | None:
    """Exact P(label | record) of the held-out patients where the records are synthetic."""
    if not (directory / "truth.parquet").exists():
        return None
    known = read_truth(directory)
    order = pl.DataFrame({"subject_id": sequences.patient_id[sequences.patient]})
    found = order.join(known, on="subject_id", how="left", maintain_order="left")["probability"]
    if found.null_count():
        raise DataError(f"{directory}/truth.parquet: {found.null_count()} held-out patients are missing; rewrite it")
    return found.to_numpy()


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread while sites train: two busy threads per process on two cores can cost tenfold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
