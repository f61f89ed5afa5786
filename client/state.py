"""The client's state folder: key, enrolment, ledger, log; for one user and one process at a time.

    STATE/version          the layout's number
    STATE/key, key.pub     the site's key pair; the private half never leaves
    STATE/split.key        the secret behind a split by key, for records without a split file
    STATE/enrolment.json   what a person here said yes to
    STATE/ledger.db        what was spent, see client/ledger_file.py
    STATE/ledger.json      which ledger this folder charges, see client/ledger_place.py
    STATE/node.json        the number under which the server knows this site
    STATE/client.log       what happened, without anything of a patient
    STATE/lock             held while a process uses the folder
    STATE/flower/, torch/  what Flower and torch would write to home and temporary folders

Folder 0700, files 0600. Symbolic links and other owners' files are refused: whoever can exchange the ledger decides
what a patient is charged. Modes and owners are POSIX ideas; elsewhere only links are refused.

A lock is an advisory lock on an open file (flock; on Windows a locked byte): the system drops it when the process
ends, however it ends, so there is no stale lock that a person must remove.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from client.durable import replace_durably
from common.errors import ConfigurationError
from common.keys import write_private

STATE_VERSION = 1
SPLIT_KEY_BYTES = 32
MAX_JSON_BYTES = 100_000
KEY, PUBLIC, SPLIT_KEY, LEDGER, LOG = "key", "key.pub", "split.key", "ledger.db", "client.log"
ENROLMENT, NODE, LEDGER_PLACE = "enrolment.json", "node.json", "ledger.json"
LOCK = "lock"


class StateFolder:
    """A state folder that was found to be this user's alone.

    Args:
        path: the folder.
        create: make it, with its version file, if it is not there.

    Raises:
        ConfigurationError: no such folder, a link, another owner, open to others, another version.
    """

    def __init__(self, path: Path, *, create: bool = False) -> None:
        self.path = path
        if create and not os.path.lexists(path):
            path.mkdir(mode=0o700, parents=True)
        _check(path, "state folder", folder=True)
        for inside in sorted(path.iterdir()):
            _check(inside, "state folder", folder=inside.is_dir())
        if not (path / "version").exists():
            if any(path.iterdir()):
                raise ConfigurationError(
                    f"{path}: holds files, but no `version` file of wardround; name an empty folder for the state"
                )
            write_private(path / "version", b"%d\n" % STATE_VERSION)
        found = ascii((path / "version").read_text(encoding="utf-8", errors="replace").strip()[:20])[1:-1]
        if found != str(STATE_VERSION):
            raise ConfigurationError(
                f"{path}: state of version {found}, this wardround reads {STATE_VERSION}; install the wardround that "
                "wrote it, or a newer one"
            )

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def flower_home(self) -> None:
        """Send what Flower and torch write into this folder. Call before the first import of either.

        torch makes a folder for its compiler with the first optimizer, compiled or not. In a shared folder such as
        /tmp anybody could be there first, and every round would fail after its attempt was marked.
        """
        for name, variable in (("flower", "FLWR_HOME"), ("torch", "TORCHINDUCTOR_CACHE_DIR")):
            try:
                (self.path / name).mkdir(mode=0o700, exist_ok=True)
            except OSError as error:
                raise _unwritable(self.path / name, error) from None
            os.environ[variable] = str(self.path / name)

    def split_key(self) -> bytes:
        """32 secret bytes, the same each time; made on first use."""
        path = self.path / SPLIT_KEY
        if not path.exists():
            replace_durably(path, secrets.token_bytes(SPLIT_KEY_BYTES))
        key = path.read_bytes()
        if len(key) != SPLIT_KEY_BYTES:
            raise ConfigurationError(f"{path}: holds {len(key)} bytes, not {SPLIT_KEY_BYTES}; restore it from a copy")
        return key

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The content of a JSON file, or None if there is none. Raises ConfigurationError if it is no JSON object."""
        path = self.path / name
        try:
            with path.open("rb") as file:
                data = json.loads(file.read(MAX_JSON_BYTES))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigurationError(
                f"{path}: cannot be read ({type(error).__name__}); restore it from a copy, or enrol again"
            ) from None
        if not isinstance(data, dict):
            raise ConfigurationError(f"{path}: not a JSON object; restore it from a copy, or enrol again")
        return data

    def write_json(self, name: str, data: dict[str, Any]) -> None:
        """Write a JSON file whole or not at all, and durably: the old one stands until the new one is on disk."""
        content = json.dumps(data, indent=2, sort_keys=True) + "\n"
        try:
            replace_durably(self.path / name, content.encode())
        except OSError as error:
            raise ConfigurationError(f"{self.path / name}: cannot be written ({error.strerror}); make room") from None

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        (self.path / name).unlink(missing_ok=True)

    def lock(self) -> Lock:
        """Hold the folder until the lock is closed or the process ends.

        Raises:
            ConfigurationError: another process holds it, or the folder cannot be written.
        """
        return Lock(self.path / LOCK)


class Lock:
    """An exclusive lock on a file; a context manager."""

    def __init__(self, path: Path) -> None:
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
        except OSError as error:
            raise _unwritable(path, error) from None
        try:
            _lock(self._descriptor)
        except OSError:
            os.close(self._descriptor)
            raise ConfigurationError(
                f"{path.parent}: in use by another process of wardround; end it first, or wait until it is done"
            ) from None

    def close(self) -> None:
        """Give the lock back."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _unwritable(path: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"{path}: cannot be written ({error.strerror}); nothing is done from such a state folder: free space, or mount "
        "its disk for writing"
    )


def _check(path: Path, what: str, *, folder: bool) -> None:
    """Refuse a link, and on POSIX another owner or an open mode."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        if not folder:
            return  # a temporary file of the ledger that has just gone
        raise ConfigurationError(f"{path}: no such {what}; run `wardround client keygen` first") from None
    except OSError as error:
        raise ConfigurationError(f"{path}: {what} cannot be read ({type(error).__name__}); check its owner") from None
    if stat.S_ISLNK(status.st_mode):
        raise ConfigurationError(f"{path}: is a symbolic link, which a {what} must not hold; put the real thing there")
    if folder and not stat.S_ISDIR(status.st_mode):
        raise ConfigurationError(f"{path}: is not a folder; name a folder as `state` in the site file")
    if not folder and not stat.S_ISREG(status.st_mode):
        raise ConfigurationError(f"{path}: is not a plain file; remove it from the {what}")
    if os.name != "posix":
        return
    if status.st_uid != os.geteuid():
        raise ConfigurationError(
            f"{path}: belongs to user {status.st_uid}, this process runs as {os.geteuid()}; run as the owner"
        )
    if status.st_mode & 0o077:
        mode, wanted = stat.S_IMODE(status.st_mode), "700" if folder else "600"
        raise ConfigurationError(f"{path}: mode {mode:04o} lets others in; run chmod {wanted} on it")
