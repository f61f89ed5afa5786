"""The connection: one server, one kind of message, no more bytes than the study's weights have."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_object_id

from client.fleet import ActivationError, Fleet, Incoming, _RefusedError, bodies, rehearsal
from client.network import OBJECT_BYTES, ContestedError, Limit, NetworkError
from common.keys import generate
from common.provenance import code_digest
from common.records import (
    Header,
    Reply,
    Request,
    Status,
    reply_from_message,
    reply_to_content,
    request_from_message,
    request_to_content,
)
from common.weights import Weights
from tests.client.coordinator import NODE, Authority, Coordinator, Offer
from tests.client.hospitals import with_key, write_site, write_study

WEIGHTS: Weights = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "big": np.arange(2_000_000, dtype=np.float32),  # two pieces of Flower's
    "zeros": np.zeros(5, np.float32),
}
LIMIT = Limit.of(array.nbytes for array in WEIGHTS.values())
REQUEST = Request(Header("s" * 64, code_digest(), 3), WEIGHTS, "f" * 64)


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    with Coordinator(write_study(tmp_path), Authority(tmp_path / "ca").context()) as server:
        yield server


@pytest.fixture
def fleet(tmp_path: Path, coordinator: Coordinator) -> Iterator[Fleet]:
    server = {"address": f"localhost:{coordinator.port}", "ca": "ca/ca.crt"}
    site, _, key = with_key(write_site(tmp_path, tmp_path, server))
    coordinator.admit(key.public_key())
    with Fleet(site.server, key) as connection:
        yield connection


def offered(coordinator: Coordinator, fleet: Fleet, offer: Offer, limit: Limit = LIMIT) -> Incoming:
    """What the site makes of an offer."""
    fleet.activate()
    coordinator.send(offer)
    incoming = fleet.pull(limit)
    assert incoming is not None
    return incoming


def test_a_request_and_its_reply_arrive_as_they_were_sent(coordinator: Coordinator, fleet: Fleet) -> None:
    """Weights of several pieces come in, an update goes out, and both are to the last bit what the other side sent."""
    incoming = offered(coordinator, fleet, coordinator.offer(request_to_content(REQUEST)))
    assert incoming.fault is None
    found = request_from_message(incoming.message)
    assert (found.header, found.head) == (REQUEST.header, REQUEST.head)
    assert all((found.weights[name] == WEIGHTS[name]).all() for name in WEIGHTS)
    reply = Reply(REQUEST.header, Status.OK, WEIGHTS, "e" * 64)
    assert fleet.push(Message(reply_to_content(reply), reply_to=incoming.message), incoming.message)
    sent = reply_from_message(coordinator.replies.get(timeout=10))
    assert (sent.header, sent.status, sent.head) == (reply.header, reply.status, reply.head)
    assert sent.update is not None
    assert all((sent.update[name] == WEIGHTS[name]).all() for name in WEIGHTS)


def test_a_question_for_metrics_and_its_answer_arrive_as_they_were_sent(coordinator: Coordinator, fleet: Fleet) -> None:
    """EVALUATE comes in within the same limit, and an answer of its own form goes out."""
    offer = coordinator.offer(request_to_content(REQUEST), MessageType.EVALUATE)
    incoming = offered(coordinator, fleet, offer)
    assert incoming.fault is None
    assert incoming.message.metadata.message_type == MessageType.EVALUATE
    assert request_from_message(incoming.message).header == REQUEST.header
    told = {"histogram": np.arange(8, dtype=np.float32).reshape(2, 4)}
    content = reply_to_content(Reply(REQUEST.header, Status.OK, told), MessageType.EVALUATE)
    assert fleet.push(Message(content, reply_to=incoming.message), incoming.message)
    sent = coordinator.replies.get(timeout=10)
    assert set(sent.content) == {"reply", "metrics"}
    found = reply_from_message(sent).update
    assert found is not None
    assert np.array_equal(found["histogram"], told["histogram"])


def test_a_reply_tells_neither_this_machines_clock_nor_how_long_training_took(
    coordinator: Coordinator, fleet: Fleet
) -> None:
    """The reply's times are the request's: nothing that leaves depends on when the site finished."""
    runtimes: list[float] = []
    usual = Coordinator.push

    def push(request: Any) -> Any:
        runtimes.extend(request.clientapp_runtime_list)
        return usual(coordinator, request)

    coordinator.answers["push-messages"] = push
    incoming = offered(coordinator, fleet, coordinator.offer(request_to_content(REQUEST)))
    fleet.push(
        Message(reply_to_content(Reply(REQUEST.header, Status.BUDGET)), reply_to=incoming.message), incoming.message
    )
    sent, asked = coordinator.replies.get(timeout=10).metadata, incoming.message.metadata
    assert (sent.created_at, sent.ttl, sent.reply_to_message_id) == (asked.created_at, asked.ttl, asked.message_id)
    assert runtimes == [0.0]


def test_no_message_is_none(fleet: Fleet) -> None:
    """A question without a message waiting is answered with None."""
    fleet.activate()
    assert fleet.pull(LIMIT) is None


def test_a_message_that_was_cleared_away_is_none(coordinator: Coordinator, fleet: Fleet) -> None:
    """Announced, but its round ended before its objects were fetched: nothing to answer, and nothing is refused."""
    offer = coordinator.offer(request_to_content(REQUEST))
    offer.objects.clear()
    fleet.activate()
    coordinator.send(offer)
    assert fleet.pull(LIMIT) is None


def test_only_a_few_routes_are_ever_asked_for(coordinator: Coordinator, fleet: Fleet) -> None:
    """Neither an app bundle nor a run's description is fetched, and nothing is registered."""
    test_a_request_and_its_reply_arrive_as_they_were_sent(coordinator, fleet)
    fleet.heartbeat()
    assert {call.removeprefix("/v1/fleet/") for call in coordinator.calls} == {
        *("activate-node", "pull-messages", "pull-object", "confirm-message-received"),
        *("push-messages", "push-object", "send-node-heartbeat"),
    }


@pytest.mark.parametrize("kind", [MessageType.QUERY, "train.other", "evaluate.other", "system"])
def test_another_kind_of_message_is_not_even_fetched(coordinator: Coordinator, fleet: Fleet, kind: str) -> None:
    """What is neither TRAIN nor EVALUATE comes without content, with a fault, and none of its objects is asked for."""
    offer = coordinator.offer(request_to_content(REQUEST), MessageType.QUERY)
    offer.message.metadata.__dict__["_message_type"] = kind
    incoming = offered(coordinator, fleet, offer)
    assert incoming.fault == "message type is not train or evaluate"
    assert len(incoming.message.content) == 0
    assert "/v1/fleet/pull-object" not in coordinator.calls


def test_the_limit_lets_the_studys_weights_through_and_no_more(coordinator: Coordinator, fleet: Fleet) -> None:
    """The limit exceeds what an honest request has, but not by a twentieth for a network of some size."""
    offer = coordinator.offer(request_to_content(REQUEST))
    total = sum(len(content) for content in offer.objects.values())
    assert total <= LIMIT.nbytes <= 1.05 * total
    assert len(offer.objects) <= LIMIT.objects


def larger() -> RecordDict:
    return request_to_content(Request(REQUEST.header, {**WEIGHTS, "a": np.arange(50_000, dtype=np.float32)}))


def many_arrays() -> RecordDict:
    more = {f"x{i}": np.full(1, i, np.float32) for i in range(40)}
    return request_to_content(Request(REQUEST.header, {**WEIGHTS, **more}))


def one_array_many_names() -> RecordDict:
    content = request_to_content(REQUEST)
    weights = content["weights"]
    assert isinstance(weights, ArrayRecord)
    for number in range(20):
        weights[f"copy{number}"] = weights["big"]
    return content


@pytest.mark.parametrize(
    ("content", "fault"),
    [(larger, "bytes"), (many_arrays, "objects"), (one_array_many_names, "under many names")],
)
def test_a_message_larger_than_the_studys_network_is_refused(
    coordinator: Coordinator, fleet: Fleet, content: Callable[[], RecordDict], fault: str
) -> None:
    """More bytes, more objects, or one array under twenty names: a fault instead of a full memory."""
    incoming = offered(coordinator, fleet, coordinator.offer(content()))
    assert incoming.fault is not None
    assert fault in incoming.fault
    assert len(incoming.message.content) == 0


def replaced(offer: Offer, old: str, content: bytes) -> Offer:
    """The offer with one object's bytes, and so its name, exchanged; whoever refers to it follows."""
    new = get_object_id(content)
    objects = {
        (new if name == old else name): (content if name == old else data) for name, data in offer.objects.items()
    }
    for name, data in list(objects.items()):
        if name != new and old.encode() in data:
            return replaced(
                Offer(offer.message, renamed(offer.tree, old, new), objects),
                name,
                data.replace(old.encode(), new.encode()),
            )
    if offer.message.metadata.message_id == old:
        offer.message.metadata.__dict__["_message_id"] = new
    return Offer(offer.message, renamed(offer.tree, old, new), objects)


def renamed(tree: ObjectTree, old: str, new: str) -> ObjectTree:
    """The tree with one name exchanged."""
    return ObjectTree(
        object_id=new if tree.object_id == old else tree.object_id,
        children=[renamed(child, old, new) for child in tree.children],
    )


def test_a_piece_repeated_a_thousand_times_is_refused(coordinator: Coordinator, fleet: Fleet) -> None:
    """An array that names its 5 MB piece a thousand times is counted before it is put together."""
    offer = coordinator.offer(request_to_content(REQUEST))
    name, content = next((n, c) for n, c in offer.objects.items() if c.startswith(b"Array ") and b"[0, 1]" in c)
    head, body = content.split(b"\x00", 1)
    metadata = json.loads(body) | {"arraychunk_ids": [0, 1] * 500}
    body = json.dumps(metadata).encode()
    kind, children, _ = head.split(b" ")
    offer = replaced(offer, name, b"%s %s %d\x00" % (kind, children, len(body)) + body)
    incoming = offered(coordinator, fleet, offer)
    assert incoming.fault is not None
    assert "arrays of more than" in incoming.fault


@pytest.mark.parametrize(
    "garbage", [b"", b"nonsense", b"Array  3\x00{", b"Message  2\x00ab", b"RecordDict " + b"0" * 64 + b" 2\x00{}"]
)
def test_garbage_is_a_fault(coordinator: Coordinator, fleet: Fleet, garbage: bytes) -> None:
    """Objects that are no message are a fault, whatever Flower raises on them."""
    offer = coordinator.offer(RecordDict({"request": ConfigRecord({"x": 1})}))
    record = next(name for name, content in offer.objects.items() if content.startswith(b"ConfigRecord"))
    incoming = offered(coordinator, fleet, replaced(offer, record, garbage))
    assert incoming.fault is not None


def test_an_object_that_is_not_what_its_name_says_is_a_fault(coordinator: Coordinator, fleet: Fleet) -> None:
    """Objects are named by their sha256, and that is checked."""
    offer = coordinator.offer(request_to_content(REQUEST))
    name = next(iter(offer.objects))
    offer.objects[name] += b"x"
    incoming = offered(coordinator, fleet, offer)
    assert incoming.fault == "an object's content is not what its sha256 says"


def test_an_answer_beyond_its_bound_is_not_read(coordinator: Coordinator, fleet: Fleet) -> None:
    """An object larger than Flower's pieces, and any other answer of more than a megabyte, end at their bound."""
    offer = coordinator.offer(request_to_content(REQUEST))
    offer.objects[next(iter(offer.objects))] = bytes(OBJECT_BYTES)
    incoming = offered(coordinator, fleet, offer)
    assert incoming.fault is not None
    assert "more than" in incoming.fault
    coordinator.spoil = lambda _path, status, headers, body: (status, headers, bytes(2_000_000))
    with pytest.raises(NetworkError, match="more than 1000000 bytes"):
        fleet.heartbeat()


def test_a_compressed_answer_is_not_unpacked(coordinator: Coordinator, fleet: Fleet) -> None:
    """A kilobyte could unpack to a gigabyte: none is asked for, and none is taken."""
    coordinator.spoil = lambda _path, status, headers, body: (
        status,
        {**headers, "content-encoding": "gzip"},
        gzip.compress(body),
    )
    with pytest.raises(NetworkError, match="compressed"):
        fleet.health()


def test_redirects_are_not_followed(coordinator: Coordinator, fleet: Fleet, tmp_path: Path) -> None:
    """A server cannot send the client to another address."""
    with Coordinator(write_study(tmp_path / "other")) as other:
        elsewhere = {"location": f"http://127.0.0.1:{other.port}/health"}
        coordinator.spoil = lambda _path, _status, headers, body: (307, {**headers, **elsewhere}, body)
        with pytest.raises(NetworkError):
            fleet.health()
        with pytest.raises(NetworkError):
            fleet.activate()
        assert other.calls == []


def test_a_key_that_is_not_on_the_roster_is_told_what_to_do(coordinator: Coordinator, fleet: Fleet) -> None:
    """An unknown key is one line: send it to the coordinator."""
    coordinator.roster.clear()
    coordinator.admit(generate().public_key())
    with pytest.raises(ActivationError, match="not on the roster"):
        fleet.activate()


def test_a_site_that_crashed_comes_back_at_once(coordinator: Coordinator, fleet: Fleet) -> None:
    """A session that looks online is ended with the number of before; without it the server would refuse."""
    node = fleet.activate()
    assert node == NODE
    with pytest.raises(ActivationError, match="within the last minute"):
        fleet.activate()
    assert fleet.activate(previous=node) == NODE


def test_the_end_of_a_connection_is_a_goodbye(coordinator: Coordinator, fleet: Fleet) -> None:
    """Closing takes the site offline at once, and only if it was online."""
    fleet.close()
    assert "/v1/fleet/deactivate-node" not in coordinator.calls


def test_a_lost_session_is_noticed(coordinator: Coordinator, fleet: Fleet) -> None:
    """A heartbeat that the server does not recognise is a NetworkError: the service then connects anew."""
    fleet.activate()
    coordinator.online.clear()
    with pytest.raises(NetworkError, match="no longer knows this site"):
        fleet.heartbeat()


@pytest.mark.parametrize(
    ("status", "body"), [(403, b'{"code": 2007, "detail": "over"}'), (400, b"{}"), (404, b"[" * 50_000)]
)
def test_a_reply_that_is_not_wanted_is_dropped(
    coordinator: Coordinator, fleet: Fleet, status: int, body: bytes
) -> None:
    """The run is over, or the server no longer knows the sender: no failure, and nothing to send again for ever."""
    incoming = offered(coordinator, fleet, coordinator.offer(request_to_content(REQUEST)))
    coordinator.answers["push-messages"] = lambda _request: (status, body)
    reply = Message(reply_to_content(Reply(REQUEST.header, Status.BUDGET)), reply_to=incoming.message)
    assert not fleet.push(reply, incoming.message)


@pytest.mark.parametrize("status", [401, 429, 500, 503])
def test_a_reply_that_cannot_be_taken_now_is_a_network_error(
    coordinator: Coordinator, fleet: Fleet, status: int
) -> None:
    """A server that is not ready, or a proxy in between, gets the reply later."""
    incoming = offered(coordinator, fleet, coordinator.offer(request_to_content(REQUEST)))
    coordinator.answers["push-messages"] = lambda _request: (status, b"<html>")
    reply = Message(reply_to_content(Reply(REQUEST.header, Status.BUDGET)), reply_to=incoming.message)
    with pytest.raises(NetworkError, match=f"HTTP status {status}"):
        fleet.push(reply, incoming.message)


@pytest.mark.parametrize("route", ["pull-messages", "send-node-heartbeat", "activate-node", "push-messages"])
def test_a_contested_key_is_told_apart_from_every_other_refusal(
    coordinator: Coordinator, fleet: Fleet, route: str
) -> None:
    """The server's word for it is ContestedError, in every call; no goodbye is said."""
    calls: dict[str, Callable[[], object]] = {
        "pull-messages": lambda: fleet.pull(LIMIT),
        "send-node-heartbeat": fleet.heartbeat,
        "activate-node": fleet.activate,
        "push-messages": lambda: fleet.push(Message(RecordDict(), reply_to=asked), asked),
    }
    asked = rehearsal(RecordDict(), 7)
    fleet.activate()
    coordinator.answers[route] = lambda _request: (409, b'{"detail": "contested"}')
    with pytest.raises(ContestedError, match="call the coordinator"):
        calls[route]()
    assert not fleet.online


def test_another_conflict_is_a_network_error(coordinator: Coordinator, fleet: Fleet) -> None:
    """Status 409 with another word, as a proxy may say it, is tried again like any failure."""
    fleet.activate()
    coordinator.answers["send-node-heartbeat"] = lambda _request: (409, b'{"detail": "something else"}')
    with pytest.raises(NetworkError):
        fleet.heartbeat()


def test_a_dry_runs_bodies_are_what_would_be_sent(coordinator: Coordinator, fleet: Fleet) -> None:
    """`bodies` and `push` make the same requests, byte for byte, but for the session's number."""
    incoming = offered(coordinator, fleet, coordinator.offer(request_to_content(REQUEST)))
    content = reply_to_content(Reply(REQUEST.header, Status.OK, WEIGHTS))
    said: list[tuple[str, bytes]] = []

    def push(request: Any) -> Any:
        said.append(("push-messages", request.SerializeToString(deterministic=True)))
        return Coordinator.push(coordinator, request)

    def push_object(request: Any) -> Any:
        answer = Coordinator.push_object(coordinator, request)
        request.session_id = ""
        said.append(("push-object", request.SerializeToString(deterministic=True)))
        return answer

    coordinator.answers |= {"push-messages": push, "push-object": push_object}
    fleet.push(Message(content, reply_to=incoming.message), incoming.message)
    expected = bodies(Message(content, reply_to=incoming.message), incoming.message, NODE)
    assert sorted(said) == sorted((route.removeprefix("/v1/fleet/"), body) for route, _, body in expected)


def test_a_rehearsal_is_a_request(coordinator: Coordinator) -> None:
    """What a dry run asks is decoded like what a server asks."""
    assert request_from_message(rehearsal(request_to_content(REQUEST), 2)).header == REQUEST.header


@pytest.mark.parametrize("charset", ["hex", "base64", "rot13", "undefined", "idna", "no-such"])
def test_the_charset_of_an_error_is_not_believed(charset: str) -> None:
    """Some of Python's codecs are none of text; an error that names one is an error like any other."""
    response = httpx.Response(500, headers={"content-type": f"text/plain; charset={charset}"}, content=b"\xff[" * 9)
    assert "HTTP status 500" in str(_RefusedError("localhost:1", response))


@pytest.mark.parametrize("error", [AssertionError, TypeError, UnicodeError, LookupError])
def test_whatever_fails_while_asking_is_a_network_error(fleet: Fleet, error: type[Exception]) -> None:
    """An exception that nobody foresaw ends the connection, not the client; its text is not repeated."""

    def ask() -> None:
        raise error("what the server said")

    with pytest.raises(NetworkError, match=error.__name__) as caught:
        fleet._ask(ask)
    assert "what the server said" not in str(caught.value)
