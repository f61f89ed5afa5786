"""Federated averaging as a Flower Strategy: public weights, checked replies, the study's server optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from common.provenance import code_digest
from common.records import Header, Request, request_to_content
from common.score_histogram import CLASSES, HISTOGRAM
from common.weights import Weights
from server.optimizer import AdamState, adam, plain, weighted_mean
from server.participation import Replies, collect

if TYPE_CHECKING:
    from common.study import Study  # loads the accountant, a second; a server's port opens before that


class FederatedAveraging(Strategy):
    """Average the sites' updates with the study's public weights and step the global weights (McMahan et al. 2017).

    Args:
        study: recipe, aggregation weights and quorum.
        roster: asked once a round for node id -> site name.

    Nothing is taken from a reply but its update: weights are public, and a missing site's weight is spread over the
    others. `weights` holds the current global weights; `replies` who took part in the last round; `heads` the newest
    head of each site's ledger, which goes back to its site with the next request.
    """

    def __init__(self, study: Study, weights: Weights, roster: Callable[[], Mapping[int, str]]) -> None:
        self.study, self.weights, self.replies = study, weights, Replies()
        self.optimizer = AdamState()
        self.heads: dict[str, str] = {}
        self._roster_of = roster
        self._site_weights = study.aggregation_weights()
        self._digest = study.digest()
        parameters = sum(array.size for array in weights.values())
        self._largest = {site: study.largest_update(site, parameters) for site in study.sites}

    def _header(self, server_round: int) -> Header:
        return Header(self._digest, code_digest(), server_round)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One TRAIN message with the global weights for every site of the roster, in order of site name."""
        del arrays, config, grid
        yield from self._questions(server_round, MessageType.TRAIN)

    def _questions(self, server_round: int, kind: str) -> Iterable[Message]:
        self._roster = {node: site for node, site in self._roster_of().items() if site in self._site_weights}
        for node, site in sorted(self._roster.items(), key=lambda pair: pair[1]):
            request = Request(self._header(server_round), self.weights, self.heads.get(site, ""))
            yield Message(request_to_content(request), dst_node_id=node, message_type=kind)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Step the global weights. Raises QuorumError, and leaves them as they were, without quorum."""
        self.replies = collect(replies, self._roster, self._header(server_round), self.weights, self._largest)
        self.heads |= self.replies.heads
        self.replies.require(self.study.quorum, server_round)
        average = weighted_mean(self.replies.updates, self._site_weights)
        if self.study.training.recipe == "fedavg-local":
            self.weights = plain(self.weights, average)
        else:
            rate = self.study.learning_rate(server_round)
            self.optimizer, self.weights = adam(self.optimizer, self.weights, average, rate)
        return None, MetricRecord({"sites": len(self.replies.updates)})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """After the last round one EVALUATE message for every site, if the study has metrics; else nothing.

        Whether a site answers is for its policy to say.
        """
        del arrays, config, grid
        if self.study.metrics is None or server_round != self.study.training.rounds:
            return
        yield from self._questions(server_round, MessageType.EVALUATE)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Sort the noised histograms into `replies`; their sum is `server.evaluation`'s. No quorum is asked for."""
        if (metrics := self.study.metrics) is None:
            return None
        like = {HISTOGRAM: np.zeros((CLASSES, metrics.bins), np.float32)}
        largest = {site: self.study.largest_histogram(site) for site in self.study.sites}
        self.replies = collect(replies, self._roster, self._header(server_round), like, largest)
        self.heads |= self.replies.heads
        return MetricRecord({"sites": len(self.replies.updates)})

    def summary(self) -> None:
        """Flower's hook for a log of settings; the study file is that log."""
