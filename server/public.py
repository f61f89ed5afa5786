"""What the public port answers: a table of fleet routes, `GET /health`, and 404 for everything else.

An allow-list in front of Flower instead of Flower's own application behind a filter: the routes that start runs,
hand out code or show documentation are not refused here, they do not exist in this process. Written on bare ASGI,
because each of Flower's eight middlewares costs more than a whole answer here, and a round asks a hundred times.

Refusals are written to the log, with method, path and sender (`Refusals`); an operator sees who knocks.

A site that asks for messages and has none is held for `HOLD` seconds, so that a round reaches it at once and an idle
site costs one request a second. Nothing of a body is read before its sender's key is known to be on the roster.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import uvicorn

from common.errors import ConfigurationError

log = logging.getLogger("wardround.server")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

HOLD = 1.0  # seconds; a corporate proxy closes a silent connection after 30 or more
REFUSALS_LINES, REFUSALS_SECONDS = 60, 60.0
LARGEST_BODY = 8 * 1024 * 1024  # Flower cuts arrays into objects of 5 MiB


@dataclass(frozen=True)
class Tls:
    """Files of the server's certificate and its key."""

    certificate: Path
    key: Path


@dataclass(frozen=True)
class Answer:
    """A finished response."""

    status: int
    body: bytes
    media: str = "application/json"


@dataclass(frozen=True)
class Call:
    """A request whose sender proved its key: the node it speaks for, and what it asks."""

    path: str
    node: int
    request: Any


class Fleet(Protocol):
    """The fleet routes, as the port needs them. `check` and `perform` are called in the one thread of `executor`."""

    routes: ClassVar[frozenset[str]]
    pull: ClassVar[str]

    @property
    def executor(self) -> Executor:
        """The thread that owns the state."""

    def knows(self, headers: list[tuple[bytes, bytes]]) -> bool:
        """Whether the headers name a key on the roster."""

    def check(self, path: str, headers: list[tuple[bytes, bytes]], body: bytes) -> Call | Answer:
        """Parse and authenticate, or refuse."""

    def perform(self, call: Call) -> Answer:
        """Answer an authenticated call."""

    def has_mail(self, node: int) -> bool:
        """Whether a message waits for the node."""


class PublicPort:
    """ASGI application of the public port, and the thread that serves it.

    Args:
        fleet: the fleet routes.
        health: public facts for `GET /health`.
    """

    def __init__(self, fleet: Fleet, health: Callable[[], Mapping[str, object]]) -> None:
        self._fleet, self._health = fleet, health
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: dict[int, set[asyncio.Event]] = {}
        self._closed = False
        self._refusals = Refusals()

    def open(self, host: str, port: int, tls: Tls | None) -> int:
        """Serve in a thread and return the port's number. Raises ConfigurationError: it is not free."""
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            self._listener = socket.create_server((host, port), family=family, backlog=2048)
        except OSError as error:
            raise ConfigurationError(
                f"cannot listen on {host}:{port} ({error.strerror or error}); end the process that does, or change "
                "`host` or `port` in server.yaml"
            ) from None
        config = uvicorn.Config(
            self,
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=2,
            ssl_certfile=tls.certificate if tls else None,
            ssl_keyfile=str(tls.key) if tls else None,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, args=([self._listener],), name="public-port", daemon=True
        )
        self._thread.start()
        return int(self._listener.getsockname()[1])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; what is not HTTP is closed without an answer."""
        if scope["type"] != "http":
            return
        self._loop = asyncio.get_running_loop()
        try:
            answer = await self._answer(scope, receive)
        except Exception as error:  # a request must not be able to say in the log more than where it broke
            log.error("a request to %s failed with %s", str(scope["path"])[:60], type(error).__name__)
            answer = _error(500, "internal error")
        if answer is None:  # whoever asked has gone
            return
        if answer.status >= 400:
            self._refusals.note(scope, answer.status)
        headers = [(b"content-type", answer.media.encode()), (b"content-length", str(len(answer.body)).encode())]
        if answer.status in (401, 413):
            headers.append((b"connection", b"close"))  # the rest of the body is not read
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": answer.body})

    async def _answer(self, scope: Scope, receive: Receive) -> Answer | None:
        path, method = scope["path"], scope["method"]
        if path == "/health" and method in ("GET", "HEAD"):
            body = json.dumps(dict(self._health())).encode()
            return Answer(200, body if method == "GET" else b"")
        if path not in self._fleet.routes or method != "POST":
            return _error(404, "not here")
        raw: list[tuple[bytes, bytes]] = list(scope["headers"])
        run = asyncio.get_running_loop().run_in_executor
        if not self._fleet.knows(raw):
            return _error(401, "no key of the roster")
        sent = await _read(receive)
        if sent is None:
            return _error(413, f"more than {LARGEST_BODY} bytes")
        call = await run(self._fleet.executor, self._fleet.check, path, raw, sent)
        if isinstance(call, Answer):
            return call
        if path == self._fleet.pull and not await self._mail(call.node, receive):
            return None
        return await run(self._fleet.executor, self._fleet.perform, call)

    async def _mail(self, node: int, receive: Receive) -> bool:
        """Hold until there is a message, `HOLD` is over or the port closes. False: the site hung up."""
        if self._closed or self._fleet.has_mail(node):
            return True
        news = asyncio.Event()
        self._waiting.setdefault(node, set()).add(news)
        tasks = [asyncio.ensure_future(news.wait()), asyncio.ensure_future(_hung_up(receive))]
        try:
            await asyncio.wait(tasks, timeout=HOLD, return_when=asyncio.FIRST_COMPLETED)
            return not tasks[1].done()
        finally:
            for task in tasks:
                task.cancel()
            self._waiting[node].discard(news)

    def notify(self, node: int) -> None:
        """Wake the node's held requests. From any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake, node)

    def close(self) -> None:
        """Let every held request go and end the thread. From another thread."""
        self._closed = True
        for node in list(self._waiting):
            self.notify(node)
        self._server.should_exit = True
        self._thread.join(timeout=10)
        self._listener.close()

    def _wake(self, node: int) -> None:
        for news in self._waiting.get(node, ()):
            news.set()


class Refusals:
    """Writes refused requests to the log, so many lines a minute: whoever knocks a million times fills no disk.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until, self._lines, self._untold = -math.inf, 0, 0

    def note(self, scope: Scope, status: int) -> None:
        """One more. Method and path are the sender's own choice: quoted, they cannot pass for a line of the log."""
        now = self._clock()
        if now >= self._until:
            if self._untold:
                log.info("refused: %d more requests before the next line", self._untold)
            self._until, self._lines, self._untold = now + REFUSALS_SECONDS, 0, 0
        self._lines += 1
        if self._lines > REFUSALS_LINES:
            self._untold += 1
            return
        method, path = (ascii(str(scope[key])[:100]) for key in ("method", "path"))
        sender = (scope.get("client") or ("unknown",))[0]
        log.info("refused: %s %s from %s, status %d", method, path, sender, status)


def _error(status: int, detail: str) -> Answer:
    return Answer(status, json.dumps({"detail": detail}).encode())


async def _read(receive: Receive) -> bytes | None:
    """The request's body, or None once it is too large."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b""
        part = message.get("body", b"")
        size += len(part)
        if size > LARGEST_BODY:
            return None
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
