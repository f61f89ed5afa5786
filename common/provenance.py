"""Which code is this? A digest of the installed rooms `common` and `client`, compared in every message."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@lru_cache(maxsize=1)
def code_digest() -> str:
    """sha256 over path and content of every Python file of `common` and `client`, in order of path."""
    digest = hashlib.sha256()
    for path in sorted(p for room in ("common", "client") for p in (ROOT / room).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix().encode()
        content = path.read_bytes().replace(b"\r\n", b"\n")
        digest.update(b"%d %s %d " % (len(name), name, len(content)) + content)
    return digest.hexdigest()
