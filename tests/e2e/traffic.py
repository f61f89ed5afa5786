"""What leaves a hospital, byte by byte: a recording end of TLS between client and server, and a decoder without mercy.

The recorder holds a certificate of the study's own authority, so a client takes it for the server; it passes
everything on and keeps what the client sent. The decoder accounts for every byte: what it cannot name, it refuses, and
what it has named, encoded again, must be what was sent. So nothing can hide beside the fields that a test looks at.
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2, recorddict_pb2
from flwr.supercore.inflatable.inflatable_object import get_object_head_values_from_object_content, get_object_id
from google.protobuf.message import Message as Protobuf  # type: ignore[import-untyped]  # no stubs are installed
from google.protobuf.unknown_fields import UnknownFieldSet  # type: ignore[import-untyped]  # no stubs are installed

BODIES: dict[str, type[Any]] = {
    "activate-node": fleet_pb2.ActivateNodeRequest,
    "deactivate-node": fleet_pb2.DeactivateNodeRequest,
    "send-node-heartbeat": heartbeat_pb2.SendNodeHeartbeatRequest,
    "pull-messages": fleet_pb2.PullMessagesRequest,
    "pull-object": message_pb2.PullObjectRequest,
    "confirm-message-received": message_pb2.ConfirmMessageReceivedRequest,
    "push-messages": fleet_pb2.PushMessagesRequest,
    "push-object": message_pb2.PushObjectRequest,
}
Fields = list[tuple[str, Any]]


class Recorder:
    """Stands between clients and the server on a port of its own; a context manager.

    Args:
        server: the server's port.
        certificate, key: a certificate for localhost that the clients trust.
        authority: the authority of the server's certificate.

    Attributes:
        parts: (connection, bytes) as they came from clients, decrypted.
        names: the server names that clients asked for in their TLS greeting, in plain sight.
    """

    def __init__(self, server: int, certificate: Path, key: Path, authority: Path) -> None:
        self.parts: list[tuple[int, bytes]] = []
        self.names: list[str | None] = []
        self._server, self._up = server, ssl.create_default_context(cafile=authority)
        self._down = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._down.load_cert_chain(certificate, key)
        self._down.sni_callback = lambda _socket, name, _context: self.names.append(name)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        opening = asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self._down)
        self._listener = asyncio.run_coroutine_threadsafe(opening, self._loop).result(30)
        self.port = int(self._listener.sockets[0].getsockname()[1])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()

    def sent(self, *, whole: bool = True) -> list[Sent]:
        """Every request that was sent, in the order in which they were complete.

        Args:
            whole: no byte may be left over; without it, a request may be on its way.
        """
        found: list[Sent] = []
        open_: dict[int, bytes] = {}
        for connection, data in list(self.parts):
            requests, open_[connection] = requests_in(open_.get(connection, b"") + data)
            found += requests
        assert not whole or not any(open_.values()), "bytes that are no request"
        return found

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        number = len(self._tasks)
        try:
            up_reader, up_writer = await asyncio.open_connection(
                "127.0.0.1", self._server, ssl=self._up, server_hostname="localhost"
            )
        except OSError:  # the server is away
            writer.close()
            return
        await asyncio.gather(
            _pump(reader, up_writer, lambda data: self.parts.append((number, data))),
            _pump(up_reader, writer, lambda _data: None),
        )

    async def _close(self) -> None:
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, keep: Callable[[bytes], None]) -> None:
    try:
        while data := await reader.read(65536):
            keep(data)
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


@dataclass(frozen=True)
class Sent:
    """One HTTP request as it left: `GET /health` or `POST /v1/fleet/...`, its headers in order, its body."""

    line: str
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def route(self) -> str:
        """The last part of the path."""
        return self.line.rsplit("/", 1)[1]


def requests_in(stream: bytes) -> tuple[list[Sent], bytes]:
    """The requests of one connection, and what is left over, the beginning of another. Anything else is an error."""
    found: list[Sent] = []
    while b"\r\n\r\n" in stream:
        head, _, rest = stream.partition(b"\r\n\r\n")
        first, *lines = head.decode("ascii").split("\r\n")
        line, version = first.rsplit(" ", 1)
        assert version == "HTTP/1.1"
        headers = [(name.lower(), value) for name, value in (one.split(": ", 1) for one in lines)]
        assert len({name for name, _ in headers}) == len(headers), f"{line}: a header twice"
        length = int(dict(headers).get("content-length", "0"))
        if len(rest) < length:
            break
        found.append(Sent(line, headers, rest[:length]))
        stream = rest[length:]
    return found, stream


def body_of(sent: Sent) -> Any:
    """The request's protobuf; nothing in it is unknown, and encoded again it is what was sent."""
    message = BODIES[sent.route].FromString(sent.body)
    assert message.SerializeToString(deterministic=True) == sent.body, f"{sent.line}: more than its fields say"
    return message


def fields_in(message: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Every field that a protobuf holds, by its path: `node.node_id`. A tree's branches have one name."""
    assert len(UnknownFieldSet(message)) == 0, f"unknown fields in {type(message).__name__}"
    for descriptor, value in message.ListFields():
        repeated = not isinstance(value, Protobuf | str | bytes | int | float)
        for one in value if repeated else [value]:
            if not isinstance(one, Protobuf):
                yield before + descriptor.name, one
            elif descriptor.message_type is message.DESCRIPTOR:  # a tree's children
                yield from fields_in(one, before)
            else:
                yield from fields_in(one, f"{before}{descriptor.name}.")


@dataclass
class Pushed:
    """One reply as it left: the announcement, and Flower's objects by their sha256, as they were pushed."""

    announcement: Any
    objects: dict[str, bytes] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The message's id, the name of its first object."""
        return str(self.announcement.messages_list[0].metadata.message_id)

    def fields(self) -> dict[str, Fields]:
        """Kind of object -> its fields; records by their own names. Every object is reached and named once."""
        found: dict[str, Fields] = {}
        reached: set[str] = set()

        def part(name: str, kind: str) -> tuple[list[str], bytes]:
            reached.add(name)
            content = self.objects[name]
            said, children, length = get_object_head_values_from_object_content(content)
            body = content.split(b"\0", 1)[1]
            assert (said, length) == (kind, len(body))
            assert content == b"%s %s %d\0" % (kind.encode(), ",".join(children).encode(), length) + body
            return children, body

        (content,), body = part(self.name, "Message")
        message = message_pb2.Message.FromString(body)
        assert message.SerializeToString(deterministic=True) == body
        found["Message"] = list(fields_in(message))
        _, body = part(content, "RecordDict")
        records: dict[str, str] = json.loads(body)
        assert json.dumps(records).encode() == body
        found["RecordDict"] = sorted(records.items())
        _, body = part(records["reply"], "ConfigRecord")
        found["reply"] = _values(body)
        arrays = next((name for name in ("update", "metrics") if name in records), "")
        for name, array in _names(part(records[arrays], "ArrayRecord")[1]) if arrays else ():
            chunks, body = part(array, "Array")
            described = json.loads(body)
            assert json.dumps(described).encode() == body
            found.setdefault(arrays, []).append((name, array))
            found.setdefault("Array", []).extend(described.items())
            data = b"".join(part(chunks[index], "ArrayChunk")[1] for index in described["arraychunk_ids"])
            found.setdefault("ArrayChunk", []).append((name, _numbers(data, described)))
        assert reached == set(self.objects), "objects that belong to nothing"
        return found


def _values(body: bytes) -> Fields:
    record = recorddict_pb2.ConfigRecord.FromString(body)
    assert record.SerializeToString() == body
    assert len(UnknownFieldSet(record)) == 0
    values = []
    for item in record.items:
        ((_, value),) = item.value.ListFields()
        values.append((item.key, value))
    return values


def _names(body: bytes) -> Fields:
    names: dict[str, str] = json.loads(body)
    assert json.dumps(names).encode() == body
    return list(names.items())


def _numbers(data: bytes, described: dict[str, Any]) -> np.ndarray[Any, Any]:
    """The numbers of a piece, which are all that it holds."""
    array: np.ndarray[Any, Any] = np.load(BytesIO(data), allow_pickle=False)
    again = BytesIO()
    np.save(again, array, allow_pickle=False)
    assert again.getvalue() == data
    assert (str(array.dtype), list(array.shape)) == (described["dtype"], described["shape"])
    return array


def replies_in(sent: Iterable[Sent]) -> list[Pushed]:
    """The replies among the requests, in order. Every object was announced, and is what its sha256 says."""
    found: list[Pushed] = []
    owed: set[str] = set()
    for one in sent:
        if one.route == "push-messages":
            assert not owed, "the reply before was cut off"
            found.append(Pushed(body_of(one)))
            owed = {value for name, value in fields_in(found[-1].announcement) if name.endswith("object_id")}
        elif one.route == "push-object":
            body = body_of(one)
            assert get_object_id(body.object_content) == body.object_id
            owed.remove(body.object_id)
            found[-1].objects[body.object_id] = body.object_content
    return found


def seen_in(sent: Iterable[Sent]) -> dict[str, set[str]]:
    """All that was sent, by name: `header` -> names; a request's first line -> fields; an object's kind -> fields."""
    sent = list(sent)
    seen: dict[str, set[str]] = {"header": set()}
    for one in sent:
        seen["header"] |= {name for name, _ in one.headers}
        seen.setdefault(one.line, set())
        if one.body:
            seen[one.line] |= {name for name, _ in fields_in(body_of(one))}
    for reply in replies_in(sent):
        for kind, fields in reply.fields().items():
            names = {"NAME"} if kind in ("update", "ArrayChunk") else {name for name, _ in fields}
            seen.setdefault(kind, set()).update(names)
    return seen


def documented_in(page: str) -> dict[str, set[str]]:
    """What a page lists, in the form of `seen_in`: tables whose first two columns are `in` and `field`."""
    listed: dict[str, set[str]] = {}
    inside = False
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            inside = False
        elif cells[:2] == ["in", "field"]:
            inside = True
        elif inside and not set(line) <= set("|-: "):
            for place in re.findall("`([^`]+)`", cells[0]):
                listed.setdefault(place, set()).update(re.findall("`([^`]+)`", cells[1]))
    return listed
