"""Federated averaging as a Flower Strategy: public weights, checked replies, the study's server optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from common.provenance import code_digest
from common.records import Header, Request, request_to_content
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
        self._roster = {node: site for node, site in self._roster_of().items() if site in self._site_weights}
        for node, site in sorted(self._roster.items(), key=lambda pair: pair[1]):
            request = Request(self._header(server_round), self.weights, self.heads.get(site, ""))
            yield Message(request_to_content(request), dst_node_id=node, message_type=MessageType.TRAIN)

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
        """Nothing: metrics leave a site only as its policy says, and by default none do."""
        del server_round, arrays, config, grid
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing to aggregate."""
        del server_round, replies
        return None

    def summary(self) -> None:
        """Flower's hook for a log of settings; the study file is that log."""
