"""The process that trains, seen from the one that holds the connection; and that process itself.

Records, ledger, torch and weights live in a child. The parent has none of them, so a child that the system kills for
its memory, or that ends in any other way, is noticed at once, answered with LOCAL_FAILURE and replaced, while the
site stays online. The child is spawned, not forked: a fork of a process with threads can hang, and Windows has none.

What the child says goes over the pipe: log lines of ours, and one answer per message. Its standard output and error
go nowhere, because the last words of a library that fails may quote a record.

A child outlives its parent by no more than a moment: two processes on one ledger would be worse than a lost attempt.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client.stopping import held_back, ignore
from common.errors import WardroundError

if TYPE_CHECKING:
    from flwr.app import Message

    from common.privacy.randomness import Randomness

    RandomnessOf = Callable[[int, int], Randomness]

log = logging.getLogger("wardround.client")


class TrainerError(WardroundError):
    """The training process could not open the site: one line with what to do."""


@dataclass(frozen=True)
class Ready:
    """The site is open.

    Attributes:
        study: digest of its terms.
        rounds: how many it has.
        arrays: size in bytes of each array of its weights.
    """

    study: str
    rounds: int
    arrays: tuple[int, ...]


@dataclass(frozen=True)
class _Failed:
    text: str


@dataclass(frozen=True)
class _Last:
    """The child's last answer: it has ended, and the next message needs a new one."""

    answer: Any


@dataclass(frozen=True)
class _Line:
    level: int
    text: str


class Trainer:
    """A child process that opens the site of `site_file` and answers messages.

    Args:
        site_file: the hospital's own file.
        randomness: (round, attempt number) -> source of sampling and noise, picklable; tests pass one without noise.
            There is no other way to set it.
    """

    def __init__(self, site_file: Path, randomness: RandomnessOf | None = None) -> None:
        self._site_file, self._randomness = site_file, randomness
        self._process: Any = None
        self._pipe: Connection | None = None
        self._training = False
        self._hearing = False  # in the middle of a word: after a signal the rest of it cannot be told from the next

    @property
    def pid(self) -> int | None:
        """The child's process id, if there is one."""
        return self._process.pid if self._process is not None else None

    def start(self) -> Ready:
        """Start the child and wait until the site is open. Raises TrainerError."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self._site_file, self._randomness), daemon=True)
        with held_back():  # no signal between the start of a process and the moment that somebody knows of it
            process.start()
            self._process = process
        theirs.close()
        answer = self._receive()
        if isinstance(answer, Ready):
            return answer
        self.stop()
        raise TrainerError(
            answer.text
            if isinstance(answer, _Failed)
            else "the training process ended while it opened the records; it may need more memory"
        )

    def answer(self, message: Message, node: int) -> Message | None:
        """The site's reply, or None if there is none because the child failed or ended."""
        try:
            if self._process is not None and not self._process.is_alive():  # killed since its last answer
                log.error("the training process ended %s; a new one is started", self._cause())
                self.stop()
            if self._process is None:
                self.start()
            assert self._pipe is not None
            self._pipe.send((message, node))
            self._training = True
            answer = self._receive()
        except TrainerError as error:
            log.error("%s", error)
            return None
        except OSError:
            answer = None
        self._training = False
        if isinstance(answer, _Last):
            answer = answer.answer
            self.stop()
        if answer is None:
            log.error("the training process ended %s; the next message starts a new one", self._cause())
            self.stop()
            return None
        if isinstance(answer, _Failed):
            log.error("%s", answer.text)
            return None
        reply: Message = answer
        return reply

    def stop(self, grace: float = 0.0) -> None:
        """End the child. One that is training may have `grace` seconds to store what it has paid for."""
        if self._process is None:
            return
        try:
            if self._training and not self._hearing and grace > 0:
                log.info("waiting up to %.0f s for the round in training to be stored", grace)
                self._receive(grace)
        finally:
            process, self._process = self._process, None
            self._training = self._hearing = False
            if self._pipe is not None:
                self._pipe.close()
            process.kill()
            process.join()
            process.close()

    def _receive(self, seconds: float | None = None) -> Any:
        """The child's next word that is no log line, or None if it has ended, or said nothing for so long."""
        assert self._pipe is not None
        while True:
            if self._pipe not in wait([self._pipe, self._process.sentinel], seconds):
                return None
            self._hearing = True
            try:
                said = self._pipe.recv()
            except (EOFError, OSError):
                return None
            self._hearing = False
            if not isinstance(said, _Line):
                return said
            log.log(said.level, "%s", said.text)

    def _cause(self) -> str:
        self._process.join(5)
        code = self._process.exitcode
        if code is not None and code < 0:
            return f"by signal {-code}" + (", often for want of memory" if code == -9 else "")
        return f"with status {code}"


def _work(pipe: Connection, site_file: Path, randomness: RandomnessOf | None) -> None:
    """The child: open the site, answer messages until the parent closes the pipe."""
    ignore()
    _end_with_parent()
    _silence()
    logger = logging.getLogger("wardround")
    logger.addHandler(_ToParent(pipe))
    logger.setLevel(logging.INFO)
    logger.propagate = False
    with contextlib.suppress(EOFError, OSError):  # the parent has gone
        try:
            from client.hospital import Hospital

            hospital = Hospital.open(site_file, randomness)
        except WardroundError as error:
            pipe.send(_Failed(str(error)))
            return
        except Exception as error:
            pipe.send(_Failed(f"the site could not be opened: {_place(error)}"))
            return
        pipe.send(hospital.ready)
        while True:
            message, node = pipe.recv()
            if hospital.outdated:  # who opted out today is left out of today's round
                logger.info("the file of opt-outs has changed; the records are read again")
                try:
                    hospital = Hospital.open(site_file, randomness)
                except WardroundError as error:
                    pipe.send(_Last(_Failed(str(error))))
                    return
                except Exception as error:
                    pipe.send(_Last(_Failed(f"the site could not be opened: {_place(error)}")))
                    return
            try:
                answer: Any = hospital.answer(message, node)
            except WardroundError as error:  # of the ledger: a file and a remedy
                answer = _Failed(str(error))
            except Exception as error:
                answer = _Failed(f"a message could not be answered: {_place(error)}")
            pipe.send(answer)


class _ToParent(logging.Handler):
    """Log lines as text over the pipe; an exception's own text and traceback are left behind."""

    def __init__(self, pipe: Connection) -> None:
        super().__init__()
        self._pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send(_Line(record.levelno, record.getMessage()))


def _place(error: Exception) -> str:
    """Class and place of a failure: its text may hold a patient's value."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{where}"


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _silence() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    os.close(nowhere)
