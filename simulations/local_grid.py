"""Flower's `Grid` in this process: the same Strategy and ClientApp as in deployment, without network or Ray.

With `workers` above 1 the sites are dealt over that many processes of one thread each, this one among them: it would
wait otherwise, and each process costs seconds of imports and a copy of Python's libraries. A site stays in its process,
so its ledger does too. The result is the same to the last bit: a site's numbers depend on its records, the weights
and its own randomness, and the average is taken in order of site name.

Other processes are spawned, not forked: a fork of a process with torch threads can hang, and Windows has none.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import threading
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, NoReturn, Self

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from client.app import build_app
from client.site import Site
from common.errors import WardroundError

RUN_ID, SERVER_NODE = 1, 1
OpenSite = Callable[[str], Site]


class LocalGrid(Grid):
    """Virtual hospitals behind Flower's Grid interface. Use as a context manager.

    Args:
        open_site: site name -> Site; called once per site, in the process that will run it; picklable if workers > 1.
        sites: names; node ids are 2, 3, .. in this order.
        workers: processes, this one among them.
    """

    def __init__(self, open_site: OpenSite, sites: Iterable[str], *, workers: int = 1) -> None:
        names = list(sites)
        self.roster: Mapping[int, str] = dict(enumerate(names, start=SERVER_NODE + 1))
        self._numbers = itertools.count(1)
        self._identify(SERVER_NODE)
        count = max(1, min(workers, len(names)))
        here, *others = [dict(list(self.roster.items())[i::count]) for i in range(count)]
        self._runners: list[_Here | _Worker] = [_Worker(open_site, part) for part in others]
        try:
            self._runners.insert(0, _Here(open_site, here))  # while the others import
        except BaseException:
            self.close()
            raise

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Deliver every message and return all replies, in the order of the messages. `timeout` does not apply.

        Raises:
            WardroundError: a site could not be opened, or its process ended; the other sites' replies are dropped.
        """
        del timeout
        sent = list(messages)
        for message in sent:
            message.metadata.__dict__["_message_id"] = f"local-{next(self._numbers)}"  # the SuperLink's part
        for runner in self._runners:
            runner.start([m for m in sent if m.metadata.dst_node_id in runner.roster])
        replies: dict[int, Message] = {}
        failures: list[WardroundError] = []
        for runner in self._runners:  # all of them: an answer left in its pipe would be taken for the next round's
            try:
                replies |= {reply.metadata.src_node_id: reply for reply in runner.finish()}
            except WardroundError as error:
                failures.append(error)
        self._identify(SERVER_NODE)
        if failures:
            raise failures[0]
        return [replies[m.metadata.dst_node_id] for m in sent]

    def get_node_ids(self) -> list[int]:
        """All virtual hospitals; they are always online."""
        return list(self.roster)

    @staticmethod
    def _identify(node: int) -> None:
        """Flower stamps messages with a process-wide identity; here one process is the server and every site."""
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, node, 0

    def close(self) -> None:
        """End the worker processes."""
        for runner in self._runners:
            runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _unused(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise NotImplementedError("the local grid delivers whole rounds: use send_and_receive")

    set_run = create_message = push_messages = pull_messages = _unused
    run = property(_unused)


class _Here:
    """Runs its sites in this process."""

    def __init__(self, open_site: OpenSite, roster: Mapping[int, str]) -> None:
        self.roster = roster
        sites = {name: open_site(name) for name in roster.values()}
        self._app: ClientApp = build_app(lambda context: sites[str(context.node_config["site"])])
        self._contexts = {
            node: Context(run_id=RUN_ID, node_id=node, node_config={"site": name}, state=RecordDict(), run_config={})
            for node, name in roster.items()
        }
        self._waiting: list[Message] = []

    def start(self, messages: list[Message]) -> None:
        """Take a round's messages."""
        self._waiting = messages

    def finish(self) -> list[Message]:
        """Run them and return the replies."""
        replies = []
        for message in self._waiting:
            node = message.metadata.dst_node_id
            LocalGrid._identify(node)
            replies.append(self._app(message=message, context=self._contexts[node]))
        return replies

    def close(self) -> None:
        """Nothing to end."""


class _Worker:
    """Runs its sites in a process of its own, one thread, over a pipe."""

    def __init__(self, open_site: OpenSite, roster: Mapping[int, str]) -> None:
        self.roster = roster
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, open_site, dict(roster)), daemon=True)
        self._process.start()
        theirs.close()

    def start(self, messages: list[Message]) -> None:
        """Send a round's messages to the process, in a thread: more than a pipe holds waits for it to import torch."""
        self._sending = threading.Thread(target=self._send, args=(messages,))
        self._sending.start()

    def _send(self, messages: list[Message]) -> None:
        with contextlib.suppress(OSError):  # it has ended: finish says so
            self._pipe.send(messages)

    def finish(self) -> list[Message]:
        """Wait for its replies. Raises what stopped it."""
        self._sending.join()
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError):
            raise WardroundError("a worker process ended; it may have run out of memory: use fewer workers") from None
        if isinstance(answer, WardroundError):
            raise answer
        return list(answer)

    def close(self) -> None:
        """End the process; it stops at the closed pipe."""
        self._pipe.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _work(pipe: Connection, open_site: OpenSite, roster: Mapping[int, str]) -> None:
    torch.set_num_threads(1)
    runner: _Here | None = None
    while True:
        try:
            messages = pipe.recv()
        except EOFError:
            return
        try:
            runner = runner or _Here(open_site, roster)
            runner.start(messages)
            answer: list[Message] | WardroundError = runner.finish()
        except WardroundError as error:
            answer = error
        except Exception as error:  # its text may hold a patient's value
            answer = WardroundError(
                f"a worker process failed with {type(error).__name__}; run with one worker to see where"
            )
        try:
            pipe.send(answer)
        except OSError:  # the grid was closed in the middle of a round
            return
