"""Files that outlive a power cut and that nobody else on the machine reads.

Linux is what is tested. Windows knows neither the owner of a file this way nor a folder that can be synced: there the
folder's own access list must do.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from common.errors import LedgerError

POSIX = os.name == "posix"


def create_private(path: Path) -> None:
    """Make an empty file with mode 0600 that survives a power cut; keep one that is there.

    Raises:
        LedgerError: the folder is missing or cannot be written.
    """
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    except FileExistsError:
        return
    except OSError as error:
        raise LedgerError(f"{path}: cannot be made ({error.strerror}); make the folder, or its rights, right") from None
    sync_folder(path.parent)


def check_private(path: Path) -> None:
    """Refuse a file that is a link or none, belongs to another user, or that others may read. Absent is fine.

    Raises:
        LedgerError: names the file and the remedy.
    """
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise LedgerError(f"{path}: cannot be looked at ({error.strerror}); check the folder's rights") from None
    if not stat.S_ISREG(found.st_mode):
        raise LedgerError(f"{path}: is a symbolic link, or no file; name the file itself")
    if POSIX and found.st_uid != os.geteuid():
        raise LedgerError(f"{path}: belongs to user {found.st_uid}, not {os.geteuid()}; run as its owner")
    if POSIX and found.st_mode & 0o077:
        raise LedgerError(f"{path}: others may read it (mode {found.st_mode & 0o777:o}); run chmod 600 on it")


def replace_durably(path: Path, content: bytes) -> None:
    """Put `content` in the place of `path`: after a power cut it is the old file or the new one, whole.

    Raises:
        OSError: it cannot be written; then the old file stands.
    """
    fresh = path.with_name(path.name + ".new")
    descriptor = os.open(fresh, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0), 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    if POSIX:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
