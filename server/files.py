"""Files that survive a crash, and a folder that one process holds at a time."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common.errors import ConfigurationError, WardroundError


def write_atomically(path: Path, content: bytes, *, mode: int = 0o644, durable: bool = True) -> None:
    """Put `content` under `path`, whole or not at all: whoever reads, also after a power cut, finds the old or the new.

    Written beside it and synced, renamed over it, and the folder synced, because a rename is only then on disk.

    Args:
        durable: False leaves out both syncs, for what a power cut may take.

    Raises:
        WardroundError: the disk is full, or the folder not ours.
    """
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            if os.name == "posix":  # mkstemp made it 0600
                Path(name).chmod(mode)
            Path(name).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise
        if durable:
            sync_folder(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from None


def remove_unfinished(path: Path) -> None:
    """Remove what killed processes have left of writing `path`; for the one process that writes it."""
    for half in path.parent.glob(f".{path.name}.*"):
        half.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Add a line and bring it to disk. Raises WardroundError: the disk is full, or the file not ours.

    What a full disk or a crash left of the line before is ended first, or it would take this one with it.
    """
    try:
        with path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read() == b"\n" else f"\n{line}"
            file.write(f"{line}\n".encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> WardroundError:
    return WardroundError(f"{path}: cannot be written ({error.strerror or error}); free space, or check whose it is")


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries to disk; Windows has no such call."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path`; the operating system lets it go when the process ends, however it ends.

    Raises:
        ConfigurationError: another process holds it; `what` names the thing that is in use.
    """
    with path.open("ab") as file:
        try:
            _lock(file.fileno())
        except OSError:
            raise ConfigurationError(f"{what} is in use by another process; end that one first") from None
        yield


def _lock(descriptor: int) -> None:
    if os.name == "posix":
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]  # Windows only
