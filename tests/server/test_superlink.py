"""The public port and what stands behind it, with Flower's own client over loopback: what is served, and to whom."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Sized
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto import fleet_pb2
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.inflatable.inflatable_object import InflatableObject, get_all_nested_objects, get_object_tree
from flwr.superlink.main import create_app

from common.errors import ConfigurationError
from common.keys import generate
from common.provenance import code_digest
from common.records import Header, Reply, Request, Status, reply_from_message, reply_to_content, request_to_content
from common.weights import Weights
from server.grid import FleetGrid
from server.public import LARGEST_BODY
from server.superlink import KEY_HEADER, REQUESTS, SuperLink
from tests.server.hospitals import Connection, Hospital, wait_until

WEIGHTS: Weights = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float32)}
HEADER = Header("5" * 64, code_digest(), 1)
PROTOBUF = {"content-type": "application/x-protobuf"}


@dataclass
class Study:
    """A SuperLink of two sites, and a connection for each."""

    link: SuperLink
    keys: dict[str, EllipticCurvePrivateKey]
    made: list[Connection] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.link.port}"

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def connect(self, site: str) -> Connection:
        """A connected node with the site's key."""
        connection = self.stranger(self.keys[site])
        connection.activate()
        return connection

    def stranger(self, key: EllipticCurvePrivateKey) -> Connection:
        """A connection with any key, not yet active."""
        self.made.append(Connection(self.address, key))
        return self.made[-1]

    def node(self, site: str) -> int:
        return next(node for node, one in self.link.presence().items() if one.site == site)

    def send(self, site: str) -> str:
        """A request to the site; returns its id."""
        content = request_to_content(Request(HEADER, WEIGHTS))
        return self.link.push(Message(content, dst_node_id=self.node(site), message_type=MessageType.TRAIN), 60.0)


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    """North and east are on the roster; nobody is connected."""
    link = SuperLink(tmp_path / "superlink.db", ("127.0.0.1", 0), lambda: {"wardround": "test"})
    link.start()
    keys = {site: generate() for site in ("north", "east")}
    link.admit({site: key.public_key() for site, key in keys.items()})
    made = Study(link, keys)
    made.link.presence()  # starts the run, whose number messages carry
    try:
        yield made
    finally:
        for connection in made.made:
            connection.client.close()
        link.stop()


def answer(value: float = 1.0) -> RecordDict:
    update: Weights = {name: np.full_like(array, value) for name, array in WEIGHTS.items()}
    return reply_to_content(Reply(HEADER, Status.OK, update))


def received(connection: Connection) -> Message:
    message = connection.pull()
    assert message is not None
    return message


def value_of(reply: Message | None) -> float:
    assert reply is not None
    update = reply_from_message(reply).update
    assert update is not None
    return float(update["b"][0])


def status_of(call: httpx.HTTPStatusError) -> int:
    return call.response.status_code


def flowers_routes() -> set[tuple[str, str]]:
    """Every (method, path) of Flower's own SuperLink: fleet, control, runtime, health, documentation."""
    paths = create_app().openapi()["paths"]
    found = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    return found | {("GET", path) for path in ("/docs", "/openapi.json", "/redoc", "/", "/docs/oauth2-redirect")}


def test_of_flowers_routes_only_eight_fleet_routes_and_health_exist(study: Study) -> None:
    """Every other route of Flower's SuperLink, register and get-fab among them, is 404; the eight want a key."""
    routes = flowers_routes()
    assert {path for _, path in routes if path.startswith("/v1/control/")}
    assert {path for _, path in routes if path.startswith("/v1/runtime/")}
    with httpx.Client(base_url=study.url, trust_env=False) as client:
        found = {(m, p): client.request(m, p, headers=PROTOBUF).status_code for m, p in routes}
    served = {route: status for route, status in found.items() if status != 404}
    assert served == {
        **{("POST", path): 401 for path in REQUESTS},
        **{(method, "/health"): 200 for method in ("GET", "HEAD")},
    }
    for hidden in ("register-node", "unregister-node", "get-fab", "get-run"):
        assert ("POST", f"/v1/fleet/{hidden}") in routes
        assert f"/v1/fleet/{hidden}" not in REQUESTS


@pytest.mark.parametrize(
    "path",
    ["//v1/fleet/pull-messages", "/v1/fleet/../control/start-run", "/v1/fleet/pull-messages/", "/V1/fleet/x", "*"],
)
def test_paths_are_compared_whole(path: str, study: Study) -> None:
    """No spelling of a path leads past the table."""
    with httpx.Client(base_url=study.url, trust_env=False) as client:
        assert client.request("POST", path).status_code in (400, 404)


def test_nobody_can_start_a_run(study: Study) -> None:
    """Flower's own `flwr run` call fails on the public port."""
    client = ControlHttpClient.from_server_address(study.address, True, None, [])
    try:
        with pytest.raises(httpx.HTTPStatusError) as refused:
            client.StartRun(StartRunRequest())
        assert status_of(refused.value) == 404
    finally:
        client.close()


def test_health_says_public_facts(study: Study) -> None:
    """Our JSON, to anyone, also as HEAD."""
    assert httpx.get(f"{study.url}/health", trust_env=False).json() == {"wardround": "test"}
    assert httpx.head(f"{study.url}/health", trust_env=False).status_code == 200
    assert httpx.post(f"{study.url}/health", trust_env=False).status_code == 404


def test_a_key_that_is_not_on_the_roster_is_refused(study: Study) -> None:
    """Activation fails, and so does every other call."""
    stranger = study.stranger(generate())
    for call in (stranger.activate, stranger.heartbeat, stranger.pull):
        with pytest.raises(httpx.HTTPStatusError) as refused:
            call()
        assert status_of(refused.value) == 401


def test_a_key_must_be_held_not_only_named(study: Study) -> None:
    """A request that names north's key and is signed with another one is refused."""
    thief = study.stranger(generate())
    thief.client._interceptors[0]._public_key_bytes = study.stranger(study.keys["north"]).public  # type: ignore[attr-defined]  # a forgery
    with pytest.raises(httpx.HTTPStatusError) as refused:
        thief.activate()
    assert status_of(refused.value) == 401


def test_a_site_cannot_use_anothers_node(study: Study) -> None:
    """East's key with north's node number is refused, for pulling, pushing and leaving."""
    north, east = study.connect("north"), study.connect("east")
    study.send("north")
    east.node.CopyFrom(north.node)
    for call in (east.pull, east.heartbeat, east.deactivate):
        with pytest.raises(httpx.HTTPStatusError) as refused:
            call()
        assert status_of(refused.value) == 401
    received(north)
    assert study.link.presence()[north.node.node_id].online


def test_a_message_reaches_its_site_and_the_reply_comes_back(study: Study) -> None:
    """Weights arrive bit by bit; the reply names its sender and the request; nobody else sees either."""
    north, east = study.connect("north"), study.connect("east")
    name = study.send("north")
    assert not study.link.has_mail(east.node.node_id)
    message = received(north)
    assert message.metadata.message_id == name
    sent = message.content["weights"]
    assert isinstance(sent, ArrayRecord)
    assert {key: np.array_equal(array.numpy(), WEIGHTS[key]) for key, array in sent.items()} == {"w": True, "b": True}
    assert study.link.replies([name]) == {}
    assert all(north.push(Message(answer(3.0), reply_to=message)))
    reply = study.link.replies([name])[name]
    assert value_of(reply) == 3.0
    assert reply is not None
    assert (reply.metadata.src_node_id, reply.metadata.reply_to_message_id) == (north.node.node_id, name)
    assert study.link.replies([name]) == {}


def test_a_question_for_metrics_goes_the_same_way(study: Study) -> None:
    """EVALUATE reaches the site as such, and its answer comes back with `metrics` in the place of an update."""
    north = study.connect("north")
    asked = request_to_content(Request(HEADER, WEIGHTS))
    sent = Message(asked, dst_node_id=study.node("north"), message_type=MessageType.EVALUATE)
    name = study.link.push(sent, 60.0)
    message = received(north)
    assert message.metadata.message_type == MessageType.EVALUATE
    told = reply_to_content(Reply(HEADER, Status.OK, {"histogram": WEIGHTS["w"]}), MessageType.EVALUATE)
    assert set(told) == {"reply", "metrics"}
    assert all(north.push(Message(told, reply_to=message)))
    reply = study.link.replies([name])[name]
    assert reply is not None
    found = reply_from_message(reply)
    assert found.update is not None
    assert np.array_equal(found.update["histogram"], WEIGHTS["w"])


def test_a_reply_counts_when_its_last_object_is_there(study: Study) -> None:
    """An announcement alone is no reply, nor is all but one object."""
    north = study.connect("north")
    name = study.send("north")
    reply = Message(answer(), reply_to=received(north))
    said, contents = north.announce(reply)
    run = reply.metadata.run_id
    *most, last = said.objects_to_push
    assert all(north.push_object(run, said.session_id, key, contents[key]) for key in most)
    assert study.link.replies([name]) == {}
    assert north.push_object(run, said.session_id, last, contents[last])
    assert value_of(study.link.replies([name])[name]) == 1.0


def test_an_object_must_be_what_its_name_says(study: Study) -> None:
    """Other bytes under an announced hash are not taken, nor what was not announced, nor by another site."""
    north, east = study.connect("north"), study.connect("east")
    study.send("north")
    reply = Message(answer(), reply_to=received(north))
    said, contents = north.announce(reply)
    one, other = said.objects_to_push[:2]
    run = reply.metadata.run_id
    assert not north.push_object(run, said.session_id, one, contents[other])
    assert not north.push_object(run, said.session_id, "0" * 64, contents[one])
    assert not north.push_object(run, "another session", one, contents[one])
    assert not east.push_object(run, said.session_id, one, contents[one])
    assert north.push_object(run, said.session_id, one, contents[one])


def test_a_reply_that_broke_off_is_asked_for_again(study: Study) -> None:
    """A second announcement after a broken one makes the first copy lost, so that the site is sent another."""
    north = study.connect("north")
    name = study.send("north")
    message = received(north)
    north.announce(Message(answer(), reply_to=message))
    north.push(Message(answer(2.0), reply_to=message))
    assert study.link.replies([name]) == {name: None}
    again = study.send("north")
    assert all(north.push(Message(answer(2.0), reply_to=received(north))))
    assert value_of(study.link.replies([name, again])[again]) == 2.0


def test_the_same_announcement_twice_is_one_reply(study: Study) -> None:
    """A client whose connection broke during the answer may send everything again."""
    north = study.connect("north")
    name = study.send("north")
    reply = Message(answer(), reply_to=received(north))
    north.announce(reply)
    assert all(north.push(reply))
    assert value_of(study.link.replies([name])[name]) == 1.0


def test_a_site_cannot_answer_in_anothers_name(study: Study) -> None:
    """East's reply to north's request, under either name, in the envelope or inside, never counts as north's."""
    north, east = study.connect("north"), study.connect("east")
    to_north, to_east = study.send("north"), study.send("east")
    message, theirs = received(north), received(east)
    with pytest.raises(httpx.HTTPStatusError) as refused:  # sender north, sent by east
        east.push(Message(answer(9.0), reply_to=message))
    assert status_of(refused.value) == 400
    forged = Message(answer(9.0), reply_to=message)
    forged.metadata.__dict__["_src_node_id"] = east.node.node_id  # sender east, to what north was asked
    assert east.push(forged) == []
    inside = Message(answer(9.0), reply_to=theirs)
    honest = make_message(metadata=inside.metadata, content=inside.content)
    lie = Message(answer(9.0), reply_to=message)  # the object says north, the envelope says east
    with_lie = _announce_as(east, honest, lie)
    assert with_lie
    assert study.link.replies([to_north]) == {}
    reply = study.link.replies([to_east])[to_east]
    assert reply is not None
    assert reply.metadata.src_node_id == east.node.node_id
    assert reply.metadata.reply_to_message_id == to_east
    assert all(north.push(Message(answer(4.0), reply_to=message)))
    assert value_of(study.link.replies([to_north])[to_north]) == 4.0


def _announce_as(connection: Connection, envelope: Message, inside: InflatableObject) -> list[bool]:
    """Announce and send `inside`'s objects under `envelope`'s metadata."""
    objects = {key: one.deflate() for key, one in get_all_nested_objects(inside).items()}
    envelope.metadata.__dict__["_message_id"] = inside.object_id
    said = connection.client.PushMessages(
        fleet_pb2.PushMessagesRequest(
            node=connection.node,
            messages_list=[message_to_proto(remove_content_from_message(envelope))],
            message_object_trees=[get_object_tree(inside)],
        )
    )
    run = envelope.metadata.run_id
    return [connection.push_object(run, said.session_id, key, objects[key]) for key in said.objects_to_push]


def test_a_site_cannot_send_instructions(study: Study) -> None:
    """Flower would store a message without `reply_to` as an instruction to another site; here it is refused."""
    north, east = study.connect("north"), study.connect("east")
    study.send("east")
    metadata = received(east).metadata
    content = request_to_content(Request(HEADER, WEIGHTS))
    for sender in (1, east.node.node_id):
        order = Message(content, dst_node_id=north.node.node_id, message_type=MessageType.TRAIN)
        order.metadata.__dict__.update({"_src_node_id": sender, "_run_id": metadata.run_id})
        with pytest.raises(httpx.HTTPStatusError) as refused:
            east.announce(order)
        assert status_of(refused.value) == 400
    assert north.pull() is None


def test_a_site_reads_its_own_messages_only(study: Study) -> None:
    """Another site's update is not given out, even to one who knows its hash; nor can it be deleted by confirming."""
    north, east = study.connect("north"), study.connect("east")
    name = study.send("north")
    reply = Message(answer(7.0), reply_to=received(north))
    said, contents = north.announce(reply)
    run = reply.metadata.run_id
    for key in said.objects_to_push:
        assert north.push_object(run, said.session_id, key, contents[key])
        assert east.pull_object(run, key) == b""
    assert east.pull_object(run, name) == b""
    east.client.ConfirmMessageReceived(
        ConfirmMessageReceivedRequest(node=east.node, run_id=run, message_object_id=reply.metadata.message_id)
    )
    assert value_of(study.link.replies([name])[name]) == 7.0


def test_calls_about_another_run_are_refused(study: Study) -> None:
    """A site that was away while the server was restarted is told that the run is over, with Flower's code."""
    north = study.connect("north")
    study.send("north")
    reply = Message(answer(), reply_to=received(north))
    reply.metadata.__dict__["_run_id"] = reply.metadata.run_id ^ 1
    with pytest.raises(httpx.HTTPStatusError) as refused:
        north.push(reply)
    assert status_of(refused.value) == 403
    assert refused.value.response.json()["code"] == 2007


def test_a_reply_after_the_round_is_dropped(study: Study) -> None:
    """Once a round is cleared, its messages are gone: late replies are called done and kept nowhere."""
    north = study.connect("north")
    name = study.send("north")
    message = received(north)
    study.link.clear()
    assert north.push(Message(answer(), reply_to=message)) == []
    assert study.link.replies([name]) == {}
    assert len(study.link._store) == 0
    assert north.pull() is None


MADE_UP = {
    "one array under many names": lambda: RecordDict(
        {"update": ArrayRecord({f"{i}": Array(np.zeros(4000, np.float32)) for i in range(900)})}
    ),
    "more bytes than the request": lambda: RecordDict({"update": ArrayRecord([np.arange(1e6)])}),
}


@pytest.mark.parametrize("what", MADE_UP)
def test_a_reply_is_not_put_together_beyond_the_requests_size(what: str, study: Study) -> None:
    """What would grow in memory is an error, or never complete; the server goes on."""
    north = study.connect("north")
    name = study.send("north")
    north.push(Message(MADE_UP[what](), reply_to=received(north)))
    reply = study.link.replies([name]).get(name)
    assert reply is None or reply.has_error()
    assert httpx.get(f"{study.url}/health", trust_env=False).status_code == 200


def test_an_array_cannot_name_a_piece_a_million_times(study: Study) -> None:
    """A few bytes that would become gigabytes are an error before they are put together."""
    north = study.connect("north")
    name = study.send("north")
    reply = Message(RecordDict({"u": ArrayRecord({"a": Array(np.zeros(4000, np.float32))})}), reply_to=received(north))
    contents = {key: one.deflate() for key, one in get_all_nested_objects(reply).items()}
    path = [get_object_tree(reply)]
    while path[-1].children:
        path.append(path[-1].children[0])
    old = b""
    for depth, leaf in reversed(list(enumerate(path[:-1]))):
        content = contents.pop(leaf.object_id)
        if depth == len(path) - 2:
            head, body = content.split(b"\x00", 1)
            body = body.replace(b"[0]", json.dumps([0] * 1_000_000).encode())
            content = b" ".join([*head.split(b" ")[:-1], str(len(body)).encode()]) + b"\x00" + body
        else:
            content = content.replace(old, path[depth + 1].object_id.encode())
        old = leaf.object_id.encode()
        path[depth].object_id = hashlib.sha256(content).hexdigest()
        contents[path[depth].object_id] = content
    metadata = make_message(metadata=reply.metadata, content=RecordDict()).metadata
    metadata.__dict__["_message_id"] = path[0].object_id
    said = north.client.PushMessages(
        fleet_pb2.PushMessagesRequest(
            node=north.node,
            messages_list=[message_to_proto(make_message(metadata=metadata, content=RecordDict()))],
            message_object_trees=[path[0]],
        )
    )
    study.link._most = 10_000_000  # so that the description itself, a list of a million numbers, is let in
    assert all(north.push_object(metadata.run_id, said.session_id, k, contents[k]) for k in said.objects_to_push)
    found = study.link.replies([name])[name]
    assert found is not None
    assert found.has_error()


def test_a_record_of_many_numbers_is_not_put_together(study: Study) -> None:
    """Where a network is large, so are its replies; a record of numbers beside them is not, and becomes an error."""
    north = study.connect("north")
    name = study.send("north")
    study.link._most = 10_000_000  # as for a network of a million weights
    content = RecordDict({**answer(), "m": MetricRecord({str(number): number for number in range(30_000)})})
    assert all(north.push(Message(content, reply_to=received(north))))
    found = study.link.replies([name])[name]
    assert found is not None
    assert found.has_error()


def test_a_reply_has_no_more_objects_than_the_network_needs(study: Study) -> None:
    """A reply of fifty records is refused when it is announced, before anything of it is kept."""
    north = study.connect("north")
    name = study.send("north")
    message, kept = received(north), len(study.link._store)
    content = RecordDict({str(number): ConfigRecord({"n": number}) for number in range(50)})
    with pytest.raises(httpx.HTTPStatusError) as refused:
        north.push(Message(content, reply_to=message))
    assert status_of(refused.value) == 400
    assert len(study.link._store) == kept
    assert north.push(Message(answer(2.0), reply_to=message))
    assert value_of(study.link.replies([name])[name]) == 2.0


def test_an_error_reply_brings_no_text(study: Study) -> None:
    """Flower's clients send an exception's text; of an error nothing arrives but that it is one."""
    north = study.connect("north")
    name = study.send("north")
    north.push(Message(Error(code=2, reason="PATIENT-4711"), reply_to=received(north)))
    reply = study.link.replies([name])[name]
    assert reply is not None
    assert "PATIENT" not in repr(reply)
    assert reply.has_error()


def test_objects_that_are_no_message_are_an_error(study: Study) -> None:
    """A reply whose root is some other object of Flower's is not taken for a message."""
    north = study.connect("north")
    name = study.send("north")
    reply = Message(answer(), reply_to=received(north))
    assert _announce_as(north, reply, reply.content)
    found = study.link.replies([name])[name]
    assert found is not None
    assert found.has_error()


def test_a_body_has_a_limit(study: Study) -> None:
    """More bytes than Flower ever sends in one piece are refused, and an unknown key's body is not read at all."""
    known = {**PROTOBUF, **_signed(study, "north")}
    with httpx.Client(base_url=study.url, trust_env=False) as client:
        try:
            status = client.post("/v1/fleet/push-object", headers=known, content=b"x" * (LARGEST_BODY + 1)).status_code
        except httpx.WriteError:  # the server hung up in the middle, which is also a refusal
            status = 413
        assert status == 413
        assert client.post("/v1/fleet/push-object", headers=known, content=b"\xff").status_code == 400
        assert client.get("/health").status_code == 200


def _signed(study: Study, site: str) -> dict[str, str]:
    """The headers of a site's request."""
    seen: list[httpx.Request] = []
    connection = study.stranger(study.keys[site])
    connection.client._client.event_hooks["request"] = [seen.append]
    connection.activate()
    return {name: value for name, value in seen[-1].headers.items() if name.startswith("flwr")}


def test_a_waiting_site_hears_of_a_message_at_once(study: Study) -> None:
    """A poll is held open until there is a message: the site need not ask again."""
    north = study.connect("north")
    got: list[Message | None] = []
    polls = threading.Thread(target=lambda: got.append(north.pull()))
    polls.start()
    wait_until(lambda: bool(study.link._public._waiting.get(north.node.node_id)))
    study.send("north")
    polls.join(timeout=30)
    assert [message is not None for message in got] == [True]


def test_presence_follows_activation_and_polls(study: Study) -> None:
    """A site is online from its first poll to its goodbye; each activation is told apart; an empty poll keeps it."""
    assert {one.site: one.online for one in study.link.presence().values()} == {"north": False, "east": False}
    north = study.connect("north")
    assert north.pull() is None
    first = study.link.presence()[north.node.node_id]
    assert (first.online, first.site) == (True, "north")
    assert first.last_seen is not None
    assert north.pull() is None
    assert north.heartbeat()
    north.deactivate()
    assert not study.link.presence()[north.node.node_id].online
    assert north.pull() is None  # a poll that was under way does not bring it back
    assert not study.link.presence()[north.node.node_id].online
    number = north.node.node_id
    assert north.activate() == number
    assert north.pull() is None
    again = study.link.presence()[number]
    assert again.online
    assert again.activated != first.activated


def test_a_site_that_only_looks_in_is_not_online(study: Study) -> None:
    """Enrolling activates the key for a moment, to see that it is admitted: no round may be begun with that site."""
    north = study.connect("north")
    assert north.heartbeat()
    assert not study.link.presence()[north.node.node_id].online
    assert north.pull() is None
    assert study.link.presence()[north.node.node_id].online
    number = north.node.node_id
    north.deactivate()
    assert north.activate() == number  # anew, as enrolling again does
    assert not study.link.presence()[number].online


def test_the_first_poll_is_news(study: Study) -> None:
    """Whoever waits for sites hears of one when it asks for its first message, not a look later."""
    north = study.connect("north")
    study.link._news.clear()
    assert north.pull() is None
    assert study.link._news.is_set()


def test_the_roster_can_change_under_a_running_server(study: Study) -> None:
    """A new key gets in, a removed one is shut out at once, and one that comes back gets in again."""
    north = study.connect("north")
    south = generate()
    public = {site: key.public_key() for site, key in study.keys.items()}
    study.link.admit({"east": public["east"], "south": south.public_key()})
    assert {one.site for one in study.link.presence().values()} == {"east", "south"}
    with pytest.raises(httpx.HTTPStatusError) as refused:
        north.pull()
    assert status_of(refused.value) == 401
    study.stranger(south).activate()
    study.link.admit(public)
    assert study.connect("north").pull() is None
    assert {one.site: one.online for one in study.link.presence().values()} == {"north": True, "east": False}


def test_node_ids_survive_a_kill_and_messages_do_not(tmp_path: Path) -> None:
    """After a kill, on the same file, a site goes on with its number; what it was sent before is withdrawn."""
    keys = {"north": generate()}
    numbers: list[int] = []
    for _ in range(2):
        link = SuperLink(tmp_path / "superlink.db", ("127.0.0.1", 0), dict)
        link.start()
        link.admit({site: key.public_key() for site, key in keys.items()})
        study = Study(link, keys)
        (number,) = link.presence()
        connection = study.stranger(keys["north"])
        if numbers:
            assert _kept(link) == [0] * 8
            connection.node.node_id = number
            assert connection.pull() is None  # without activating again, which brings it online
            assert link.presence()[number].online
        else:
            connection.activate()
            study.send("north")
        numbers.append(number)
        connection.client.close()
        if len(numbers) == 1:  # as a kill does: nothing is withdrawn
            link._public.close()
            link.executor.shutdown()
        else:
            link.stop()
    assert numbers[0] == numbers[1]


def test_nothing_grows_from_round_to_round(study: Study) -> None:
    """After each round no message and no object is left, in memory or in the file."""
    grid = FleetGrid(study.link)
    with Hospital(study.address, study.keys["north"], lambda r: Reply(r.header, Status.OK, r.weights)):
        wait_until(lambda: any(one.online for one in study.link.presence().values()))
        for number in range(1, 6):
            content = request_to_content(Request(Header("5" * 64, code_digest(), number), WEIGHTS))
            asked = Message(content, dst_node_id=study.node("north"), message_type=MessageType.TRAIN)
            replies = grid.send_and_receive([asked], timeout=60.0)
            assert [value_of(reply) for reply in replies] == [1.0]
            assert _kept(study.link) == [0] * 8


def _kept(link: SuperLink) -> list[int]:
    """How many messages, replies, objects and notes of them the SuperLink holds."""
    state = link._do(lambda: [link._state.num_message_ins(), link._state.num_message_res()])
    memory: tuple[Sized, ...] = (link._copies, link._readable, link._arrivals, link._mail, link._lost)
    return [*state, len(link._store), *map(len, memory)]


def test_a_port_in_use_is_one_clear_line(study: Study, tmp_path: Path) -> None:
    """A second server on the same port says which, and what to change."""
    with pytest.raises(ConfigurationError, match=rf"cannot listen on 127.0.0.1:{study.link.port} .*server.yaml"):
        SuperLink(tmp_path / "other.db", ("127.0.0.1", study.link.port), dict).start()


def test_replies_can_be_anything_that_records_refuse(study: Study) -> None:
    """A reply with other keys reaches the strategy's checks as it is; the connection does not judge content."""
    north = study.connect("north")
    name = study.send("north")
    assert all(north.push(Message(RecordDict({"x": ConfigRecord({"y": 1})}), reply_to=received(north))))
    reply = study.link.replies([name])[name]
    assert reply is not None
    assert list(reply.content) == ["x"]


def test_the_first_key_that_a_request_names_counts(study: Study) -> None:
    """A key on the roster as a second header lets nobody in: who is authenticated is the first."""
    known = next(iter(study.link._headers))
    name = KEY_HEADER
    assert study.link.knows([(name, known), (name, b"other")])
    assert not study.link.knows([(name, b"other"), (name, known)])
    assert not study.link.knows([])
