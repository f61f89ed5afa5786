"""`wardround client run` that also writes down when it trained; the randomness is real.

    python -m tests.benchmarks.timed_client SITE.yaml TIMES

TIMES gets a line `began ended` for each attempt, in seconds of the machine's monotonic clock, which all processes
share: from the draw of who joins to the sum with its noise. What follows in a step takes microseconds. Light to
import: this file is also loaded by the process that holds the connection, whose memory is measured.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common.privacy.randomness import Randomness


@dataclass(frozen=True)
class Timed:
    """(round, attempt) -> randomness that notes when it was made, and when it was last asked for noise."""

    times: Path

    def __call__(self, round_number: int, attempt: int) -> Randomness:
        import numpy as np
        from numpy.typing import NDArray

        from common.privacy.randomness import Randomness

        times, began = self.times, time.monotonic()

        class Noting(Randomness):
            """Real randomness that notes the time after its noise."""

            def add_noise(
                self, clipped_sum: NDArray[np.float64], clip: float, noise_multiplier: float
            ) -> NDArray[np.float64]:
                noised = super().add_noise(clipped_sum, clip, noise_multiplier)
                with times.open("a") as file:
                    file.write(f"{began} {time.monotonic()}\n")
                return noised

        return Noting()


def main(site: Path, times: Path) -> None:
    """What `client/commands/run.py` does, with a watch."""
    from client.commands.opening import opened

    opened(site)
    from client.service import serve

    serve(site, randomness=Timed(times))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
