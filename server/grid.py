"""Flower's `Grid` over the embedded SuperLink: who is asked, how often, and until when.

A round is one `send_and_receive`. A site is asked when it is online; again when it has connected anew since (its
process died with the message), when Flower lost the message, and after a quarter of the deadline without an answer
(the message was delivered into a connection that broke). Asking again is free: a site answers the same round and the
same weights with the stored bytes.

The round ends when every site has answered, or at the deadline. A site that let a whole round pass while it was
offline is not waited for until it connects again; otherwise one hospital that is down for a week would make every
round of that week last the deadline. Whoever wants all sites in every round sets the quorum to their number.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

from flwr.app import DEFAULT_TTL, Message
from flwr.serverapp import Grid

from common.errors import WardroundError

log = logging.getLogger("wardround.server")

LOOK = 1.0  # seconds between looks when nothing is announced
ASK_AGAIN = 0.25  # of the deadline
SLACK = 300.0  # seconds that a message outlives its round: a reply's expiry is computed with the site's clock


@dataclass(frozen=True)
class Presence:
    """A site as the connection knows it. `activated` changes whenever the site connects anew.

    A contested site, see `server.instances`, counts as offline.
    """

    site: str
    online: bool
    activated: str
    last_seen: float | None  # epoch seconds of its last authenticated request to this process
    contested: bool = False


class StoppedError(WardroundError):
    """The server was told to stop; the round that was on does not count."""


class Link(Protocol):
    """What the grid needs from the SuperLink; see `server.superlink.SuperLink`."""

    def presence(self) -> dict[int, Presence]:
        """Every admitted site by node id."""

    def push(self, message: Message, ttl: float) -> str:
        """Send a copy; returns its id."""

    def replies(self, copies: Collection[str]) -> dict[str, Message | None]:
        """What arrived for the copies; None: lost."""

    def clear(self) -> None:
        """Withdraw all copies."""

    def wait(self, seconds: float) -> None:
        """Until there is news."""


@dataclass
class _Asked:
    """One site's part in the round: the message, its copies that are out, and when and to whom the last one went."""

    message: Message
    copies: set[str] = field(default_factory=set)
    at: float = -math.inf
    activated: str = ""


class FleetGrid(Grid):
    """Whole rounds over the SuperLink.

    Args:
        link: sends, receives and knows who is online.
        saw: called with who is online, at least once a second during a round.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        link: Link,
        *,
        saw: Callable[[Mapping[int, Presence]], None] = lambda _presence: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._link, self._saw, self._clock = link, saw, clock
        self._absent: set[int] = set()
        self._stopped = False

    def stop(self) -> None:
        """Make `send_and_receive` and `wait` raise StoppedError within `LOOK`. From any thread or signal handler.

        A flag and no more: a signal may come while this thread holds the lock that waking it would need.
        """
        self._stopped = True

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Ask every destination and return the replies that came within `timeout` seconds (None: wait for all).

        Raises:
            StoppedError: `stop` was called.
        """
        asked = {message.metadata.dst_node_id: _Asked(message) for message in messages}
        end = self._clock() + (math.inf if timeout is None else timeout)
        again = math.inf if timeout is None else timeout * ASK_AGAIN
        replies: list[Message] = []
        try:
            while asked:
                presence = self._link.presence()
                self._saw(presence)
                online = {node for node in asked if node in presence and presence[node].online}
                self._absent -= online
                self._absent |= {node for node in asked if node in presence and presence[node].contested}
                for node, reply in self._collect({node: asked[node] for node in online}):
                    replies.append(reply)
                    del asked[node]
                left = end - self._clock()
                if left <= 0 or asked.keys() <= self._absent:
                    self._absent |= asked.keys() - online
                    break
                for node in sorted(online & asked.keys()):
                    self._ask(asked[node], presence[node], end, again)
                self.wait(min(left, LOOK))
        finally:
            self._link.clear()
        return replies

    def _ask(self, site: _Asked, presence: Presence, end: float, again: float) -> None:
        now = self._clock()
        if site.copies and site.activated == presence.activated and now - site.at < again:
            return
        if site.copies:
            log.info("%s is asked again", presence.site)
        ttl = min(end - now, DEFAULT_TTL) + SLACK
        site.copies.add(self._link.push(site.message, ttl))
        site.at, site.activated = now, presence.activated

    def _collect(self, asked: dict[int, _Asked]) -> list[tuple[int, Message]]:
        owner = {copy: node for node, site in asked.items() for copy in site.copies}
        found: dict[int, Message] = {}
        for copy, reply in self._link.replies(owner).items():
            if reply is None:
                asked[owner[copy]].copies.discard(copy)
            else:
                found.setdefault(owner[copy], reply)
        return sorted(found.items())

    def wait(self, seconds: float) -> None:
        """Wait for news, or `seconds`. Raises StoppedError."""
        if not self._stopped:
            self._link.wait(seconds)
        if self._stopped:
            raise StoppedError("stopped")

    def get_node_ids(self) -> list[int]:
        """Every admitted site that is online."""
        return [node for node, presence in self._link.presence().items() if presence.online]

    def _unused(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise NotImplementedError("this grid delivers whole rounds: use send_and_receive")

    set_run = create_message = push_messages = pull_messages = _unused
    run = property(_unused)
