"""A folder of results that is there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from client.durable import sync_folder
from common.errors import ConfigurationError


def require_new(out: Path) -> None:
    """Refuse a folder that holds something. Raises ConfigurationError."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise ConfigurationError(f"{out}: exists and is not empty; name a new folder")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into; at the end it takes the place of `out`, for this user alone.

    What a kill leaves behind begins with a dot and ends in `.partial`. An error in the block leaves nothing.

    Raises:
        ConfigurationError: `out` is not empty, or cannot be written.
    """
    require_new(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        try:
            yield fresh
            for path in fresh.iterdir():
                _sync(path)
            if out.exists():
                out.rmdir()
            fresh.rename(out)
            sync_folder(out.parent)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise ConfigurationError(f"{out}: cannot be written ({why}); make room, or choose another folder") from None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
