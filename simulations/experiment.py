"""One federated simulation, from a study to a result: train over a grid, score the held-out patients.

Nothing that is scored flows back into training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from common.metrics import auroc
from common.models.network import build_network
from common.privacy.accounting import epsilon_of
from common.provenance import code_digest
from common.records import Header, Reply, Request, Status, reply_to_content, request_to_content
from common.study import Study
from common.training import load_state, state_of
from common.weights import Weights
from server.rounds import RoundRecord, run
from server.strategy import FederatedAveraging
from simulations.hospitals import Hospitals
from simulations.local_grid import LocalGrid
from simulations.rows import POOLED, SiteRow, Traffic
from simulations.scoring import HeldOut, score_sites

__all__ = [
    "POOLED",
    "SCORED_ROUNDS",
    "HeldOut",
    "Progress",
    "Result",
    "evenly_spaced",
    "one_thread",
    "simulate",
    "traffic",
    "train",
    "watch",
]

SCORED_ROUNDS = 10  # rounds at which the pooled AUROC is taken for the figure, evenly spaced


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
    scores: tuple[SiteRow, ...]
    predictions: pl.DataFrame
    history: list[Progress] = field(default_factory=list)

    def score(self, site: str = POOLED) -> SiteRow:
        """The table's line for `site`."""
        return next(score for score in self.scores if score.site == site)


def simulate(
    hospitals: Hospitals,
    *,
    workers: int = 1,
    rounds: int | None = None,
    resamples: int = 1000,
    scored_rounds: int = SCORED_ROUNDS,
    held_out: HeldOut | None = None,
    on_round: Callable[[Progress], None] = lambda _progress: None,
) -> Result:
    """Run the study over its virtual hospitals.

    Args:
        hospitals: the study, its records and the seed; equal arguments give equal results to the last bit.
        workers: processes of one thread each; does not change the result.
        rounds: stop after so many; default all of the study's.
        resamples: bootstrap resamples of patients behind each interval.
        scored_rounds: at so many rounds the pooled AUROC is taken for a figure; 0 scores the final weights only.
        held_out: the held-out patients, if a caller with several runs has them already.
        on_round: called after every round.
    """
    study = hospitals.study
    held_out = held_out or HeldOut(hospitals)
    weights, history = watch(
        hospitals, held_out, workers=workers, rounds=rounds, scored_rounds=scored_rounds, on_round=on_round
    )
    network = build_network(study, hospitals.seed)
    load_state(network, weights)
    with one_thread():
        probability = held_out.probabilities(network)
    scores = score_sites(study, held_out, probability, resamples)
    return Result(study, hospitals.seed, weights, scores, predictions_table(held_out, probability), history)


def watch(
    hospitals: Hospitals,
    held_out: HeldOut,
    *,
    workers: int = 1,
    rounds: int | None = None,
    scored_rounds: int = SCORED_ROUNDS,
    on_round: Callable[[Progress], None] = lambda _progress: None,
) -> tuple[Weights, list[Progress]]:
    """Train, and look at the held-out patients after some of the rounds. Arguments as `simulate`."""
    study = hospitals.study
    network = build_network(study, hospitals.seed)
    plan, rounds = study.plan(), rounds or study.training.rounds
    scored = evenly_spaced(rounds, scored_rounds)
    steps = dict.fromkeys(study.sites, 0)
    history: list[Progress] = []

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
        history.append(progress)
        on_round(progress)

    return train(hospitals, workers=workers, rounds=rounds, on_round=note), history


def train(
    hospitals: Hospitals,
    *,
    workers: int = 1,
    rounds: int | None = None,
    on_round: Callable[[RoundRecord], None] = lambda _record: None,
) -> Weights:
    """The weights after so many rounds of the study (default all); no held-out patient is looked at."""
    study = hospitals.study
    with one_thread(), LocalGrid(hospitals.open, study.sites, workers=workers) as grid:
        start = state_of(build_network(study, hospitals.seed))
        strategy = FederatedAveraging(study, start, lambda: grid.roster)
        return run(grid, strategy, rounds=rounds or study.training.rounds, on_round=on_round)


def evenly_spaced(rounds: int, count: int) -> set[int]:
    """`count` of the rounds 1..rounds, the last among them; none if `count` is 0."""
    return set(np.linspace(rounds / count, rounds, count).round().astype(int).tolist()) - {0} if count else set()


def traffic(study: Study, weights: Weights) -> Traffic:
    """Bytes that a round moves between the server and each site: what Flower's records hold, without its envelope."""
    header = Header(study.digest(), code_digest(), study.training.rounds)
    head = "0" * 64
    request = request_to_content(Request(header, weights, head))
    reply = reply_to_content(Reply(header, Status.OK, weights, head))
    return Traffic(*(sum(record.count_bytes() for record in content.values()) for content in (request, reply)))


def predictions_table(held_out: HeldOut, probability: NDArray[np.float64]) -> pl.DataFrame:
    """Predictions in the MEDS evaluation columns, with the site beside them. Rows are patients: local only."""
    parts = held_out.sequences
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


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread while sites train: two busy threads per process on two cores can cost tenfold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
