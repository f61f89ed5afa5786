"""A thread that tells the server that this site is there, while the main thread waits for training or the network."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Self

from client.network import NetworkError

SECONDS = 20.0  # the server calls a site offline after a minute without one
AFTER_FAILURE = 5.0


class Heartbeat:
    """Calls `beat` every 20 seconds until the end of the block; its failures surface in `check`, not in the thread."""

    def __init__(
        self, beat: Callable[[], None], seconds: float = SECONDS, *, after_failure: float = AFTER_FAILURE
    ) -> None:
        self._beat, self._seconds, self._after_failure = beat, seconds, after_failure
        self._trouble: NetworkError | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def check(self) -> None:
        """Raise the newest beat's NetworkError, if it had one."""
        if self._trouble is not None:
            raise self._trouble

    def _run(self) -> None:
        wait = self._seconds
        while not self._ended.wait(wait):
            try:
                self._beat()
                self._trouble, wait = None, self._seconds
            except NetworkError as error:
                self._trouble, wait = error, self._after_failure
            except Exception as error:  # or this thread would end, and the site with it
                self._trouble = NetworkError(f"a sign of life failed with {type(error).__name__}; connecting anew")
                wait = self._after_failure

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._ended.set()
        self._thread.join(timeout=1)
