"""Study terms <-> Flower records: the only place that knows the names on the wire.

Server to site, message type TRAIN: `weights` (ArrayRecord) and `request` (ConfigRecord: wire, study, code, round,
and `head`, the newest head of the site's ledger that this server has seen, or nothing). Site to server: `reply`
(ConfigRecord: the same four, `status`, a word from `Status`, and `head`, its ledger's head now), and `update`
(ArrayRecord) if and only if the status is OK. Message type EVALUATE asks for metrics of the weights after the study's
last round, in the same form; the answer's arrays are then called `metrics`. No other key, no number that was computed
from patients but the noised update or metrics. A head is a salted hash: it tells a server nothing, and a site whether
its ledger was put back to an older one.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

from common.errors import WireError
from common.weights import Weights

WIRE_VERSION = 1
ANSWERED_BY = {MessageType.TRAIN: "update", MessageType.EVALUATE: "metrics"}  # what may be asked, and what is answered
INSTANCE_HEADER = "wardround-instance"  # of every request: 32 hex digits, others for each process of a client
CONTESTED = "contested"  # with HTTP status 409: two processes use this site's key
HEAD = re.compile("(?:[0-9a-f]{64})?")


class Status(StrEnum):
    """Everything a site can say beside an update. Closed: each data-dependent failure is LOCAL_FAILURE."""

    OK = "OK"
    VERSION = "VERSION"  # another wire version or other code
    STUDY = "STUDY"  # another study than the one pinned here
    MALFORMED = "MALFORMED"  # keys, shapes or types not as agreed
    POLICY = "POLICY"  # the site's own limits refuse the study
    BUDGET = "BUDGET"  # the ledger refuses
    ROLLBACK = "ROLLBACK"  # the ledger is older than what the server has seen of it
    LOCAL_FAILURE = "LOCAL_FAILURE"


@dataclass(frozen=True)
class Header:
    """The four values that open every message."""

    study: str
    code: str
    round_number: int
    wire: int = WIRE_VERSION

    def record(self) -> dict[str, int | str]:
        """As plain values for a ConfigRecord."""
        return {"wire": self.wire, "study": self.study, "code": self.code, "round": self.round_number}


@dataclass(frozen=True)
class Request:
    """A round's request: train from these weights, or tell their metrics, which the message's type says.

    `head`: see the module docstring; "" if there is none.
    """

    header: Header
    weights: Weights
    head: str = ""


@dataclass(frozen=True)
class Reply:
    """A site's answer: an update, or metrics in its place, if and only if `status` is OK."""

    header: Header
    status: Status
    update: Weights | None = None
    head: str = ""


def request_to_content(request: Request) -> RecordDict:
    """The content of a TRAIN or EVALUATE message."""
    record = ConfigRecord({**request.header.record(), "head": request.head})
    return RecordDict({"weights": _arrays(request.weights), "request": record})


def request_from_message(message: Message) -> Request:
    """Decode a TRAIN or EVALUATE message. Raises WireError without echoing what was sent."""
    if message.metadata.message_type not in ANSWERED_BY:
        raise WireError(f"message type must be {' or '.join(ANSWERED_BY)}")
    content = _content(message, {"weights", "request"})
    terms, rest = _terms(content, "request", {"head"})
    return Request(terms, _weights(content, "weights"), _head(rest))


def reply_to_content(reply: Reply, kind: str = MessageType.TRAIN) -> RecordDict:
    """The content of a site's answer to a message of type `kind`."""
    record = ConfigRecord({**reply.header.record(), "status": reply.status.value, "head": reply.head})
    if reply.update is None:
        return RecordDict({"reply": record})
    return RecordDict({"reply": record, ANSWERED_BY[kind]: _arrays(reply.update)})


def reply_from_message(message: Message) -> Reply:
    """Decode a site's answer. Raises WireError without echoing what was sent."""
    if message.has_error():
        raise WireError(f"the connection reported error code {message.error.code} instead of a reply")
    arrays = ANSWERED_BY.get(message.metadata.message_type, "no arrays")
    answered = message.has_content() and arrays in message.content
    content = _content(message, {"reply", arrays} if answered else {"reply"})
    terms, rest = _terms(content, "reply", {"status", "head"})
    if rest["status"] not in set(Status):
        raise WireError("status is not a word of the closed list")
    status = Status(str(rest["status"]))
    if (status is Status.OK) != answered:
        raise WireError(f"an answer must hold `{arrays}` with status OK, and only then")
    return Reply(terms, status, _weights(content, arrays) if answered else None, _head(rest))


def check_like(weights: Weights, expected: Weights, what: str) -> None:
    """Raise WireError unless `weights` has the names, shapes and dtype of `expected` and finite values."""
    if weights.keys() != expected.keys():
        raise WireError(f"{what}: names of arrays differ from the study's network")
    for name, array in weights.items():
        if (array.shape, array.dtype) != (expected[name].shape, expected[name].dtype):
            raise WireError(f"{what}: `{name}` differs from {expected[name].dtype} of shape {expected[name].shape}")
        if not np.isfinite(array).all():
            raise WireError(f"{what}: `{name}` has non-finite values")


def _arrays(weights: Weights) -> ArrayRecord:
    return ArrayRecord(OrderedDict((name, Array(weights[name])) for name in sorted(weights)))


def _content(message: Message, keys: set[str]) -> RecordDict:
    if not message.has_content() or set(message.content) != keys:
        raise WireError(f"content must hold exactly {sorted(keys)}")
    return message.content


def _terms(content: RecordDict, key: str, more: set[str]) -> tuple[Header, dict[str, object]]:
    record = content[key]
    types = {"wire": int, "study": str, "code": str, "round": int} | dict.fromkeys(more, str)
    if not isinstance(record, ConfigRecord) or set(record) != set(types):
        raise WireError(f"`{key}` must hold exactly {sorted(types)}")
    if any(type(record[name]) is not kind for name, kind in types.items()):
        raise WireError(f"`{key}` holds a value of the wrong type")
    values = dict(record)
    terms = Header(str(values["study"]), str(values["code"]), int(str(values["round"])), int(str(values["wire"])))
    return terms, {name: values[name] for name in more}


def _head(rest: dict[str, object]) -> str:
    head = str(rest["head"])
    if not HEAD.fullmatch(head):
        raise WireError("`head` must be 64 hexadecimal digits or empty")
    return head


def _weights(content: RecordDict, key: str) -> Weights:
    record = content[key]
    if not isinstance(record, ArrayRecord):
        raise WireError(f"`{key}` must be arrays")
    out: Weights = {}
    for name in sorted(record):
        if record[name].stype != "numpy.ndarray":
            raise WireError(f"`{key}` must hold numpy arrays")
        try:
            array = record[name].numpy()
        except Exception as error:  # np.load refuses pickles, and raises anything on garbage: TokenError, MemoryError
            raise WireError(f"`{key}` holds an array that cannot be read ({type(error).__name__})") from None
        if not isinstance(array, np.ndarray) or array.dtype != np.float32:  # a zip file is read as something else
            raise WireError(f"`{key}` must hold float32 arrays")
        out[name] = array
    return out
