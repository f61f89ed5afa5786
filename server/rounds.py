"""The whole federated run on one page, over Flower's `Grid` and the study's `Strategy`.

    for each round: send the weights -> sites train -> check the replies -> average -> step -> record

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
) -> Weights:
    """Run rounds `first_round`..`rounds` and return the last global weights.

    Args:
        grid: sends messages and returns what was answered within `deadline` seconds (None: waits for all).
        strategy: configures, checks and aggregates; holds the weights.
        on_round: called after every aggregate with what happened.

    Raises:
        QuorumError: a round had fewer usable updates than the quorum; the strategy keeps the weights before it.
    """
    for number in range(first_round, rounds + 1):
        began = time.monotonic()
        messages = strategy.configure_train(number, ArrayRecord(), ConfigRecord(), grid)
        replies = grid.send_and_receive(messages, timeout=deadline)
        strategy.aggregate_train(number, replies)
        taken = strategy.replies
        seconds = time.monotonic() - began
        on_round(RoundRecord(number, tuple(sorted(taken.updates)), dict(taken.refused), strategy.weights, seconds))
    return strategy.weights
