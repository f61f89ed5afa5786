"""Who took part in a round: replies are checked one by one, and a round without quorum does not count."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Message

from common.errors import WardroundError, WireError
from common.records import Header, Reply, Status, check_like, reply_from_message
from common.weights import Weights

# A site says these after it has found the head it was sent in its ledger. Any other refusal may come from a ledger
# that was put back to an older copy, and its head would hide that.
VOUCHED = (Status.OK, Status.BUDGET, Status.LOCAL_FAILURE)


class QuorumError(WardroundError):
    """Fewer sites than the study's quorum sent a usable update."""


@dataclass
class Replies:
    """What came back in one round: updates by site, why a site has none, and the heads of the sites' ledgers."""

    updates: dict[str, Weights] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)

    def require(self, quorum: int, round_number: int) -> None:
        """Raise QuorumError unless at least `quorum` updates are there."""
        if len(self.updates) < quorum:
            why = "; ".join(f"{site}: {reason}" for site, reason in sorted(self.refused.items()))
            raise QuorumError(
                f"round {round_number}: {len(self.updates)} usable updates, the study's quorum is {quorum}"
                + (f" ({why})" if why else "")
            )


def collect(
    messages: Iterable[Message],
    roster: Mapping[int, str],
    header: Header,
    like: Weights,
    largest: Mapping[str, float] | None = None,
) -> Replies:
    """Sort replies into updates and refusals.

    Args:
        messages: what the grid returned.
        roster: node id -> site name, from the connection's keys, never from a reply.
        header: what every reply must repeat.
        like: weights whose names and shapes an update must have.
        largest: the L2 norm that no honest update of a site exceeds; a larger one would own the average.

    A second reply of a site and a reply of a node outside the roster are dropped. One bad reply never stops a round.
    Heads are taken from refusals too: an attempt that failed stays in the site's ledger.
    """
    replies = Replies()
    for message in messages:
        site = roster.get(message.metadata.src_node_id)
        if site is None or site in replies.updates or site in replies.refused:
            continue
        try:
            reply = reply_from_message(message)
            if reply.header == header and reply.status in VOUCHED and reply.head:
                replies.heads[site] = reply.head
            replies.updates[site] = _checked(reply, header, like, (largest or {}).get(site, math.inf))
        except WireError as error:
            replies.refused[site] = str(error)
    for site in roster.values():
        if site not in replies.updates:
            replies.refused.setdefault(site, "no reply")
    return replies


def _checked(reply: Reply, header: Header, like: Weights, largest: float) -> Weights:
    if reply.status is not Status.OK or reply.update is None:
        raise WireError(reply.status.value)
    if reply.header != header:
        raise WireError("round, study or code differ from what was asked")
    check_like(reply.update, like, "update")
    norm = math.sqrt(sum(float(np.square(array, dtype=np.float64).sum()) for array in reply.update.values()))
    if norm > largest:
        raise WireError(f"update: norm {norm:.3g} exceeds {largest:.3g}, the most that an honest site can send")
    return reply.update
