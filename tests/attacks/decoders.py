"""Every place where bytes that somebody else wrote become values: what it is made for, and how it may refuse.

The formats of a hospital's raw extract are not here: tests/client/readers/test_any_extract.py and test_any_table.py
try those.

| from whom | what |
|---|---|
| server, to a hospital | answers of each fleet route, errors, health, objects of a message |
| hospital, to the server | bodies of each fleet route, headers, objects of a reply |
| coordinator, by mail | study, features, certificate authority |
| hospital, by mail | public key |
| own disk, at the hospital | site file, state folder's files, ledger and its entries, anchor, private key |
| own disk, at the server | server.yaml, roster, certificate, checkpoint, metrics, now, contested |
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import numpy as np
import yaml
from flwr.app import Message, MessageType
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.primitives.asymmetric import sign_message

import client.fleet
from client import anchor, entries
from client.enrolment import Enrolment
from client.entry_file import EntryFile, read_entries
from client.fleet import Fleet, Incoming, pack, rehearsal
from client.ledger_place import LedgerPlace
from client.network import Limit, NetworkError, _OneServer, authority_digest
from client.site_file import ServerTerms, load_site_file
from client.state import ENROLMENT, LEDGER_PLACE, NODE, StateFolder
from common.errors import ConfigurationError, LedgerError, PlanError, RollbackError, WireError
from common.keys import as_flower_bytes, generate, load_private, load_public, private_to_pem, public_line, read_public
from common.records import Header, Reply, Request, Status, reply_to_content, request_from_message, request_to_content
from common.schema import FeatureSchema
from common.study import load_study
from common.terms import load
from common.weights import Weights
from server import checkpoint, progress
from server.folder import Roster, ServerFolder, read_certificate
from server.folder import ServerTerms as ServerFile
from server.instances import Instances
from server.participation import collect
from server.public import Answer
from server.superlink import ACTIVATE, PUSH, PUSH_OBJECT, REQUESTS, SuperLink
from tests.client.coordinator import Authority
from tests.client.hospitals import CONFIGS
from tests.client.ledger_cases import used
from tests.small import small_study

STUDY, CODE, HEAD = "5" * 64, "c" * 64, "a" * 64
WEIGHTS: Weights = {"b": np.ones(2, np.float32), "w": np.arange(6, dtype=np.float32).reshape(2, 3)}
HEADER = Header(STUDY, CODE, 1)
LIMIT = Limit.of(array.nbytes for array in WEIGHTS.values())
NODE_NUMBER, RUN = 77, 5


@dataclass(frozen=True)
class Decoder:
    """One way in.

    Attributes:
        name: for people.
        valid: what it is made for; examples start from these.
        read: takes bytes; whatever it raises that is not in `refuses` is a fault.
        refuses: the documented errors.
    """

    name: str
    valid: tuple[bytes, ...]
    read: Callable[[bytes], object]
    refuses: tuple[type[Exception], ...] = ()


@contextmanager
def all_decoders(folder: Path) -> Iterator[list[Decoder]]:
    """Every decoder; files are written to `folder`."""
    with ExitStack() as stack:
        yield [
            *_messages(),
            *_fleet(stack),
            *_port(stack, folder),
            *_terms(folder),
            *_keys(folder),
            *_state(folder),
            *_ledger(folder),
            *_server_files(folder),
        ]


def _file(path: Path, valid: tuple[bytes, ...], read: Callable[[Path], object], *errors: type[Exception]) -> Decoder:
    """A decoder of a file."""

    def written(content: bytes) -> object:
        path.write_bytes(content)
        path.chmod(0o600)
        return read(path)

    return Decoder(f"file {path.name}", valid, written, errors)


# Objects of a message, at both ends. The first byte of an example says which object it is; the names of those that
# hold it follow, because a name is a hash, and whoever wants to be read gives the right one.


@dataclass(frozen=True)
class Parts:
    """A message as objects: from the root to the leaves, with the tree that announces them."""

    tree: ObjectTree
    contents: dict[str, bytes]

    @classmethod
    def of(cls, message: Message) -> Parts:
        message.metadata.__dict__["_message_id"] = message.object_id
        return cls(get_object_tree(message), {n: one.deflate() for n, one in get_all_nested_objects(message).items()})

    def examples(self) -> tuple[bytes, ...]:
        return tuple(bytes([index]) + content for index, content in enumerate(self.contents.values()))

    def spoilt(self, example: bytes) -> Parts:
        """With one object exchanged, and everything above it named anew."""
        chosen = list(self.contents)[example[0] % len(self.contents)] if example else ""
        contents: dict[str, bytes] = {}

        def named_anew(node: ObjectTree) -> ObjectTree:
            content = example[1:] if node.object_id == chosen else self.contents[node.object_id]
            children = [(child.object_id, named_anew(child)) for child in node.children]
            for before, child in children:
                content = content.replace(before.encode(), child.object_id.encode())
            name = hashlib.sha256(content).hexdigest()
            contents[name] = content
            return ObjectTree(object_id=name, children=[child for _, child in children])

        return Parts(named_anew(self.tree), contents)


class _Given(Fleet):
    """The fleet with a message's objects already there."""

    def __init__(self) -> None:
        super().__init__(ServerTerms(address="localhost:1", plaintext=True), generate())
        self.parts: Mapping[str, bytes] = {}

    def _pull(self, run: int, names: list[str], limit: Limit) -> dict[str, bytes]:
        return dict(self.parts)


def _messages() -> Iterator[Decoder]:
    request = rehearsal(request_to_content(Request(HEADER, WEIGHTS, HEAD)), NODE_NUMBER)
    asked, fleet = Parts.of(request), _Given()

    def at_the_hospital(example: bytes) -> object:
        parts = asked.spoilt(example)
        fleet.parts = parts.contents
        content = fleet._content(RUN, parts.tree, LIMIT)
        message = rehearsal(content, NODE_NUMBER)
        return request_from_message(message)

    yield Decoder("objects of a request", asked.examples(), at_the_hospital, (WireError,))

    reply = Message(reply_to_content(Reply(HEADER, Status.OK, WEIGHTS, HEAD)), reply_to=request)
    answered = Parts.of(reply)
    size = 2 * sum(map(len, answered.contents.values())) + 65_536

    def at_the_server(example: bytes) -> object:
        parts = answered.spoilt(example)
        store = SimpleNamespace(get_object_tree=lambda _name: parts.tree, get=parts.contents.get)
        link = cast(SuperLink, SimpleNamespace(_store=store, _most=size, _most_words=size))
        metadata = reply.metadata
        metadata.__dict__["_message_id"] = parts.tree.object_id
        found = SuperLink._inflate(link, SimpleNamespace(metadata=metadata))  # type: ignore[arg-type]  # all it looks at
        return collect([found], {NODE_NUMBER: "north"}, HEADER, WEIGHTS, {"north": 10.0})

    yield Decoder("objects of a reply", answered.examples(), at_the_server)


# What the server answers to a hospital, route by route: the whole conversation, with one answer exchanged.


def _fleet(stack: ExitStack) -> Iterator[Decoder]:
    message = rehearsal(request_to_content(Request(HEADER, WEIGHTS, HEAD)), NODE_NUMBER)
    parts = Parts.of(message)
    bare = message_to_proto(remove_content_from_message(message))
    found = message_pb2.PullObjectResponse(object_found=True, object_available=True)
    answers: dict[str, bytes] = {
        "/health": b'{"wardround": "0.1.0", "wire": 1, "study": "%s", "code": "%s", "time": 1.5}'
        % (STUDY.encode(), CODE.encode()),
        "activate-node": fleet_pb2.ActivateNodeResponse(node_id=NODE_NUMBER).SerializeToString(),
        "deactivate-node": fleet_pb2.DeactivateNodeResponse().SerializeToString(),
        "send-node-heartbeat": heartbeat_pb2.SendNodeHeartbeatResponse(success=True).SerializeToString(),
        "pull-messages": fleet_pb2.PullMessagesResponse(
            messages_list=[bare], message_object_trees=[parts.tree]
        ).SerializeToString(),
        "pull-object": found.SerializeToString(),
        "confirm-message-received": message_pb2.ConfirmMessageReceivedResponse().SerializeToString(),
        "push-messages": fleet_pb2.PushMessagesResponse(
            objects_to_push=list(parts.contents), session_id="s"
        ).SerializeToString(),
        "push-object": message_pb2.PushObjectResponse(stored=True).SerializeToString(),
    }
    exchanged: dict[str, tuple[int, bytes]] = {}

    def serve(asked: httpx.Request) -> httpx.Response:
        route = asked.url.path.removeprefix("/v1/fleet/")
        content = answers[route]
        if route == "pull-object":
            name = message_pb2.PullObjectRequest.FromString(asked.content).object_id
            found.object_content = parts.contents.get(name, b"")
            content = found.SerializeToString()
        status, content = exchanged.get(route, (200, content))
        return httpx.Response(status, stream=httpx.ByteStream(content))

    client.fleet.PULL_SECONDS = 0.2  # a server may announce an object and never have it; the client waits ten minutes
    server = ServerTerms(address="localhost:1", plaintext=True)
    fleet = stack.enter_context(Fleet(server, generate()))
    fleet._client._client = httpx.Client(
        transport=_OneServer(httpx.MockTransport(serve), httpx.URL("http://localhost:1"))
    )
    reply = Message(reply_to_content(Reply(HEADER, Status.BUDGET)), reply_to=message)

    def converse() -> object:
        fleet.health()
        fleet.activate(NODE_NUMBER)
        fleet.heartbeat()
        incoming = fleet.pull(LIMIT)
        if isinstance(incoming, Incoming) and incoming.fault is None:
            request_from_message(incoming.message)
        return fleet.push(reply, message)

    def decoder(route: str, status: int, valid: bytes) -> Decoder:
        def read(content: bytes) -> object:
            exchanged.clear()
            exchanged[route] = status, content
            try:
                return converse()
            finally:
                exchanged.clear()

        return Decoder(f"answer {status} of {route}", (valid,), read, (NetworkError, WireError))

    for route, valid in answers.items():
        if route != "pull-object":  # asked for by hash: what is exchanged is not looked at further, see above
            yield decoder(route, 200, valid)
    object_answer = replace(decoder("pull-object", 200, b""), valid=(found.SerializeToString(), b"\x08\x01"))
    yield object_answer
    error = b'{"code": 2004, "public_details": null, "message": "no"}'
    for route, status in (("activate-node", 412), ("pull-messages", 403), ("push-messages", 500)):
        yield decoder(route, status, error)


# What a hospital sends to the server's port, authenticated: the worst that a site on the roster can do.


def _port(stack: ExitStack, folder: Path) -> Iterator[Decoder]:
    link = SuperLink(folder / "superlink.db", ("127.0.0.1", 0), dict)
    link.start()
    stack.callback(link.stop)
    key = generate()
    public = as_flower_bytes(key.public_key())
    link.admit({"north": key.public_key()})

    def headers() -> list[tuple[bytes, bytes]]:
        time = datetime.now(UTC).isoformat(timespec="seconds").encode()
        signature = base64.b64encode(sign_message(key, time))
        return [
            (b"flwr-public-key", base64.b64encode(public)),
            (b"flwr-timestamp", time),
            (b"flwr-signature", signature),
            (b"wardround-instance", b"1" * 32),
        ]

    def ask(path: str, sent: list[tuple[bytes, bytes]], body: bytes) -> Answer:
        call = link.check(path, sent, body)
        return call if isinstance(call, Answer) else link.perform(call)

    def body_of(path: str) -> Callable[[bytes], object]:
        return lambda body: link._do(ask, path, headers(), body)

    (number,) = link.presence()
    hello = fleet_pb2.ActivateNodeRequest(public_key=public, heartbeat_interval=30.0)
    assert link._do(ask, ACTIVATE, headers(), hello.SerializeToString()).status == 200
    content = request_to_content(Request(HEADER, WEIGHTS))
    link.push(Message(content, dst_node_id=number, message_type=MessageType.TRAIN), 600.0)
    node = Node(node_id=number)
    asked = link._do(link._pull, number)
    copy, run = asked.messages_list[0].metadata.message_id, asked.messages_list[0].metadata.run_id
    request = rehearsal(request_to_content(Request(HEADER, WEIGHTS)), number)
    request.metadata.__dict__["_message_id"] = copy
    reply = Message(reply_to_content(Reply(HEADER, Status.BUDGET)), reply_to=request)
    parts = pack(reply, request)
    announced = message_to_proto(remove_content_from_message(reply))
    announced.metadata.run_id, announced.metadata.src_node_id = run, number
    first = next(iter(parts.objects.items()))
    valid: dict[str, Any] = {
        "activate-node": hello,
        "deactivate-node": fleet_pb2.DeactivateNodeRequest(node_id=number),
        "send-node-heartbeat": heartbeat_pb2.SendNodeHeartbeatRequest(node=node, heartbeat_interval=30.0),
        "pull-messages": fleet_pb2.PullMessagesRequest(node=node),
        "pull-object": message_pb2.PullObjectRequest(node=node, run_id=run, object_id=copy),
        "confirm-message-received": message_pb2.ConfirmMessageReceivedRequest(
            node=node, run_id=run, message_object_id=copy
        ),
        "push-messages": fleet_pb2.PushMessagesRequest(
            node=node, messages_list=[announced], message_object_trees=[parts.tree], clientapp_runtime_list=[0.0]
        ),
        "push-object": message_pb2.PushObjectRequest(
            node=node, run_id=run, object_id=first[0], object_content=first[1], session_id="0" * 32
        ),
    }
    for path in sorted(REQUESTS, key=(PUSH, PUSH_OBJECT).count):
        example = valid[path.removeprefix("/v1/fleet/")].SerializeToString()
        yield Decoder(f"body of {path}", (example,), body_of(path))

    body = valid["pull-messages"].SerializeToString()

    def header(content: bytes) -> object:
        """A line each of `name value`."""
        sent = [(name, value) for name, _, value in (line.partition(b" ") for line in content.split(b"\n")[:20])]
        link.knows(sent)
        return link._do(ask, "/v1/fleet/pull-messages", sent, body)

    yield Decoder("headers", (b"\n".join(name + b" " + value for name, value in headers()),), header)


# Files that people send to each other, or write.


def _terms(folder: Path) -> Iterator[Decoder]:
    inlined = yaml.safe_dump(small_study().model_dump(mode="json")).encode()
    named = (CONFIGS / "demo.yaml").read_bytes().replace(b"features/", str(CONFIGS / "features").encode() + b"/")
    features = (CONFIGS / "features" / "synthetic.yaml").read_bytes()
    yield _file(folder / "study.yaml", (inlined, named), load_study, ConfigurationError)
    yield _file(
        folder / "features.yaml", (features,), lambda path: load(path, FeatureSchema).digest(), ConfigurationError
    )
    site = {
        "version": 1,
        "site": "north",
        "study": "study.yaml",
        "records": "r",
        "policy": {"max_epsilon": 3.0, "delta": 1e-5, "min_noise_multiplier": 1.0, "tasks": ["diagnosis"]},
        "server": {"address": "localhost:1", "ca": "ca.crt", "proxy": "http://u:p@proxy:3128"},
        "state": "state",
        "splits": ["train", "tuning"],
    }
    shipped = tuple(path.read_bytes() for path in sorted(CONFIGS.rglob("site*.yaml")))
    yield _file(folder / "site.yaml", (yaml.safe_dump(site).encode(), *shipped), load_site_file, ConfigurationError)


def _keys(folder: Path) -> Iterator[Decoder]:
    key = generate()
    line = public_line(key).encode() + b" a comment\n"
    yield _file(folder / "key", (private_to_pem(key),), load_private, ConfigurationError)
    yield _file(folder / "key.pub", (line,), read_public, ConfigurationError)
    yield Decoder(
        "line of a key", (line,), lambda data: load_public(data.decode("utf-8", "replace")), (ConfigurationError,)
    )
    certificate = Authority(folder / "authority").file.read_bytes()
    yield _file(folder / "server.crt", (certificate,), read_certificate, ConfigurationError)
    yield _file(
        folder / "ca.crt",
        (certificate, 2 * certificate),
        lambda path: authority_digest(ServerTerms(address="localhost:1", ca=str(path))),
        ConfigurationError,
    )


def _state(folder: Path) -> Iterator[Decoder]:
    state = StateFolder(folder / "state", create=True)
    agreed = Enrolment(
        study=STUDY,
        name="s",
        site="north",
        declared_patients=80,
        policy=CODE,
        records="r",
        splits=("train",),
        exclude=None,
        authority="",
        certificate="",
        time="2027-01-01T00:00:00+00:00",
    )
    state.write_json(ENROLMENT, agreed.model_dump(mode="json"))
    state.write_json(LEDGER_PLACE, {"version": 1, "ledger": None})
    state.write_json(NODE, {"node": 7, "server": "localhost:1"})

    def valid(name: str) -> tuple[bytes, ...]:
        return ((state / name).read_bytes(),)

    yield _file(state / ENROLMENT, valid(ENROLMENT), lambda _path: Enrolment.read(state), ConfigurationError)
    yield _file(state / LEDGER_PLACE, valid(LEDGER_PLACE), lambda _path: LedgerPlace.read(state), ConfigurationError)
    yield _file(state / NODE, valid(NODE), lambda _path: state.read_json(NODE), ConfigurationError)
    alone = StateFolder(folder / "versioned", create=True).path
    yield _file(alone / "version", (b"1\n",), lambda _path: StateFolder(alone), ConfigurationError)
    yield _file(state / "split.key", (bytes(32),), lambda _path: state.split_key(), ConfigurationError)


def _ledger(folder: Path) -> Iterator[Decoder]:
    seen = folder / "anchor"
    path = used(folder / "ledger.db", anchor=seen)
    written = [entries.encode(entry) for entry in read_entries(path).entries]
    content, anchored = path.read_bytes(), seen.read_bytes()

    def opened(file: Path) -> None:
        for beside in ("-wal", "-shm"):
            file.with_name(file.name + beside).unlink(missing_ok=True)
        EntryFile(file).close()

    errors = (KeyError, TypeError, ValueError, PlanError)
    yield Decoder("entry of a ledger", tuple(written), entries.decode, errors)
    yield _file(folder / "opened.db", (content,), opened, LedgerError)
    yield _file(folder / "read.db", (content,), read_entries, LedgerError)
    yield _file(seen, (anchored,), anchor.Anchor.read, RollbackError)


def _server_files(folder: Path) -> Iterator[Decoder]:
    place = folder / "server"
    place.mkdir()
    terms = ServerFile(study=STUDY, names=("localhost",))
    roster = Roster(sites={"north": public_line(generate()), "east": public_line(generate())})
    yield _file(
        place / "server.yaml",
        (yaml.safe_dump(terms.model_dump(mode="json")).encode(),),
        lambda path: load(path, ServerFile),
        ConfigurationError,
    )
    yield _file(
        place / "roster.yaml",
        (yaml.safe_dump(roster.model_dump(mode="json")).encode(),),
        lambda _path: ServerFolder(place, terms).roster(),
        ConfigurationError,
    )
    kept = place / "checkpoint.safetensors"
    checkpoint.save(kept, checkpoint.Checkpoint(3, WEIGHTS, heads={"north": HEAD}), STUDY)
    yield _file(kept, (kept.read_bytes(),), lambda path: checkpoint.load(path, STUDY), ConfigurationError)
    yield _file(place / "round.safetensors", (kept.read_bytes(),), progress.round_of)
    line = b'{"round": 1, "time": 1.0, "seconds": 0.5, "counted": true, "sites": ["north"], "refused": {"east": "x"}}\n'
    yield _file(place / "metrics.jsonl", (3 * line,), progress.read)
    now = b'{"time": 1.0, "process": 1, "phase": "round", "round": 3, "note": "", "sites": {"north": {"online": true}}}'
    yield _file(place / "now.json", (now,), progress.read_now)
    yield _file(place / "contested.json", (b'["%s"]' % HEAD.encode(),), Instances, ConfigurationError)
