"""Randomness that misbehaves on cue, for processes that tests start: it is passed by constructor, as always.

Light to import, like everything in the process that holds the connection; `tests/client/sources.py` is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common.privacy.randomness import Randomness

SECRET = "PATIENT-4711"
HANGS, FAILS = {(1, 1), (3, 1), (3, 2), (3, 3), (4, 1)}, {(2, 1)}  # (round, attempt)


@dataclass(frozen=True)
class Script:
    """(round, attempt) -> randomness.

    One that hangs first writes its process id to `folder`/training-ROUND-ATTEMPT, and goes on when there is a file
    of that name with `.go` after it.
    """

    folder: Path

    def __call__(self, round_number: int, attempt: int) -> Randomness:
        from tests.client.sources import Failing, Hanging, Randomness

        if (round_number, attempt) in HANGS:
            return Hanging(self.folder / f"training-{round_number}-{attempt}")
        return Failing() if (round_number, attempt) in FAILS else Randomness()
