"""The whole federated run on one page, over Flower's `Grid` and the study's `Strategy`.

    for each round: send the weights -> sites train -> check the replies -> average -> step -> record
    after the last, if the study has metrics: send the weights -> sites score -> check the replies

Whatever the grid is (the embedded SuperLink, virtual hospitals in this process, Flower's simulation engine), this
loop does not know. Flower's own `Strategy.start` is not used: it always begins at round 1 and keeps nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid

from common.weights import Weights
from server.participation import QuorumError, Replies
from server.strategy import FederatedAveraging


@dataclass(frozen=True)
class RoundRecord:
    """What one round did: its number, who took part, why others did not, the new weights, seconds."""

    round_number: int
    sites: tuple[str, ...]
    refused: dict[str, str]
    weights: Weights
    seconds: float


def run(
    grid: Grid,
    strategy: FederatedAveraging,
    *,
    rounds: int,
    first_round: int = 1,
    deadline: float | None = None,
    on_round: Callable[[RoundRecord], None] = lambda _record: None,
    on_no_quorum: Callable[[RoundRecord, QuorumError], None] | None = None,
) -> Weights:
    """Run rounds `first_round`..`rounds` and return the last global weights.

    Args:
        grid: sends messages and returns what was answered within `deadline` seconds (None: waits for all).
        strategy: configures, checks and aggregates; holds the weights.
        on_round: called after every aggregate with what happened.
        on_no_quorum: called when a round had fewer usable updates than the quorum. When it returns, the round is
            asked for again, with the same weights: a site that has answered it repeats its answer and spends nothing.

    Raises:
        QuorumError: no quorum, and no `on_no_quorum`. The strategy keeps the weights before the round.
    """
    number = first_round
    while number <= rounds:
        began = time.monotonic()
        messages = strategy.configure_train(number, ArrayRecord(), ConfigRecord(), grid)
        replies = grid.send_and_receive(messages, timeout=deadline)
        try:
            strategy.aggregate_train(number, replies)
        except QuorumError as error:
            if on_no_quorum is None:
                raise
            on_no_quorum(_record(number, strategy, began), error)
            continue
        on_round(_record(number, strategy, began))
        number += 1
    return strategy.weights


def ask_for_metrics(grid: Grid, strategy: FederatedAveraging, *, deadline: float | None = None) -> Replies:
    """Ask every site once for metrics of the final weights; who answered, and why others did not.

    Asked again, a site repeats its answer. Without metrics in the study nobody is asked, and nobody answers.
    """
    last = strategy.study.training.rounds
    messages = list(strategy.configure_evaluate(last, ArrayRecord(), ConfigRecord(), grid))
    if not messages:
        return Replies()
    strategy.aggregate_evaluate(last, grid.send_and_receive(messages, timeout=deadline))
    return strategy.replies


def _record(number: int, strategy: FederatedAveraging, began: float) -> RoundRecord:
    taken = strategy.replies
    seconds = time.monotonic() - began
    return RoundRecord(number, tuple(sorted(taken.updates)), dict(taken.refused), strategy.weights, seconds)
