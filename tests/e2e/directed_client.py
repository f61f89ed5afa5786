"""`wardround client run` whose rounds a test can hold, slow down, or make too large for the memory.

    python tests/e2e/directed_client.py SITE.yaml FOLDER

Each attempt writes FOLDER/training-ROUND-ATTEMPT with its process id. While FOLDER/hold is there, rounds from the one
whose number stands in it go no further. If FOLDER/greedy is there, a round asks for a gigabyte. Light to import,
like silent_client.py; the randomness is real.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common.privacy.randomness import Randomness


@dataclass(frozen=True)
class Directed:
    """(round, attempt) -> real randomness that does as FOLDER says when patients are drawn."""

    folder: Path

    def __call__(self, round_number: int, attempt: int) -> Randomness:
        import os
        import threading

        import numpy as np
        from numpy.typing import NDArray

        from common.privacy.randomness import Randomness

        folder, note = self.folder, self.folder / f"training-{round_number}-{attempt}"

        class Waiting(Randomness):
            """Waits before it draws."""

            def poisson_sample(self, patients: int, sampling_rate: float) -> NDArray[np.int64]:
                fresh = note.with_suffix(".new")
                fresh.write_text(str(os.getpid()))
                fresh.replace(note)
                while _held_from(folder / "hold") <= round_number:
                    threading.Event().wait(0.05)
                if (folder / "greedy").exists():
                    np.ones(2**27)
                return super().poisson_sample(patients, sampling_rate)

        return Waiting()


def _held_from(file: Path) -> float:
    try:
        return int(file.read_text())
    except FileNotFoundError:
        return float("inf")


def main(file: Path, folder: Path) -> None:
    """What `client/commands/run.py` does, with a director."""
    from client.commands.opening import opened
    from client.stopping import Stop, stoppable

    try:
        with stoppable():
            opened(file)
            from client.service import serve

            serve(file, randomness=Directed(folder))
    except Stop:
        raise SystemExit(0) from None


if __name__ == "__main__":
    from common.errors import WardroundError

    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except WardroundError as error:
        sys.exit(f"error: {error}")
