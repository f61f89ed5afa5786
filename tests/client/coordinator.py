"""A study's server as a site sees it, in the test's own process: TLS, Flower's fleet routes by hand, and its malice.

Nothing of `server/` is used: what a site does with a message must not depend on a server that behaves.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import queue
import ssl
import threading
import time
from base64 import b64decode
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    SECP384R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_public_key,
)
from cryptography.x509.oid import NameOID
from flwr.app import Message, MessageType, RecordDict
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from common.keys import as_flower_bytes
from common.provenance import code_digest
from common.records import WIRE_VERSION
from common.study import Study

NODE, RUN = 77, 5
DAY = datetime.timedelta(days=1)


@dataclass
class Authority:
    """A certificate authority, and the certificates that it makes for 127.0.0.1 and localhost."""

    folder: Path
    key: EllipticCurvePrivateKey = field(default_factory=lambda: generate_private_key(SECP384R1()))

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
        now = datetime.datetime.now(datetime.UTC)
        ca = (
            x509.CertificateBuilder(self.name, self.name, self.key.public_key(), x509.random_serial_number())
            .not_valid_before(now - DAY)
            .not_valid_after(now + 10 * DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self.key, hashes.SHA384())
        )
        self.file = self.folder / "ca.crt"
        self.file.write_bytes(ca.public_bytes(Encoding.PEM))

    def context(self, *, name: str | None = None, days: tuple[int, int] = (-1, 5)) -> ssl.SSLContext:
        """A server's TLS: for `name`, or for this machine; valid from day to day, counted from now."""
        key = generate_private_key(SECP384R1())
        now = datetime.datetime.now(datetime.UTC)
        names: list[x509.GeneralName] = (
            [x509.DNSName(name)]
            if name
            else [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        )
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server")])
        certificate = (
            x509.CertificateBuilder(self.name, subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(now + days[0] * DAY)
            .not_valid_after(now + days[1] * DAY)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(self.key, hashes.SHA384())
        )
        pem = self.folder / f"server-{certificate.serial_number}.pem"
        pem.write_bytes(
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            + certificate.public_bytes(Encoding.PEM)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem)
        return context


@dataclass
class Offer:
    """A message that waits for the site, as objects; tests spoil them."""

    message: Message
    tree: message_pb2.ObjectTree
    objects: dict[str, bytes]


class Coordinator:
    """The server. A context manager; listens on a free port of 127.0.0.1.

    Attributes:
        health: what /health says; change it at will.
        roster: the keys that are admitted.
        calls: every path that was asked for, with the time.
        replies: what the site sent, whole.
        spoil: changes raw responses: (path, status, headers, body) -> the same.
    """

    def __init__(self, study: Study, tls: ssl.SSLContext | None = None) -> None:
        self.health: dict[str, Any] = {
            "wardround": "0.1.0",
            "wire": WIRE_VERSION,
            "study": study.digest(),
            "code": code_digest(),
        }
        self.clock_off = 0.0
        self.roster: list[bytes] = []
        self.calls: list[str] = []
        self.replies: queue.Queue[Message] = queue.Queue()
        self.online = threading.Event()
        self.offline = threading.Event()
        self.spoil: Callable[[str, int, dict[str, str], bytes], tuple[int, dict[str, str], bytes]] | None = None
        self.answers: dict[str, Callable[[Any], Any]] = {}
        self._offers: queue.Queue[Offer] = queue.Queue()
        self._objects: dict[str, bytes] = {}
        self._pending: dict[str, tuple[Message, set[str], dict[str, bytes]]] = {}
        self._number = 0
        self._lock = threading.Lock()
        coordinator = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                coordinator._serve(self, b"")

            def do_POST(self) -> None:
                coordinator._serve(self, self.rfile.read(int(self.headers.get("content-length", "0"))))

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the name is the base class's)
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that hangs up in a handshake is the point of some tests

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = int(self._server.server_address[1])
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self) -> Coordinator:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()

    def admit(self, key: EllipticCurvePublicKey) -> None:
        """Put a key on the roster."""
        self.roster.append(as_flower_bytes(key))

    def offer(self, content: RecordDict, kind: str = MessageType.TRAIN) -> Offer:
        """A message, not yet sent."""
        self._number += 1
        metadata = Metadata(RUN, "", 1, NODE, "", str(self._number), time.time(), 600.0, kind)
        message = make_message(metadata, content)
        message.metadata.__dict__["_message_id"] = message.object_id
        objects = {name: one.deflate() for name, one in get_all_nested_objects(message).items()}
        return Offer(message, get_object_tree(message), objects)

    def send(self, offer: Offer) -> None:
        """Let the site have it."""
        self._objects |= offer.objects
        self._offers.put(offer)

    def ask(self, content: RecordDict, kind: str = MessageType.TRAIN) -> Message:
        """Send a message and wait for the reply."""
        self.send(self.offer(content, kind))
        return self.replies.get(timeout=120)

    def _serve(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        self.calls.append(handler.path)
        status, headers, answer = 200, {"content-type": "application/protobuf"}, b""
        if handler.path == "/health":
            answer = json.dumps({**self.health, "time": time.time() + self.clock_off}).encode()
        elif not self._knows(handler):
            status, answer = 401, b'{"detail": "no key of the roster"}'
        else:
            route = handler.path.removeprefix("/v1/fleet/")
            request_type, usual = _ROUTES[route]
            request = request_type.FromString(body)
            response = self.answers[route](request) if route in self.answers else usual(self, request)
            if isinstance(response, tuple):
                status, answer = response
            else:
                answer = response.SerializeToString()
        if self.spoil is not None:
            status, headers, answer = self.spoil(handler.path, status, headers, answer)
        handler.send_response(status)
        for name, value in {"content-length": str(len(answer)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(answer)

    def _knows(self, handler: BaseHTTPRequestHandler) -> bool:
        """The key is on the roster and has signed the time."""
        values = {name.lower(): value for name, value in handler.headers.items()}
        key = b64decode(next((v for n, v in values.items() if "public-key" in n), ""))
        if key not in self.roster:
            return False
        stamp = next(v for n, v in values.items() if "timestamp" in n)
        signature = b64decode(next(v for n, v in values.items() if "signature" in n))
        public = load_pem_public_key(key)
        assert isinstance(public, EllipticCurvePublicKey)
        public.verify(signature, stamp.encode(), ECDSA(hashes.SHA256()))
        return True

    def activate(self, _request: Any) -> Any:
        if self.online.is_set():
            return 412, b'{"code": 2004, "detail": "Failed to activate SuperNode."}'
        self.offline.clear()
        self.online.set()
        return fleet_pb2.ActivateNodeResponse(node_id=NODE)

    def deactivate(self, _request: Any) -> Any:
        self.online.clear()
        self.offline.set()
        return fleet_pb2.DeactivateNodeResponse()

    def heartbeat(self, _request: Any) -> Any:
        return heartbeat_pb2.SendNodeHeartbeatResponse(success=self.online.is_set())

    def pull(self, _request: Any) -> Any:
        try:
            offer = self._offers.get(timeout=0.2)
        except queue.Empty:
            return fleet_pb2.PullMessagesResponse()
        bare = make_message(offer.message.metadata, RecordDict())
        return fleet_pb2.PullMessagesResponse(messages_list=[message_to_proto(bare)], message_object_trees=[offer.tree])

    def pull_object(self, request: Any) -> Any:
        content = self._objects.get(request.object_id)
        return message_pb2.PullObjectResponse(
            object_found=content is not None, object_available=content is not None, object_content=content or b""
        )

    def confirm(self, _request: Any) -> Any:
        return message_pb2.ConfirmMessageReceivedResponse()

    def push(self, request: Any) -> Any:
        reply, tree = message_from_proto(request.messages_list[0]), request.message_object_trees[0]
        names = {leaf.object_id for leaf in iterate_object_tree(tree)}
        with self._lock:
            self._pending[reply.metadata.message_id] = (reply, names, {})
        return fleet_pb2.PushMessagesResponse(objects_to_push=sorted(names), session_id=reply.metadata.message_id)

    def push_object(self, request: Any) -> Any:
        with self._lock:
            reply, names, contents = self._pending[request.session_id]
            contents[request.object_id] = request.object_content
            if contents.keys() == names:
                inflated = inflate_object_from_contents(reply.metadata.message_id, dict(contents))
                assert isinstance(inflated, Message)
                reply.content = inflated.content
                self.replies.put(reply)
        return message_pb2.PushObjectResponse(stored=True)


_ROUTES: dict[str, tuple[Any, Callable[[Coordinator, Any], Any]]] = {
    "activate-node": (fleet_pb2.ActivateNodeRequest, Coordinator.activate),
    "deactivate-node": (fleet_pb2.DeactivateNodeRequest, Coordinator.deactivate),
    "send-node-heartbeat": (heartbeat_pb2.SendNodeHeartbeatRequest, Coordinator.heartbeat),
    "pull-messages": (fleet_pb2.PullMessagesRequest, Coordinator.pull),
    "pull-object": (message_pb2.PullObjectRequest, Coordinator.pull_object),
    "confirm-message-received": (message_pb2.ConfirmMessageReceivedRequest, Coordinator.confirm),
    "push-messages": (fleet_pb2.PushMessagesRequest, Coordinator.push),
    "push-object": (message_pb2.PushObjectRequest, Coordinator.push_object),
}
