"""Flower's SuperLink inside this process: its state, its fleet protocol on the public port, and messages to sites.

The only file of the server that imports Flower's internals (flwr 1.41).

Flower's own server publishes three interfaces on one port: fleet (hospitals), control (starts runs, that is, code at
every hospital) and runtime (the server's own loop). Here the loop runs in the SuperLink's process and calls its state
directly, so that control and runtime are served nowhere. The alternative, serving them on loopback behind a secret
header, had a second port, a token to renew, and an HTTP client that a proxy variable could divert.

Sites, runs and messages live in Flower's state on SQLite, so that a site keeps its node id over a restart. Weights
and updates live in memory: what a crash loses of them is asked for again (server/rounds.py), and on SQLite they cost
four fifths of a round. Both are deleted after every round. One thread owns all of it: SQLite never meets a second
writer, whose retries cost up to 0.1 s each, and no request sees another one half done.

Four things that Flower leaves open are closed here. A site speaks for its own node only (Flower takes the sender from
the message), and answers only what it was asked (Flower stores a site's message as an instruction to another site).
It reads the objects of its own messages only. What a reply says about itself is not believed: sender and request are
those of the state, not those written into the reply (`_inflate`).
"""

from __future__ import annotations

import base64
import json
import math
import secrets
import threading
import time
import warnings
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, TypeVar

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from fastapi import HTTPException, Request
from flwr.app import Array, ArrayRecord, Error, Message, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import (
    HEARTBEAT_DEFAULT_INTERVAL,
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    SUPERLINK_NODE_ID,
    TIMESTAMP_HEADER,
    ErrorCode,
    Status,
)
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2
from flwr.server.superlink.linkstate import LinkState, LinkStateFactory
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, NOOP_FEDERATION_ID, NodeStatus, TaskType
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.error.catalog import API_ERROR_MAP
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_body,
    get_object_head_values_from_object_content,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import NoObjectInStoreError, ObjectStoreFactory
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.routers.fleet.node_auth import authenticate_node
from flwr.superlink.servicer.fleet import fleet_handlers
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # no stubs are installed
from sqlalchemy.exc import DBAPIError

from common.errors import WardroundError
from common.keys import as_flower_bytes
from common.records import CONTESTED, INSTANCE_HEADER
from server.grid import Presence
from server.instances import Instances
from server.public import Answer, Call, PublicPort, Tls

ALIVE = 20.0  # seconds after which a poll renews a site's presence: it need not wait for the next heartbeat
BEAT = 15.0  # seconds between signs of life of the run; Flower ends it after 60
PIECE = 2**20  # Flower cuts arrays into larger ones
MARGIN = 65_536  # bytes of a reply beside twice its request
KEY_HEADER = FLEET_HTTP_PUBLIC_KEY_HEADER.lower().encode()
T = TypeVar("T")

# All that a site may call. Registering a node, and fetching a run or an app, are not among it.
FLEET = "/v1/fleet/"
ACTIVATE, DEACTIVATE, HEARTBEAT = FLEET + "activate-node", FLEET + "deactivate-node", FLEET + "send-node-heartbeat"
PULL, PULL_OBJECT, CONFIRM = FLEET + "pull-messages", FLEET + "pull-object", FLEET + "confirm-message-received"
PUSH, PUSH_OBJECT = FLEET + "push-messages", FLEET + "push-object"
REQUESTS: dict[str, type[Any]] = {
    ACTIVATE: fleet_pb2.ActivateNodeRequest,
    DEACTIVATE: fleet_pb2.DeactivateNodeRequest,
    HEARTBEAT: heartbeat_pb2.SendNodeHeartbeatRequest,
    PULL: fleet_pb2.PullMessagesRequest,
    PULL_OBJECT: message_pb2.PullObjectRequest,
    CONFIRM: message_pb2.ConfirmMessageReceivedRequest,
    PUSH: fleet_pb2.PushMessagesRequest,
    PUSH_OBJECT: message_pb2.PushObjectRequest,
}


@dataclass
class _Arrival:
    """A reply to `copy` that `node` has announced, the objects of it that are still on their way, and bytes so far."""

    node: int
    copy: str
    owed: set[str]
    nbytes: int = 0


class SuperLink:
    """Flower's SuperLink without a process of its own: sites, messages, and the port that sites call.

    Args:
        database: SQLite file; made if missing. Beside it contested.json, see `server.instances`.
        listen: host and port of the public port; port 0 takes a free one.
        health: public facts for `GET /health`.
        tls: None serves plaintext; the caller sees to it that this is loopback.
    """

    routes: ClassVar[frozenset[str]] = frozenset(REQUESTS)
    pull: ClassVar[str] = PULL

    def __init__(
        self,
        database: Path,
        listen: tuple[str, int],
        health: Callable[[], Mapping[str, object]],
        tls: Tls | None = None,
    ) -> None:
        self.executor = ThreadPoolExecutor(1, "superlink-state")
        self._database, self._listen, self._tls = database, listen, tls
        self._instances = Instances(database.with_name("contested.json"))
        self._public = PublicPort(self, health)
        self._news = threading.Event()
        self._sites: dict[bytes, str] = {}  # public key as Flower stores it -> site
        self._node_of: dict[bytes, int] = {}  # the same keys -> node id
        self._headers: frozenset[bytes] = frozenset()  # the same keys as they stand in a request's header
        self._run = self._task = 0
        self._beaten = -math.inf
        self._copies: dict[str, int] = {}  # message -> the node that it was made for; of this round
        self._readable: dict[int, set[str]] = {}  # node -> the objects of what it was sent
        self._arrivals: dict[str, _Arrival] = {}  # push session -> what it brings
        self._lost: set[str] = set()  # messages whose reply broke off
        # What a reply may have, an update being as large as the weights: bytes; those that are no array's; objects.
        self._most = self._most_words = self._most_objects = 0
        self._mail: set[int] = set()
        self._polling: set[int] = set()  # nodes that have asked for a message since they last came
        self._seen: dict[int, float] = {}
        self._alive: dict[int, float] = {}

    def start(self) -> None:
        """Open the port, then the state, for which requests wait. Raises ConfigurationError: the port is not free."""
        self.port = self._public.open(*self._listen, self._tls)
        try:
            self._do(self._open)
        except BaseException:
            self._public.close()
            self.executor.shutdown()
            raise

    def stop(self) -> None:
        """Close the port, withdraw every message and close the state."""
        self._public.close()
        try:
            self._do(self._stop_runs)
        finally:
            self.executor.shutdown()

    def admit(self, keys: Mapping[str, EllipticCurvePublicKey]) -> None:
        """Make these the sites that may connect, by name; whoever is no longer among them is shut out."""
        self._do(self._admit, {as_flower_bytes(key): site for site, key in keys.items()})

    def presence(self) -> dict[int, Presence]:
        """Every admitted site by node id, connected or not."""
        return self._do(self._presence)

    def push(self, message: Message, ttl: float) -> str:
        """Send a copy of `message` to its destination and return the copy's id; it expires after `ttl` seconds."""
        return self._do(self._push, message, ttl)

    def replies(self, copies: Collection[str]) -> dict[str, Message | None]:
        """What has arrived for these copies: a complete reply, or None where a copy was lost and must be sent again.

        A reply's metadata are the state's: its sender is the node that proved its key and that the copy was made for.
        """
        return self._do(self._replies, set(copies))

    def clear(self) -> None:
        """Withdraw every message of the round and delete its objects."""
        self._do(self._clear)

    def wait(self, seconds: float) -> None:
        """Wait until a reply is complete, a site has connected or gone, or `seconds` are over."""
        self._news.wait(seconds)
        self._news.clear()

    # What follows runs in the one thread that owns the state.

    def _do(self, work: Callable[..., T], *arguments: Any) -> T:
        try:
            return self.executor.submit(work, *arguments).result()
        except DBAPIError as error:  # a full disk, above all; SQLite's own words say which
            raise WardroundError(
                f"{self._database}: cannot be used ({error.orig}); free space, or check its disk, then go on with "
                "--resume"
            ) from None

    def _open(self) -> None:
        factory = LinkStateFactory(str(self._database), NoOpFederationManager(), ObjectStoreFactory())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Flower's, for how it makes its tables
            self._state: LinkState = factory.state()
        self._store = self._state.object_store
        roster = SimpleNamespace(get_node_id_by_public_key=self._node_of.get)  # spares a query for every request
        self._app = SimpleNamespace(state=SimpleNamespace(linkstate_factory=SimpleNamespace(state=lambda: roster)))
        self._stop_runs()

    def _stop_runs(self) -> None:
        """Stop what an earlier process left, or this one: a site must not train a message that nobody waits for."""
        for run in self._state.get_run_info(statuses=(Status.PENDING, Status.STARTING, Status.RUNNING)):
            self._state.stop_run(run.run_id)

    def _keep_running(self) -> None:
        """Flower stores messages of a running run only, and ends a run that gives no sign of life."""
        now = time.monotonic()
        if now - self._beaten < BEAT:
            return
        self._beaten = now
        if self._run and self._state.acknowledge_task_heartbeat(self._task):
            return
        self._run = self._state.create_run(
            None, None, None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        task = self._state.get_run_info(run_ids=[self._run])[0].primary_task_id if self._run else None
        if task is None or self._state.claim_task(task) is None or not self._state.activate_task(task):
            raise WardroundError("Flower's state refuses a new run; move state/superlink.db away and start again")
        self._task = task
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = self._run, SUPERLINK_NODE_ID, task

    def _admit(self, sites: dict[bytes, str]) -> None:
        known = {node.public_key: node.node_id for node in self._nodes()}
        for key in known.keys() - sites.keys():  # not deleted: Flower would never take the key again
            self._state.deactivate_node(known.pop(key))
        for key in sites.keys() - known.keys():
            known[key] = self._state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, 0)
        self._sites, self._headers = sites, frozenset(base64.b64encode(key) for key in sites)
        self._node_of.clear()
        self._node_of.update(known)

    def _nodes(self) -> Collection[Any]:
        return self._state.get_node_info(statuses=[NodeStatus.REGISTERED, NodeStatus.ONLINE, NodeStatus.OFFLINE])

    def _presence(self) -> dict[int, Presence]:
        self._keep_running()
        return {
            node.node_id: Presence(
                self._sites[node.public_key],
                node.status == NodeStatus.ONLINE
                and node.node_id in self._polling
                and not self._instances.contested(node.public_key),
                node.last_activated_at,
                self._seen.get(node.node_id),
                self._instances.contested(node.public_key),
            )
            for node in self._nodes()
            if node.public_key in self._sites
        }

    def _push(self, message: Message, ttl: float) -> str:
        self._keep_running()
        node = message.metadata.dst_node_id
        copy = Message(message.content, dst_node_id=node, message_type=message.metadata.message_type, ttl=ttl)
        with no_object_id_recompute():
            copy.metadata.__dict__["_message_id"] = name = copy.object_id  # as Flower's own Grid does
            objects, tree = get_all_nested_objects(copy), get_object_tree(copy)
            if self._state.store_message_ins(remove_content_from_message(copy)) is None:
                raise WardroundError("Flower's state refuses a message; see server.log")
            contents = {key: one.deflate() for key, one in objects.items()}
            for key in self._store.preregister(self._run, tree):
                self._store.put(key, contents[key])
        self._most = 2 * sum(map(len, contents.values())) + MARGIN
        self._most_words = 2 * sum(len(one) for one in contents.values() if not _is_piece(one)) + MARGIN
        arrays = _arrays(message.content)
        self._most_objects = 8 + sum(2 + len(array.data) // PIECE for array in arrays)
        self._copies[name] = node
        self._readable.setdefault(node, set()).update(objects)
        self._mail.add(node)
        self._public.notify(node)
        return name

    def _replies(self, copies: set[str]) -> dict[str, Message | None]:
        self._keep_running()
        complete = {arrival.copy for arrival in self._arrivals.values() if not arrival.owed}
        asked = copies & complete & self._copies.keys()
        arrived: dict[str, Message | None] = {}
        for found in self._state.get_message_res(message_ids=set(asked), run_id=self._run):
            copy = found.metadata.reply_to_message_id
            flowers_own = found.metadata.src_node_id == SUPERLINK_NODE_ID  # it expired, or its site is offline
            arrived[copy] = None if flowers_own else self._inflate(found)
        arrived |= dict.fromkeys(copies & self._lost)
        for copy in arrived:
            self._copies.pop(copy, None)
        self._lost -= arrived.keys()
        self._state.delete_messages(set(arrived))
        return arrived

    def _inflate(self, announced: Message) -> Message:
        """The reply with what a site wrote as its content and what the state knows as its metadata."""
        name = announced.metadata.message_id
        try:
            leaves = iterate_object_tree(self._store.get_object_tree(name))
            contents = {key: self._store.get(key) or b"" for key in (leaf.object_id for leaf in leaves)}
            content = _content(name, contents, self._most, self._most_words)
        except Exception:  # whatever a site may have made up
            content = None
        error = Error(code=ErrorCode.UNKNOWN) if content is None else None
        return make_message(metadata=announced.metadata, content=content, error=error)

    def _clear(self) -> None:
        if self._run:
            self._state.cleanup_run(self._run)
        for kept in (self._copies, self._readable, self._arrivals, self._lost, self._mail):
            kept.clear()

    # The fleet protocol, see server.public.Fleet.

    def knows(self, headers: list[tuple[bytes, bytes]]) -> bool:
        """Whether the request names a key on the roster; it has yet to prove that it holds it."""
        return next((value for name, value in headers if name == KEY_HEADER), b"") in self._headers

    def has_mail(self, node: int) -> bool:
        """Whether a message may wait for the node."""
        return node in self._mail

    def check(self, path: str, headers: list[tuple[bytes, bytes]], body: bytes) -> Call | Answer:
        """Parse and authenticate. A site speaks for its own node, about the run that is on."""
        request = REQUESTS[path]()
        try:
            request.ParseFromString(body)
        except DecodeError:
            return _refusal(ApiErrorCode.INVALID_PROTOBUF_PAYLOAD)
        asked = Request({"type": "http", "headers": headers, "app": self._app, "state": {}})
        asked.state.protobuf_request = request
        try:
            authenticate_node(asked)
        except HTTPException as error:
            return Answer(error.status_code, json.dumps({"detail": error.detail}).encode())
        if not self._hear(asked, greets=path in (ACTIVATE, DEACTIVATE)):
            self._news.set()
            return Answer(409, json.dumps({"detail": CONTESTED}).encode())
        if path == ACTIVATE:
            node = self._node_of.get(request.public_key, 0)
        else:
            node = request.node_id if path == DEACTIVATE else request.node.node_id
        self._seen[node] = time.time()
        if path == PULL and node not in self._polling:
            self._polling.add(node)
            self._news.set()
        if path == PUSH and not _speaks_for_itself(request, node, self._most_objects):
            return Answer(400, b'{"detail": "one reply, of the node that sends it"}')
        run = request.messages_list[0].metadata.run_id if path == PUSH else getattr(request, "run_id", self._run)
        return Call(path, node, request) if run == self._run else _refusal(ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED)

    def _hear(self, asked: Request, *, greets: bool) -> bool:
        """Whether the sender of this authenticated request is the one process of its site."""
        key, signed = base64.b64decode(asked.headers[KEY_HEADER.decode()]), asked.headers[TIMESTAMP_HEADER]
        instance = asked.headers.get(INSTANCE_HEADER, "")
        return self._instances.hear(
            key, self._sites.get(key, "unknown"), instance, datetime.fromisoformat(signed), greets=greets
        )

    def perform(self, call: Call) -> Answer:
        """Answer an authenticated call."""
        path, node, request = call.path, call.node, call.request
        try:
            if path in (ACTIVATE, DEACTIVATE, HEARTBEAT):
                response: Any = self._come_or_go(path, node, request)
            elif path == PULL:
                response = self._pull(node)
            elif path == PULL_OBJECT:
                response = self._pull_object(node, request.object_id)
            elif path == CONFIRM:  # Flower would delete the object that the site names; here the round's end does
                response = message_pb2.ConfirmMessageReceivedResponse()
            elif path == PUSH:
                response = self._push_reply(node, request)
            else:
                response = self._push_object(node, request)
        except FlowerError as error:
            return _refusal(error.code, error.public_details)
        return Answer(200, response.SerializeToString(), PROTOBUF_MEDIA_TYPE)

    def _come_or_go(self, path: str, node: int, request: Any) -> Any:
        self._alive[node] = time.monotonic()  # a poll that was under way must not undo a deactivation
        if path == HEARTBEAT:
            return fleet_handlers.send_node_heartbeat(request, self._state)
        handler: Callable[..., Any] = (
            fleet_handlers.activate_node if path == ACTIVATE else fleet_handlers.deactivate_node
        )
        response = handler(request, self._state)
        self._polling.discard(node)
        self._news.set()
        return response

    def _pull(self, node: int) -> fleet_pb2.PullMessagesResponse:
        now = time.monotonic()
        if now - self._alive.get(node, -math.inf) >= ALIVE:
            self._alive[node] = now
            self._state.acknowledge_node_heartbeat(node, HEARTBEAT_DEFAULT_INTERVAL)
        response = fleet_pb2.PullMessagesResponse()
        found = self._state.get_message_ins(node_id=node, limit=1) if node in self._mail else []
        for message in found:
            response.messages_list.append(message_to_proto(message))
            response.message_object_trees.append(self._store.get_object_tree(message.metadata.message_id))
        if not found:
            self._mail.discard(node)
        return response

    def _pull_object(self, node: int, name: str) -> message_pb2.PullObjectResponse:
        """An object of a message to this node; another site's update is none, even for one who knows its hash."""
        content = self._store.get(name) if name in self._readable.get(node, ()) else None
        found = content is not None
        return message_pb2.PullObjectResponse(object_found=found, object_available=found, object_content=content or b"")

    def _push_reply(self, node: int, request: fleet_pb2.PushMessagesRequest) -> fleet_pb2.PushMessagesResponse:
        """Take a reply's announcement; one that nobody waits for, or that is another node's to give, is dropped."""
        reply = message_from_proto(request.messages_list[0])
        copy = reply.metadata.reply_to_message_id
        if self._copies.get(copy) != node:
            return fleet_pb2.PushMessagesResponse()
        if self._state.store_message_res(reply) is None:
            if all(arrival.owed for arrival in self._arrivals.values() if arrival.copy == copy):
                self._lost.add(copy)  # an earlier reply to it broke off, and Flower takes no second: ask again
                self._news.set()
            return fleet_pb2.PushMessagesResponse()
        owed = self._store.preregister(self._run, request.message_object_trees[0])
        session = secrets.token_hex(16)
        self._arrivals[session] = _Arrival(node, copy, set(owed))
        if not owed:
            self._news.set()
        return fleet_pb2.PushMessagesResponse(objects_to_push=owed, session_id=session)

    def _push_object(self, node: int, request: message_pb2.PushObjectRequest) -> message_pb2.PushObjectResponse:
        """Take an object that a reply of this node still owes."""
        arrival = self._arrivals.get(request.session_id)
        if arrival is None or arrival.node != node or request.object_id not in arrival.owed:
            return message_pb2.PushObjectResponse(stored=False)
        arrival.nbytes += len(request.object_content)
        if arrival.nbytes > self._most:
            return message_pb2.PushObjectResponse(stored=False)
        try:
            self._store.put(request.object_id, request.object_content)
        except (ValueError, NoObjectInStoreError):  # not what its name, a hash, says
            return message_pb2.PushObjectResponse(stored=False)
        arrival.owed.discard(request.object_id)
        if not arrival.owed:
            self._news.set()
        return message_pb2.PushObjectResponse(stored=True)


def _speaks_for_itself(request: fleet_pb2.PushMessagesRequest, node: int, most: int) -> bool:
    """One reply of at most `most` objects, from `node` to the server: nothing in another's name, no instruction."""
    if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
        return False
    said = request.messages_list[0].metadata
    if (said.src_node_id, said.dst_node_id) != (node, SUPERLINK_NODE_ID) or not said.reply_to_message_id:
        return False
    some = islice(iterate_object_tree(request.message_object_trees[0]), most + 1)
    return sum(1 for _ in some) <= most


def _content(name: str, contents: dict[str, bytes], most: int, most_words: int) -> RecordDict | None:
    """What a site's objects say, or None. Sizes are counted first: an array may name one piece a million times, and a
    record of a million numbers is a hundred times as large in memory as on its way.
    """
    if sum(len(content) for content in contents.values() if not _is_piece(content)) > most_words:
        return None
    total = 0
    for content in contents.values():
        kind, children, _ = get_object_head_values_from_object_content(content)
        if kind == Array.__qualname__:
            pieces = json.loads(get_object_body(content, Array))["arraychunk_ids"]
            total += sum(len(contents[children[piece]]) for piece in pieces)
    written = inflate_object_from_contents(name, contents) if total <= most else None
    if not isinstance(written, Message) or not written.has_content():
        return None
    return written.content if sum(len(array.data) for array in _arrays(written.content)) <= most else None


def _is_piece(content: bytes) -> bool:
    """Whether an object's bytes are a piece of an array's numbers."""
    return content.startswith(b"%s " % ArrayChunk.__qualname__.encode())


def _arrays(content: RecordDict) -> list[Array]:
    return [array for record in content.values() if isinstance(record, ArrayRecord) for array in record.values()]


def _refusal(code: int, details: str | None = None) -> Answer:
    """Flower's error as its clients read it. Its diagnostic text stays here."""
    known = API_ERROR_MAP[code]
    body = FlowerError(code, "", details).to_json(known.public_message)
    return Answer(known.http_status_code, json.dumps(body).encode())
