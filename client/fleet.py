"""The connection to the server: Flower's fleet API and nothing of its SuperNode. All imports of Flower's internals.

A stock SuperNode unpacks and runs whatever code the server names. This client speaks the same routes, but never asks
for an app bundle (`get-fab`), and there is no path from a message to an import. What may come in is one kind of
message with as many bytes as the study's weights have; the sum is counted before anything is put together.

Decisions a reader would question:

- Flower's `http_request_response` is not used: it ends the process where a node cannot be activated.
- A reply carries the times of the request that it answers, not this machine's clock: it expires when the request
  does, clocks that differ by minutes lose no reply, and how long training took is not written into the message. For
  the same reason the time that each request signs is cut to whole seconds (`_Signer`).
- A node that crashed counts as online for a minute, and Flower refuses to activate it again. So the number that the
  server gave is kept on disk, and sent as a goodbye before the next hello.
"""

from __future__ import annotations

import base64
import contextlib
import json
import secrets
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Self, TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from flwr.app.message.array import Array
from flwr.app.message.message import make_message, remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, SUPERLINK_NODE_ID, TIMESTAMP_HEADER
from flwr.common.serde import message_to_proto
from flwr.common.serde_utils import metadata_from_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_body,
    get_object_head_values_from_object_content,
    get_object_id,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectUnavailableError,
    inflate_object_from_contents,
    pull_objects,
    push_object_contents_from_iterable,
    validate_object_content,
)
from flwr.supercore.primitives.asymmetric import sign_message
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supernode.fleet_http_client import FleetHttpClient

from client.network import (
    ContestedError,
    Health,
    Limit,
    NetworkError,
    TooLargeError,
    base_url,
    explain,
    health_in,
    http_client,
)
from client.site_file import ServerTerms
from common.errors import WardroundError, WireError
from common.keys import as_flower_bytes
from common.records import ANSWERED_BY, CONTESTED, INSTANCE_HEADER

HEARTBEAT_SECONDS = HEARTBEAT_DEFAULT_INTERVAL  # the server calls a node offline after two of these
PULL_SECONDS = 600.0  # for one message
ERROR_BYTES = 10_000  # of an error's body; Flower's have a few hundred
INSTANCE = secrets.token_hex(16)  # tells this process from another one that holds the same key
FIRST_WAIT = 0.05  # seconds until an announced object is asked for again

_WORTH_TRYING_AGAIN = (401, 407, 408, 425, 429)

T = TypeVar("T")


class ActivationError(NetworkError):
    """The server does not let this key in."""


@dataclass(frozen=True)
class Incoming:
    """A message as it came: whole, or with empty content and the `fault` for which it was refused."""

    message: Message
    fault: str | None = None


class Fleet:
    """One site's connection; a context manager. Every method raises NetworkError with a line for a person, or
    ContestedError if another process uses the same key.

    Args:
        server: where, and whom to trust.
        key: the site's private key; its public half must be on the server's roster.
        trust: whom TLS trusts, read before; None reads the site file's authority.
        instance: this process, to the server; tests pass another.
    """

    def __init__(
        self,
        server: ServerTerms,
        key: EllipticCurvePrivateKey,
        *,
        timeout: float = 30.0,
        trust: ssl.SSLContext | None = None,
        instance: str = INSTANCE,
    ) -> None:
        self._server, self._key = server, key
        self._client = _Client(server, _Signer(key, instance), http_client(server, timeout, trust))
        self._node = Node()
        self.online = False

    def health(self) -> Health:
        """What the server says of itself."""
        return health_in(self._ask(lambda: self._client.get("/health")), self._server)

    def activate(self, previous: int | None = None) -> int:
        """Go online and return the node's number. `previous`: the number of the session before, if there was one.

        Raises:
            ActivationError: the key is not on the roster, or the node was online within the last minute.
        """
        if previous is not None:
            self.goodbye(previous)
        public = as_flower_bytes(self._key.public_key())
        request = ActivateNodeRequest(public_key=public, heartbeat_interval=HEARTBEAT_SECONDS)
        try:
            answer = self._ask(lambda: self._client.ActivateNode(request))
        except _RefusedError as error:
            if error.status == httpx.codes.UNAUTHORIZED:
                raise ActivationError(
                    f"{self._server.address}: does not admit this site's key: it is not on the roster (send key.pub to "
                    "the coordinator), or this machine's clock is minutes off"
                ) from None
            if error.code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
                raise ActivationError(
                    f"{self._server.address}: this site's key is not on the roster (send key.pub to the coordinator), "
                    "or it was online within the last minute, here or elsewhere (then wait)"
                ) from None
            raise
        self._node = Node(node_id=answer.node_id)
        self.online = True
        return int(answer.node_id)

    def deactivate(self) -> None:
        """Go offline at once, instead of after a minute."""
        if self.online:
            self.online = False
            self.goodbye(self._node.node_id)

    def heartbeat(self) -> None:
        """Say that this site is there."""
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_SECONDS)
        if not self._ask(lambda: self._client.SendNodeHeartbeat(request)).success:
            raise NetworkError(f"{self._server.address}: no longer knows this site; connecting anew")

    def pull(self, limit: Limit) -> Incoming | None:
        """The next message, or None if there is none (any more).

        What is no TRAIN or EVALUATE message within `limit` comes without content, and with a fault. Only the fault
        itself is told, never what was sent.
        """
        answer = self._ask(lambda: self._client.PullMessages(PullMessagesRequest(node=self._node)))
        if not answer.messages_list:
            return None
        announced, trees = answer.messages_list[0], answer.message_object_trees
        try:  # content comes as objects; what may stand in this place is not even looked at
            message = make_message(metadata_from_proto(announced.metadata), RecordDict())
        except Exception as error:  # metadata that Flower itself cannot read cannot be answered
            raise NetworkError(f"{self._server.address}: sent a message without metadata ({_kind(error)})") from None
        run, fault = message.metadata.run_id, None
        try:
            if message.metadata.message_type not in ANSWERED_BY:
                raise WireError(f"message type is not {' or '.join(ANSWERED_BY)}")
            if not trees or trees[0].object_id != message.metadata.message_id:
                raise WireError("the message's objects belong to another message")
            message.content = self._content(run, trees[0], limit)
        except WireError as error:
            fault = str(error)
        except ObjectPullError:  # its round has ended, and the server has cleared it away
            return None
        except _RefusedError as error:
            if error.run_is_over:
                return None
            raise
        received = ConfirmMessageReceivedRequest(
            node=self._node, run_id=run, message_object_id=message.metadata.message_id
        )
        self._unless_over(lambda: self._client.ConfirmMessageReceived(received))
        return Incoming(message, fault)

    def push(self, reply: Message, request: Message) -> bool:
        """Send the reply to a request. False: the server does not want it (any more), and never will."""
        parts = pack(reply, request)
        announcement = _announcement(reply, parts, self._node)
        try:
            answer = self._ask(lambda: self._client.PushMessages(announcement))
        except _RefusedError as error:
            if error.for_good:
                return False
            raise
        wanted = [(name, parts.objects[name]) for name in answer.objects_to_push if name in parts.objects]
        push_object = partial(self._push_object, request.metadata.run_id, answer.session_id)
        push_object_contents_from_iterable(wanted, push_object)
        return True

    def close(self) -> None:
        """Go offline and close the connection; never raises for the network's sake."""
        try:
            self.deactivate()
        except NetworkError:
            pass
        finally:
            self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def goodbye(self, node: int) -> None:
        """Take the session with this number offline at once."""
        # It was offline already, the server has forgotten it, or listens to nobody with this key.
        with contextlib.suppress(_RefusedError, ContestedError):
            self._ask(lambda: self._client.DeactivateNode(DeactivateNodeRequest(node_id=node)))

    def _content(self, run: int, tree: ObjectTree, limit: Limit) -> RecordDict:
        """Pull a message's objects within the limit and put its content together.

        Raises:
            WireError: they are no message within the limit.
            ObjectPullError: the server no longer has one of them.
        """
        names = list(dict.fromkeys(part.object_id for part in iterate_object_tree(tree)))
        if len(names) > limit.objects:
            raise WireError(f"message of {len(names)} objects, the study's network allows {limit.objects}")
        contents = self._pull(run, names, limit)
        try:
            _check_objects(contents, limit)
            inflated = inflate_object_from_contents(tree.object_id, contents)
        except WireError:
            raise
        except Exception as error:  # Flower raises anything on garbage: KeyError, JSONDecodeError, AssertionError
            raise WireError(f"objects that are no message ({_kind(error)})") from None
        if not isinstance(inflated, Message) or not inflated.has_content():
            raise WireError("objects that are no message with content")
        records = [record for record in inflated.content.values() if isinstance(record, ArrayRecord)]
        if sum(len(array.data) for record in records for array in record.values()) > limit.nbytes:
            raise WireError(f"the same arrays under many names, more than {limit.nbytes} bytes together")
        return inflated.content

    def _pull(self, run: int, names: list[str], limit: Limit) -> dict[str, bytes]:
        counted, lock = 0, threading.Lock()
        running, over, changed = 0, False, threading.Condition()

        def pull(name: str) -> bytes:
            nonlocal running
            with changed:
                if over:
                    raise ObjectPullError(name, "not wanted any more")
                running += 1
            try:
                return fetch(name)
            finally:
                with changed:
                    running -= 1
                    changed.notify_all()

        def fetch(name: str) -> bytes:
            nonlocal counted
            request = PullObjectRequest(node=self._node, run_id=run, object_id=name)
            answer = self._ask(lambda: self._client.PullObject(request))
            if not answer.object_found:
                raise ObjectPullError(name, "not found")
            if not answer.object_available:
                raise ObjectUnavailableError(name)
            with lock:
                counted += len(answer.object_content)
                if counted > limit.nbytes:
                    raise WireError(f"message of more than {limit.nbytes} bytes, the most that the study's network has")
            return bytes(answer.object_content)

        try:
            return pull_objects(names, pull, max_time=PULL_SECONDS, initial_backoff=FIRST_WAIT)
        except TooLargeError as error:
            raise WireError(str(error)) from None
        finally:  # Flower leaves its threads behind: one that dials after this connection was closed leaks a socket
            with changed:
                over = True
                changed.wait_for(lambda: running == 0)

    def _push_object(self, run: int, session: str, name: str, content: bytes) -> None:
        request = PushObjectRequest(
            node=self._node, run_id=run, object_id=name, object_content=content, session_id=session
        )
        answer = self._unless_over(lambda: self._client.PushObject(request))
        if answer is not None and not answer.stored:
            raise NetworkError(f"{self._server.address}: did not take a piece of the reply; sending it again")

    def _unless_over(self, ask: Callable[[], T]) -> T | None:
        """The answer; None if the server says that the run is over."""
        try:
            return self._ask(ask)
        except _RefusedError as error:
            if error.run_is_over:
                return None
            raise

    def _ask(self, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except httpx.HTTPStatusError as error:
            refused = _RefusedError(self._server.address, error.response)
            if refused.contested:
                self.online = False  # no goodbye, it would be refused
                raise ContestedError(
                    f"{self._server.address}: another process uses this site's key, so the server listens to neither; "
                    "if nobody here started a second client, the key was stolen: call the coordinator. Either way move "
                    "key and key.pub out of the state folder, run `wardround client keygen`, and have the new one "
                    "admitted"
                ) from None
            raise refused from None
        except httpx.HTTPError as error:
            raise NetworkError(explain(error, self._server)) from None
        except WardroundError:
            raise
        except Exception as error:  # no protobuf, a closed connection, or whatever a server can think of
            raise NetworkError(f"{self._server.address}: sent an answer that cannot be read ({_kind(error)})") from None


class _RefusedError(NetworkError):
    """An HTTP status that is no success, with Flower's code if there was one."""

    def __init__(self, address: str, response: httpx.Response) -> None:
        try:
            # not `text`: the answer itself would name the codec, and some of Python's are none of text
            found = FlowerError.from_json(response.content[:ERROR_BYTES].decode("utf-8", "replace"))
        except Exception:  # brackets by the thousand, a code that is none: there is no end of it
            found = None
        self.status, self.code = response.status_code, found.code if found else None
        self.contested = self.status == httpx.codes.CONFLICT and CONTESTED.encode() in response.content[:ERROR_BYTES]
        self.run_is_over = self.code == ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED
        self.for_good = 400 <= self.status < 500 and self.status not in _WORTH_TRYING_AGAIN
        meaning = f"Flower's code {self.code}" if found else "no wardround server, or it is not ready"
        super().__init__(f"{address}: answered with HTTP status {self.status} ({meaning}); trying again is safe")


class _Signer:
    """Proves the key with every request: Flower's headers, but the time in whole seconds; and names the process.

    Flower signs microseconds. Of two requests these tell how long training took, without what the network adds.
    """

    def __init__(self, key: EllipticCurvePrivateKey, instance: str) -> None:
        self._instance = instance
        self._key, self._public = key, base64.b64encode(as_flower_bytes(key.public_key())).decode("ascii")

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Add the headers."""
        time = datetime.now(UTC).isoformat(timespec="seconds")
        context.request.headers[FLEET_HTTP_PUBLIC_KEY_HEADER] = self._public
        context.request.headers[TIMESTAMP_HEADER] = time
        context.request.headers[INSTANCE_HEADER] = self._instance
        signature = base64.b64encode(sign_message(self._key, time.encode("ascii")))
        context.request.headers[FLEET_HTTP_SIGNATURE_HEADER] = signature.decode("ascii")
        return call_next(context)


class _Client(FleetHttpClient):
    """Flower's fleet client over our own HTTP client: one server, no redirects, no variables of the environment."""

    def __init__(self, server: ServerTerms, signer: _Signer, client: httpx.Client) -> None:
        # Flower's constructor would make an HTTP client of its own, with the proxies of the environment.
        self._base_url = base_url(server)
        self._interceptors = (signer,)
        self._retry_invoker = None
        self._client = client

    def get(self, path: str) -> httpx.Response:
        """An unsigned request."""
        return self._client.get(self._base_url + path)


@dataclass(frozen=True)
class Parts:
    """A reply as it is sent: its tree of objects, and each object's bytes by its sha256."""

    tree: ObjectTree
    objects: dict[str, bytes]


def pack(reply: Message, request: Message) -> Parts:
    """A reply as the objects that leave; sets its number and its times."""
    reply.metadata.created_at, reply.metadata.ttl = request.metadata.created_at, request.metadata.ttl
    with no_object_id_recompute():
        reply.metadata.__dict__["_message_id"] = reply.object_id
        tree, objects = get_object_tree(reply), get_all_nested_objects(reply)
        return Parts(tree, {name: one.deflate() for name, one in objects.items()})


def rehearsal(content: RecordDict, node: int) -> Message:
    """A request as it would come from a server, for a dry run."""
    now = datetime.now(UTC).timestamp()
    metadata = Metadata(1, "0" * 64, SUPERLINK_NODE_ID, node, "", "", now, 3600.0, MessageType.TRAIN)
    return make_message(metadata, content)


def bodies(reply: Message, request: Message, node: int) -> list[tuple[str, str, bytes]]:
    """(route, what it carries, body) of each request that `Fleet.push` would make, without making one.

    Only the server's own words, node number and push session, are not known here.
    """
    parts, sender = pack(reply, request), Node(node_id=node)
    announcement = _announcement(reply, parts, sender).SerializeToString(deterministic=True)
    found = [("/v1/fleet/push-messages", "announcement", announcement)]
    for name, content in parts.objects.items():
        push = PushObjectRequest(node=sender, run_id=request.metadata.run_id, object_id=name, object_content=content)
        kind = get_object_head_values_from_object_content(content)[0]
        found.append(("/v1/fleet/push-object", kind, push.SerializeToString(deterministic=True)))
    return found


def _announcement(reply: Message, parts: Parts, node: Node) -> PushMessagesRequest:
    return PushMessagesRequest(
        node=node,
        messages_list=[message_to_proto(remove_content_from_message(reply))],
        message_object_trees=[parts.tree],
        clientapp_runtime_list=[0.0],  # how long training took is nobody's business
    )


def _check_objects(contents: dict[str, bytes], limit: Limit) -> None:
    """Raise WireError unless each object is what its name says and all arrays together stay within the limit.

    An array may name the same piece a million times, so its size is counted before it is put together.
    """
    total = 0
    for name, content in contents.items():
        if get_object_id(content) != name:
            raise WireError("an object's content is not what its sha256 says")
        validate_object_content(content)
        kind, children, _ = get_object_head_values_from_object_content(content)
        if kind == Array.__qualname__:
            pieces = json.loads(get_object_body(content, Array))["arraychunk_ids"]
            total += sum(len(contents[children[piece]]) for piece in pieces)
            if total > limit.nbytes:
                raise WireError(f"arrays of more than {limit.nbytes} bytes, the most that the study's network has")


def _kind(error: Exception) -> str:
    return type(error).__name__
