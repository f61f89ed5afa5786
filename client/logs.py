"""The client's log: what happened, in the state folder, without anything of a patient; bounded in size and number.

Only loggers below `wardround` write to it. Their messages hold counts of the study, statuses and class names; where
a failure depends on the records, its text is never logged (client/site.py). Other libraries' loggers stay out: what
they may quote is not known.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.logfile import LogFile

LOG_BYTES, OLD_LOGS = 1_000_000, 5
FORMAT = "%(asctime)s %(levelname)s %(message)s"


@contextmanager
def logging_to(path: Path, level: str) -> Iterator[None]:
    """Log to `path`, and to standard error for the one who watches, at `level` and above."""
    root = logging.getLogger("wardround")
    handlers: list[logging.Handler] = [LogFile(path, LOG_BYTES, OLD_LOGS), logging.StreamHandler()]
    for handler in handlers:
        handler.setFormatter(logging.Formatter(FORMAT))
        root.addHandler(handler)
    root.setLevel(level.upper())
    try:
        yield
    finally:
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
