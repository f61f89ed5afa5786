"""The server's log: server.log in the state folder, bounded in size and number, and warnings on standard error.

Flower's and uvicorn's loggers go there too, from warnings upwards: the server has nothing of a patient to give away.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import ConfigurationError
from common.logfile import LogFile

LEVELS = ("debug", "info", "warning", "error")
LOG_BYTES, OLD_LOGS = 5_000_000, 5
OTHERS = ("flwr", "uvicorn", "alembic")


@contextmanager
def logging_to(path: Path, level: str) -> Iterator[None]:
    """Log to `path` at `level` and above. Raises ConfigurationError: no such level."""
    if level not in LEVELS:
        raise ConfigurationError(f"--log-level {level!r} must be one of {', '.join(LEVELS)}")
    file = LogFile(path, LOG_BYTES, OLD_LOGS)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    watcher = logging.StreamHandler()
    watcher.setLevel(logging.WARNING)
    watcher.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    ours = logging.getLogger("wardround")
    ours.setLevel(level.upper())
    ours.addHandler(file)
    ours.addHandler(watcher)
    for name in OTHERS:
        other = logging.getLogger(name)
        other.handlers = [file]  # in place of Flower's own, which writes every request to the terminal
        other.setLevel(logging.WARNING)
        other.propagate = False
    try:
        yield
    finally:
        for name in ("wardround", *OTHERS):
            logger = logging.getLogger(name)
            logger.handlers = [handler for handler in logger.handlers if handler not in (file, watcher)]
        file.close()
