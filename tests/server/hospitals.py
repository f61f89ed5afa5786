"""Hospitals for the server's tests: Flower's fleet client, a real Site without noise, and the faults a test wants.

Nothing of client/'s connection is used: what the server does must not depend on a client that behaves.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from client.ledger import MemoryLedger
from client.site import Site
from common.batching import Dataset
from common.keys import as_flower_bytes
from common.records import Reply, Request, reply_to_content, request_from_message
from common.study import Study
from simulations.seeded import Silent
from tests.small import as_sequences, made_up_patients

Answer = Callable[[Request], Reply | None]
HEARTBEAT = 30.0


def open_site(study: Study, name: str) -> Site:
    """A small hospital that samples by a seed and adds no noise, so that weights can be compared."""
    patients = made_up_patients(len(name), study.sites[name].declared_patients // 4)
    return Site(name, study, Dataset(as_sequences(patients)), MemoryLedger(2.0, 1e-3), partial(Silent, 0, name))


class Connection:
    """One node's calls, one by one."""

    def __init__(self, address: str, key: EllipticCurvePrivateKey, authority: Path | None = None) -> None:
        self.public = as_flower_bytes(key.public_key())
        self.client = FleetHttpClient.from_server_address(
            address,
            authority is None,
            None if authority is None else authority.read_bytes(),
            interceptors=[NodeAuthHttpInterceptor(key, key.public_key())],
        )
        self.node = Node()

    def activate(self) -> int:
        """Go online."""
        request = fleet_pb2.ActivateNodeRequest(public_key=self.public, heartbeat_interval=HEARTBEAT)
        self.node = Node(node_id=self.client.ActivateNode(request).node_id)
        return int(self.node.node_id)

    def deactivate(self) -> None:
        """Go offline."""
        self.client.DeactivateNode(fleet_pb2.DeactivateNodeRequest(node_id=self.node.node_id))

    def heartbeat(self) -> bool:
        """Still here."""
        request = heartbeat_pb2.SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=HEARTBEAT)
        return bool(self.client.SendNodeHeartbeat(request).success)

    def pull(self) -> Message | None:
        """The next message, complete; None after the server's hold, or if its round has ended meanwhile."""
        answer = self.client.PullMessages(fleet_pb2.PullMessagesRequest(node=self.node))
        if not answer.messages_list:
            return None
        announced = message_from_proto(answer.messages_list[0])
        run, name = announced.metadata.run_id, announced.metadata.message_id
        leaves = {leaf.object_id for leaf in iterate_object_tree(answer.message_object_trees[0])}
        contents = {leaf: self.pull_object(run, leaf) for leaf in leaves}
        if not all(contents.values()):  # its round has ended meanwhile
            return None
        message = inflate_object_from_contents(name, contents)
        assert isinstance(message, Message)
        message.metadata.__dict__["_message_id"] = name
        confirmation = message_pb2.ConfirmMessageReceivedRequest(node=self.node, run_id=run, message_object_id=name)
        self.client.ConfirmMessageReceived(confirmation)
        return message

    def pull_object(self, run: int, name: str) -> bytes:
        """An object's bytes; nothing if the server has none for this node."""
        request = message_pb2.PullObjectRequest(node=self.node, run_id=run, object_id=name)
        return bytes(self.client.PullObject(request).object_content)

    def announce(self, reply: Message) -> tuple[fleet_pb2.PushMessagesResponse, dict[str, bytes]]:
        """Announce a reply; returns what the server said and the reply's objects."""
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            request = fleet_pb2.PushMessagesRequest(
                node=self.node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)],
            )
            contents = {name: one.deflate() for name, one in get_all_nested_objects(reply).items()}
        return self.client.PushMessages(request), contents

    def push(self, reply: Message) -> list[bool]:
        """Send a reply whole; whether the server took each object."""
        said, contents = self.announce(reply)
        return [
            self.push_object(reply.metadata.run_id, said.session_id, name, contents[name])
            for name in said.objects_to_push
        ]

    def push_object(self, run: int, session: str, name: str, content: bytes) -> bool:
        """Send one object; whether the server took it."""
        request = message_pb2.PushObjectRequest(
            node=self.node, run_id=run, session_id=session, object_id=name, object_content=content
        )
        return bool(self.client.PushObject(request).stored)


class Hospital:
    """A site that takes part from a thread of the test, until the block ends.

    Args:
        answer: what it answers; None swallows the message, as a process does that dies with it.
    """

    def __init__(
        self, address: str, key: EllipticCurvePrivateKey, answer: Answer, authority: Path | None = None
    ) -> None:
        self._make = partial(Connection, address, key, authority)
        self._answer = answer
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._previous: Connection | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(timeout=60)
        assert not self._thread.is_alive()

    def _work(self) -> None:
        while not self._over.is_set():
            try:
                self._take_part()
            except (httpx.HTTPError, OSError):  # the server is away, or was
                self._over.wait(0.2)

    def _take_part(self) -> None:
        connection = self._make()
        try:
            if self._previous is not None:  # after a crash the server takes the old session for alive
                connection.node = self._previous.node
                try:
                    connection.deactivate()
                except httpx.HTTPStatusError:
                    connection.node = Node()
            connection.activate()
            self._previous = connection
            while not self._over.is_set():
                message = connection.pull()
                if message is None:
                    continue
                reply = self._answer(request_from_message(message))
                if reply is None:
                    return
                connection.push(Message(self._content(reply), reply_to=message))
            connection.deactivate()
        finally:
            connection.client.close()

    @staticmethod
    def _content(reply: Reply) -> RecordDict:
        return reply_to_content(reply)


def wait_until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    """Look again and again, with an end: for what another process does in its own time."""
    end = time.monotonic() + seconds
    pause = threading.Event()
    while not holds():
        assert time.monotonic() < end, "gave up waiting"
        pause.wait(0.02)
