"""Two processes with one site's key: noticed, and shut out until the site has a new key.

A node of Flower's is its key. To Flower two processes that hold it are one: the second says goodbye and hello in the
first one's name, and from then on messages go to whichever asks first. So each process of a client sends a random
number of its own with every request (`INSTANCE_HEADER`), and who said hello or goodbye last is the site. A request of
another process that was signed after that shows that both live: then neither is believed.

Decisions a reader would question:

- Times are compared as the requests were signed, not as they arrived: what a process sent before it was killed may
  arrive after its successor's hello, and is no second process. Two machines' clocks may differ, so an alarm may come
  later by that much; Flower refuses what is more than minutes off.
- Both are shut out, not the second alone: nobody can tell here which one is the hospital.
- Only a new key ends it (`wardround server admit --replace`), on the roster and hence at the site. A command that
  takes the alarm back would be used where a key was stolen, too. The alarm is kept over a restart.

What it cannot see: a thief who is online only while the site is not, and one who reads the number out of the site's
process or copies the running machine. The first is found out when the site is asked next, if the thief sent a head of
its own: see `Status.ROLLBACK`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from datetime import datetime
from pathlib import Path

from common.errors import ConfigurationError, WardroundError
from server.files import write_atomically

log = logging.getLogger("wardround.server")

INSTANCE_CHARACTERS = 64


class Instances:
    """Which process speaks for each key, and the keys for which two did.

    Args:
        path: the file that keeps the contested keys, as sha256; made with the first.

    Raises:
        ConfigurationError: the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._speaks: dict[bytes, tuple[str, datetime]] = {}  # key -> its process, and when it said hello or goodbye
        self._contested = _read(path)

    def contested(self, key: bytes) -> bool:
        """Whether two processes used this key."""
        return _name(key) in self._contested

    def hear(self, key: bytes, site: str, instance: str, signed: datetime, *, greets: bool) -> bool:
        """Take note of an authenticated request. False: the key is contested, and the request is not answered.

        Args:
            key: as Flower stores it; `site` is its name.
            instance: what the request says of its process; "" if nothing.
            signed: the time that it signed.
            greets: it is a hello or a goodbye, which any process of the site may say.
        """
        if self.contested(key):
            return False
        instance = instance[:INSTANCE_CHARACTERS]
        now, since = self._speaks.get(key, (instance, signed))
        if greets or key not in self._speaks:
            self._speaks[key] = instance, signed
        elif instance != now and signed > since:
            self._contested.add(_name(key))
            log.error(
                "site %s is contested: two processes use its key. Both are shut out. Call the site; if it did not "
                "start two clients, its key was stolen. Either way it makes a new one, see docs/coordinator.md",
                site,
            )
            self._keep()
            return False
        return True

    def _keep(self) -> None:
        try:
            write_atomically(self._path, json.dumps(sorted(self._contested)).encode())
        except WardroundError as error:  # this process knows, and the next finds out again when both speak
            log.error("%s", error)


def _name(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


def _read(path: Path) -> set[str]:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ConfigurationError(
            f"{path}: cannot be read; remove it, if no site is contested, or put a copy of it back"
        )
    return set(found)
