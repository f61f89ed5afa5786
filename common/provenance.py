"""Which code is this? A digest of installed rooms: of `common` and `client` it is compared in every message."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@lru_cache(maxsize=2)
def code_digest(rooms: tuple[str, ...] = ("common", "client")) -> str:
    """sha256 over path and content of every Python file of these rooms, in order of path; read once per process."""
    digest = hashlib.sha256()
    for path in sorted(p for room in rooms for p in (ROOT / room).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix().encode()
        content = path.read_bytes().replace(b"\r\n", b"\n")
        digest.update(b"%d %s %d " % (len(name), name, len(content)) + content)
    return digest.hexdigest()
