"""The hospital's side of a study, for months: connect, wait, train, answer; and again after whatever went wrong.

    lock the state folder -> start the training process -> for ever: connect -> for each message: check, train, send

This process holds the connection and the key, and neither torch nor records nor the ledger (client/trainer.py). What
comes in passes an allow-list twice: Flower's objects by size and kind (client/fleet.py), then the exact records
(common/records.py). What goes out is decoded once more before it is sent: only what the wire format knows leaves.

Decisions a reader would question:

- A message that is not a round's request is answered MALFORMED, not ignored: the server then knows at once, and the
  word says nothing of the records.
- A reply that could not be sent is kept and sent on the next connection, before new messages are asked for.
- The study's end is not announced by the server. It is taken to be there when the last round's update was taken by
  the server and, for a while after, no message came. Without `exit_when_finished` the client waits on: a server that
  lost its newest checkpoint asks for the last round again, and only a site that is there can answer.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Message, MessageType

from client.enrolment import Enrolment, enrolled
from client.fleet import Fleet, Incoming
from client.heartbeat import Heartbeat
from client.logs import logging_to
from client.network import ContestedError, Limit, NetworkError, trusted
from client.site_file import SiteFile, load_site_file
from client.state import KEY, LOG, NODE, StateFolder
from client.stopping import Stop, stoppable
from client.trainer import Ready, Trainer
from common.errors import ConfigurationError, WireError
from common.keys import load_private
from common.provenance import code_digest
from common.records import (
    WIRE_VERSION,
    Header,
    Reply,
    Status,
    reply_from_message,
    reply_to_content,
    request_from_message,
)

if TYPE_CHECKING:
    from client.trainer import RandomnessOf

log = logging.getLogger("wardround.client")

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between attempts to connect
SHORTEST_PAUSE, LONGEST_PAUSE = 0.05, 1.0  # seconds between questions for a message
QUIET_SECONDS = 120.0  # without a message after the last round: the study is over
GRACE = 30.0  # seconds that a round in training gets at the end


class Service:
    """One site's service.

    Args:
        site: the site file.
        state: its state folder, locked by the caller.
        enrolment: what was agreed to.
        trainer: the training process, not started.
        connect: a new connection to the server.
        exit_when_finished: end after the study's last round instead of waiting on.
        pause, clock: how to wait and what time it is; tests pass their own.
    """

    def __init__(
        self,
        site: SiteFile,
        state: StateFolder,
        enrolment: Enrolment,
        trainer: Trainer,
        connect: Callable[[], Fleet],
        *,
        exit_when_finished: bool = False,
        pause: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._site, self._state, self._study = site, state, enrolment.study
        self._trainer, self._connect, self._exit_when_finished = trainer, connect, exit_when_finished
        self._pause, self._clock = pause, clock
        self._wait = FIRST_WAIT
        self._unsent: tuple[Message, Message, bool] | None = None  # reply, its request, whether it ends the study
        self._finished = False
        self._last_message = clock()

    def run(self) -> None:
        """Serve until stopped, or until the study is over.

        Raises:
            TrainerError: the site cannot be opened.
            ContestedError: another process uses this site's key; it is in the log, too.
        """
        ready = self._trainer.start()
        log.info("site %s open; study %s..", self._site.site, self._study[:12])
        while True:
            try:
                with self._connect() as fleet:
                    self._converse(fleet, ready)
                    return
            except NetworkError as error:
                if self._is_over():
                    return
                log.warning("%s; next try in %.0f s", error, self._wait)
            except ContestedError as error:
                log.error("%s", error)
                raise
            self._pause(
                self._wait * secrets.SystemRandom().uniform(0.8, 1.2)
            )  # so that sites do not come back all at once
            self._wait = min(2 * self._wait, LONGEST_WAIT)

    def _converse(self, fleet: Fleet, ready: Ready) -> None:
        """One connection: until the network fails (NetworkError) or the study is over."""
        self._compare_versions(fleet)
        node = fleet.activate(self._previous())
        try:
            self._state.write_json(NODE, {"node": node, "server": self._site.server.address})
        except ConfigurationError as error:  # a full disk; without the number a crash costs a minute, and no more
            log.warning("%s", error)
        log.info("connected to %s", self._site.server.address)
        limit = Limit.of(ready.arrays)
        with Heartbeat(fleet.heartbeat) as heartbeat:
            self._send(fleet)
            while not self._is_over():
                heartbeat.check()
                asked = self._clock()
                incoming = fleet.pull(limit)
                self._wait = FIRST_WAIT
                if incoming is None:
                    idle = min(max(0.1 * (asked - self._last_message), SHORTEST_PAUSE), LONGEST_PAUSE)
                    self._pause(max(0.0, idle - (self._clock() - asked)))  # a server may have held the question
                    continue
                self._answer(incoming, node, ready)
                self._send(fleet)
                self._last_message = self._clock()
        log.info("the study's last round was released and no further message came: finished")

    def _answer(self, incoming: Incoming, node: int, ready: Ready) -> None:
        """Find the reply to a message and keep it for sending."""
        message, began = incoming.message, self._clock()
        number, reply = 0, Reply(Header(self._study, code_digest(), 0), Status.MALFORMED)
        try:
            if incoming.fault is not None:
                raise WireError(incoming.fault)
            request = request_from_message(message)
        except WireError as error:
            log.warning("a message was refused: %s", error)
        else:
            number = request.header.round_number
            header = Header(self._study, code_digest(), number)
            # The ledger cannot be asked for its head when its process has died: the server's own word goes back.
            reply = Reply(header, Status.LOCAL_FAILURE, head=request.head)
            answer = self._trainer.answer(message, node)
            if answer is not None:
                reply = self._checked(answer, reply)
        kind = message.metadata.message_type
        what = "round" if kind == MessageType.TRAIN else "metrics after round"
        log.info("%s %d: %s after %.1f s", what, number, reply.status, self._clock() - began)
        ends = reply.status is Status.OK and number == ready.rounds
        self._unsent = Message(reply_to_content(reply, kind), reply_to=message), message, ends

    @staticmethod
    def _checked(answer: Message, failure: Reply) -> Reply:
        """What the training process says, if the wire format knows it."""
        try:
            return reply_from_message(answer)
        except WireError as error:
            log.error("the training process said something that must not leave (%s)", error)
            return failure

    def _send(self, fleet: Fleet) -> None:
        """Send the reply that waits, if one does."""
        if self._unsent is None:
            return
        reply, request, ends = self._unsent
        if not fleet.push(reply, request):
            log.info("the server wants no reply to that round any more")
        self._unsent = None
        self._finished = self._finished or ends

    def _is_over(self) -> bool:
        quiet = self._clock() - self._last_message
        return self._exit_when_finished and self._finished and quiet >= QUIET_SECONDS

    def _previous(self) -> int | None:
        """The number that this server gave to the session before."""
        node = self._state.read_json(NODE) or {}
        known = node.get("server") == self._site.server.address and isinstance(node.get("node"), int)
        return int(node["node"]) if known else None

    def _compare_versions(self, fleet: Fleet) -> None:
        """Say in the log if the server is not the one that was agreed on: it will get a code, and people should know.

        The site goes online all the same: the answer VERSION or STUDY tells the coordinator which site it is.
        """
        health = fleet.health()
        if (health.wire, health.code) != (WIRE_VERSION, code_digest()):
            log.warning("the server runs another version of wardround; no round is trained until both are the same")
        if health.study != self._study:
            log.warning("the server runs another study than was enrolled for; no round of it is trained")


def serve(
    site_file: Path,
    *,
    log_level: str | None = None,
    exit_when_finished: bool = False,
    randomness: RandomnessOf | None = None,
) -> None:
    """Take part as the hospital of `site_file` until SIGTERM, SIGINT or, if asked for, the study's end.

    Args:
        site_file: the hospital's own file.
        log_level: instead of the site file's.
        exit_when_finished: see `Service`.
        randomness: for tests, see `Trainer`.

    Raises:
        WardroundError: not enrolled, another process has the state folder, or the site cannot be opened.
    """
    site = load_site_file(site_file)
    state = StateFolder(Path(site.state))
    state.flower_home()  # the command has done so before Flower's import; a script that calls this gets it here
    with state.lock(), logging_to(state / LOG, log_level or site.log_level), stoppable():
        trainer, grace = Trainer(site_file, randomness), GRACE
        try:
            try:
                authority, trust = trusted(site.server)  # once: no connection reads the file again
                enrolment, key = enrolled(state, site, authority), load_private(state / KEY)
                Service(
                    site,
                    state,
                    enrolment,
                    trainer,
                    lambda: Fleet(site.server, key, trust=trust),
                    exit_when_finished=exit_when_finished,
                ).run()
            except Stop as stop:
                log.info("asked to end")
                grace = 0.0 if stop.again else GRACE
            finally:
                trainer.stop(grace)
        except Stop:  # asked again while waiting: the training process has been killed
            trainer.stop()
        log.info("ended")
