"""Ending on purpose: SIGTERM and SIGINT become one exception that unwinds whatever is going on.

An exception rather than a flag that loops look at: it also ends a connection attempt, a wait of a minute and an import
that takes seconds. What must be whole on disk is written by rename or by the ledger's own transactions, so no place
is a bad one to be interrupted.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop(BaseException):
    """The process was asked to end. Not an Exception: no handler for failures may swallow it.

    Attributes:
        again: it was asked before, so somebody does not want to wait.
    """

    def __init__(self, *, again: bool = False) -> None:
        super().__init__()
        self.again = again


@contextmanager
def stoppable() -> Iterator[None]:
    """Within it, the first SIGTERM or SIGINT raises Stop; each further one raises it again, to cut short the tidying.

    Only the main thread receives signals; in another one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        again, asked = asked, True
        raise Stop(again=again)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held_back() -> Iterator[None]:
    """Signals wait until the end of the block; a process started within begins with them waiting, too (POSIX)."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore() -> None:
    """For a child: Ctrl-C reaches every process of a terminal, but when to end is the parent's decision."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
