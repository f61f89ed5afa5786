"""What crosses the wire: all of it comes back, and whatever is not as agreed is a WireError that echoes nothing."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import WireError
from common.models.network import build_network
from common.records import (
    WIRE_VERSION,
    Header,
    Reply,
    Request,
    Status,
    check_like,
    reply_from_message,
    reply_to_content,
    request_from_message,
    request_to_content,
)
from common.training import load_state, state_of
from common.weights import Weights, digest_of, from_bytes, to_bytes
from tests.small import message, reply_message, small_study

TERMS = Header("a" * 64, "b" * 64, 3)
SECRET = "PATIENT-4711"
examples = settings(deadline=None, max_examples=150)


def weights(seed: int = 0) -> Weights:
    random = np.random.default_rng(seed)
    return {
        "b.weight": random.normal(size=(3, 2)).astype(np.float32),
        "a": np.ones((1, 1), np.float32),
        "c": np.zeros(0, np.float32),
    }


def same(one: Weights, other: Weights) -> bool:
    return sorted(one) == list(other) and all(
        np.array_equal(one[n], other[n]) and one[n].dtype == other[n].dtype and one[n].shape == other[n].shape
        for n in one
    )


def raw(data: bytes, *, stype: str = "numpy.ndarray") -> Array:
    return Array(dtype="float32", shape=(1,), stype=stype, data=data)


def npy(array: Any, *, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


def header(shape: str) -> bytes:
    """An .npy file that claims `shape` and holds six numbers."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(24)


class Bomb:
    """Unpickling it is a test failure."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return pytest.fail, ("a pickle was executed",)


def zipped() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, x=np.zeros(2, np.float32))
    return buffer.getvalue()


def empty_zip() -> bytes:
    buffer = io.BytesIO()
    zipfile.ZipFile(buffer, "w").close()
    return buffer.getvalue()


UNREADABLE = {
    "nothing": raw(b""),
    "text": raw(SECRET.encode()),
    "pickle": raw(pickle.dumps(Bomb())),
    "object array": raw(npy(np.array([Bomb()], dtype=object), allow_pickle=True)),
    "text array": raw(npy(np.array([SECRET]))),
    "truncated": raw(npy(np.zeros(9, np.float32))[:-3]),
    "zip": raw(zipped()),
    "empty zip": raw(empty_zip()),
    "broken zip": raw(b"PK\x03\x04" + SECRET.encode()),
    "larger than memory": raw(header("(10000000000000,)")),
    "larger than a C long": raw(header("(99999999999999999999999,)")),
    "negative": raw(header("(-1,)")),
    "unbalanced": raw(header("((1,")),
    "nested": raw(header("(" * 3000 + ")" * 3000)),
    "not a literal": raw(header("__import__('os').abort()")),
    "float64": Array(np.zeros(2)),
    "float16": Array(np.zeros(2, np.float16)),
    "int32": Array(np.zeros(2, np.int32)),
    "big endian": Array(np.zeros(2, ">f4")),
    "torch": raw(npy(np.zeros(1, np.float32)), stype="torch.Tensor"),
}


def good_request() -> RecordDict:
    return request_to_content(Request(TERMS, weights(), "c" * 64))


def good_reply() -> RecordDict:
    return reply_to_content(Reply(TERMS, Status.OK, weights(), "c" * 64))


def decode_request(content: RecordDict) -> Request:
    return request_from_message(message(content))


def decode_reply(content: RecordDict) -> Reply:
    return reply_from_message(reply_message(content))


DIRECTIONS = [
    pytest.param(good_request, decode_request, "request", "weights", id="request"),
    pytest.param(good_reply, decode_reply, "reply", "update", id="reply"),
]
both = pytest.mark.parametrize(("good", "decode", "terms_key", "arrays_key"), DIRECTIONS)
Good = Callable[[], RecordDict]
Decode = Callable[[RecordDict], Request | Reply]


def refused(decode: Decode, content: RecordDict) -> None:
    """It must raise WireError, one line that repeats nothing of what was sent."""
    with pytest.raises(WireError) as caught:
        decode(content)
    text = str(caught.value)
    assert SECRET not in text
    assert "\n" not in text
    assert caught.value.__cause__ is None


def test_a_request_comes_back_as_it_was() -> None:
    """Header and weights survive the wire: names, shapes, bits."""
    found = decode_request(good_request())
    assert found.header == TERMS
    assert same(weights(), found.weights)


@pytest.mark.parametrize("status", list(Status))
def test_a_reply_comes_back_as_it_was(status: Status) -> None:
    """Every status survives the wire, with an update exactly if it is OK."""
    update = weights(1) if status is Status.OK else None
    found = decode_reply(reply_to_content(Reply(TERMS, status, update)))
    assert (found.header, found.status) == (TERMS, status)
    if update is None:
        assert found.update is None
    else:
        assert found.update is not None
        assert same(update, found.update)


def test_nothing_else_is_on_the_wire() -> None:
    """The content of both messages is exactly what the module's docstring lists."""
    asked, answered = good_request(), good_reply()
    assert set(asked) == {"weights", "request"}
    assert set(answered) == {"reply", "update"}
    same_four = {"wire": WIRE_VERSION, "study": "a" * 64, "code": "b" * 64, "round": 3}
    assert dict(asked["request"]) == {**same_four, "head": "c" * 64}
    assert dict(answered["reply"]) == {**same_four, "head": "c" * 64, "status": "OK"}


@pytest.mark.parametrize("head", ["", "d" * 64])
def test_the_head_of_the_ledger_comes_back_as_it_was(head: str) -> None:
    """A head, or none, survives the wire both ways."""
    assert decode_request(request_to_content(Request(TERMS, weights(), head))).head == head
    assert decode_reply(reply_to_content(Reply(TERMS, Status.BUDGET, head=head))).head == head


@both
@pytest.mark.parametrize("head", ["d" * 63, "D" * 64, "d" * 64 + "\n", SECRET, "g" * 64])
def test_a_head_that_is_none_is_refused(good: Good, decode: Decode, terms_key: str, arrays_key: str, head: str) -> None:
    """Whatever is not 64 hexadecimal digits is a WireError."""
    content = good()
    record = content[terms_key]
    assert isinstance(record, ConfigRecord)
    record["head"] = head
    refused(decode, content)


@both
@examples
@given(data=st.data())
def test_missing_and_extra_keys_are_refused(
    good: Good, decode: Decode, terms_key: str, arrays_key: str, data: st.DataObject
) -> None:
    """Any key too few or too many, in the content or in its terms, is a WireError."""
    content = good()
    record = content[terms_key]
    assert isinstance(record, ConfigRecord)
    where = data.draw(st.sampled_from(["content", "terms"]))
    if data.draw(st.booleans()):
        name = data.draw(st.text(max_size=8).map(lambda text: f"{SECRET}{text}"))
        if where == "content":
            records: list[ConfigRecord | MetricRecord | ArrayRecord] = [ConfigRecord(), MetricRecord(), ArrayRecord()]
            content[name] = data.draw(st.sampled_from(records))
        else:
            scalars: list[Any] = [1, "x", b"x", 1.0, True]
            record[name] = data.draw(st.sampled_from(scalars))
    elif where == "content":
        del content[data.draw(st.sampled_from(sorted(content)))]
    else:
        del record[data.draw(st.sampled_from(sorted(record)))]
    refused(decode, content)


@both
@examples
@given(data=st.data())
def test_values_of_another_type_are_refused(
    good: Good, decode: Decode, terms_key: str, arrays_key: str, data: st.DataObject
) -> None:
    """A term of another type than agreed, `True` for 1 included, is a WireError."""
    content = good()
    record = content[terms_key]
    assert isinstance(record, ConfigRecord)
    name = data.draw(st.sampled_from(sorted(record)))
    other: list[Any] = [True, 1.0, SECRET.encode(), [1], [SECRET], [SECRET, "y"], []]
    record[name] = data.draw(st.sampled_from([*other, 1 if isinstance(record[name], str) else SECRET]))
    refused(decode, content)


@both
def test_records_of_another_kind_are_refused(good: Good, decode: Decode, terms_key: str, arrays_key: str) -> None:
    """A header that is metrics or arrays, and arrays that are terms, are a WireError."""
    for key in (terms_key, arrays_key):
        for other in (MetricRecord({"wire": 1}), ConfigRecord({"a": SECRET}), ArrayRecord([np.zeros(1, np.float32)])):
            content = good()
            if type(content[key]) is not type(other):
                content[key] = other
                refused(decode, content)


@both
@pytest.mark.parametrize("kind", UNREADABLE)
def test_arrays_that_are_not_float32_are_refused(
    good: Good, decode: Decode, terms_key: str, arrays_key: str, kind: str
) -> None:
    """Pickles, archives, broken headers, impossible sizes and other dtypes are a WireError; nothing is executed."""
    content = good()
    content[arrays_key] = ArrayRecord(OrderedDict({SECRET: UNREADABLE[kind]}))
    refused(decode, content)


@examples
@given(position=st.integers(0, 127), byte=st.integers(0, 255), length=st.integers(0, 160))
def test_a_damaged_array_is_read_or_refused(position: int, byte: int, length: int) -> None:
    """Whatever happens to an array's bytes on the way, decoding gives float32 arrays or a WireError."""
    data = bytearray(npy(np.arange(6, dtype=np.float32)))
    data[position] = byte
    content = good_request()
    content["weights"] = ArrayRecord(OrderedDict({"a": raw(bytes(data[:length]))}))
    try:
        found = decode_request(content).weights
    except WireError:
        return
    assert [array.dtype for array in found.values()] == [np.float32]


@pytest.mark.parametrize(
    ("status", "update"),
    [(Status.OK, False), (Status.BUDGET, True), (Status.LOCAL_FAILURE, True), (SECRET, True), (SECRET, False)],
)
def test_an_update_and_only_an_update_is_ok(status: str, update: bool) -> None:
    """OK without update, an update with another status, and a status outside the closed list are a WireError."""
    content = good_reply()
    record = content["reply"]
    assert isinstance(record, ConfigRecord)
    record["status"] = str(status)
    if not update:
        del content["update"]
    refused(decode_reply, content)


@pytest.mark.parametrize("kind", [MessageType.QUERY, "train.default", "train.other", "evaluate.other"])
def test_only_train_and_evaluate_messages_are_requests(kind: str) -> None:
    """A message of any other type is a WireError, whatever its content."""
    with pytest.raises(WireError, match="message type"):
        request_from_message(message(good_request(), kind=kind))


def test_an_error_reply_is_refused_without_its_text() -> None:
    """Flower's error replies carry text of the other side's exceptions: it is not repeated."""
    answer = Message(Error(code=2, reason=SECRET), reply_to=message(good_request()))
    with pytest.raises(WireError, match="error code 2") as caught:
        reply_from_message(answer)
    assert SECRET not in str(caught.value)


def test_a_message_with_neither_content_nor_error_is_refused() -> None:
    """A message can arrive empty; that is a WireError in both directions."""
    empty = message(good_request())
    empty.__dict__["_content"] = None
    for decode in (request_from_message, reply_from_message):
        with pytest.raises(WireError):
            decode(empty)


def test_weights_like_the_network_pass() -> None:
    """The decoded weights of a network pass the check against that network."""
    state = state_of(build_network(small_study()))
    check_like(decode_request(request_to_content(Request(TERMS, state))).weights, state, "weights")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_weights_are_refused(value: float) -> None:
    """One NaN or infinity anywhere is a WireError."""
    bad = {name: array.copy() for name, array in sorted(weights().items())}
    bad["b.weight"][2, 1] = value
    with pytest.raises(WireError, match=r"update: `b\.weight` has non-finite values"):
        check_like(bad, weights(), "update")


def _renamed(w: Weights) -> Weights:
    return {SECRET if name == "c" else name: array for name, array in w.items()}


@pytest.mark.parametrize(
    "change",
    [
        _renamed,
        lambda w: {**w, SECRET: w["a"]},
        lambda w: {"a": w["a"]},
        lambda w: {},
        lambda w: {**w, "a": w["a"].ravel()},
        lambda w: {**w, "b.weight": w["b.weight"].T},
        lambda w: {**w, "a": w["a"].astype(np.float64)},
    ],
)
def test_weights_unlike_the_network_are_refused(change: Callable[[Weights], Any]) -> None:
    """Another name, shape, dtype or number of arrays is a WireError that repeats only what was expected."""
    bad = dict(sorted(change(weights()).items()))
    with pytest.raises(WireError) as caught:
        check_like(bad, weights(), "weights")
    assert SECRET not in str(caught.value)


def test_bytes_are_a_function_of_the_weights() -> None:
    """Equal weights give equal bytes and digests, in whatever order or memory layout; other weights do not."""
    one = weights()
    other = {name: np.asfortranarray(one[name]) for name in sorted(one, reverse=True)}
    assert to_bytes(one) == to_bytes(other)
    assert digest_of(one) == digest_of(other)
    changed = {**one, "a": np.nextafter(one["a"], np.float32(2))}
    assert digest_of(changed) != digest_of(one)


def test_stored_bytes_come_back_ready_for_use() -> None:
    """`from_bytes` returns what was stored, in arrays that may be written to, as torch demands of what it shares."""
    state = state_of(build_network(small_study(), 1))
    found = from_bytes(to_bytes(state))
    assert same(state, found)
    assert all(array.flags.writeable for array in found.values())
    network = build_network(small_study(), 2)
    load_state(network, found)
    assert all(torch.equal(p, torch.from_numpy(state[name])) for name, p in network.named_parameters())
