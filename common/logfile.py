"""The log file of a program that runs for months: private, bounded, and no reason to stop when its disk is full.

`logging` would answer each line that cannot be written with a traceback on standard error, and the close of such a file
with an exception. Here it is said once, and the program goes on: what must be durable is in the ledger or checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path


class LogFile(RotatingFileHandler):
    """A rotating file with mode 0600, whatever the process's umask.

    Args:
        path: the newest file; older ones get a number.
        nbytes: size of each.
        older: how many older ones are kept.
    """

    def __init__(self, path: Path, nbytes: int, older: int) -> None:
        self._said = False
        super().__init__(path, maxBytes=nbytes, backupCount=older, encoding="utf-8")

    def _open(self) -> TextIOWrapper:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        return os.fdopen(descriptor, "a", encoding=self.encoding)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (the name is the base class's)
        """Called by `logging` within the handler of an exception."""
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._said:
            self._said = True
            with contextlib.suppress(OSError):  # standard error may lie on the same disk
                print(f"{self.baseFilename}: cannot be written ({error.strerror}); going on without", file=sys.stderr)

    def close(self) -> None:
        """What could not be written until now is given up."""
        with contextlib.suppress(OSError):
            super().close()
