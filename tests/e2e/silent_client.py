"""`wardround client run` with randomness from a test: sampling by a seed and no noise, to compare weights.

    python tests/e2e/silent_client.py SITE.yaml SEED

What it needs to do that is code of its own that calls `client.service.serve` with an object: the command line has no
way to it. Light to import: this file is also loaded by the process that holds the connection.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common.privacy.randomness import Randomness


@dataclass(frozen=True)
class SilentAt:
    """(round, attempt) -> the simulation's noiseless randomness of a site."""

    seed: int
    site: str

    def __call__(self, round_number: int, attempt: int) -> Randomness:
        from simulations.seeded import Silent

        return Silent(self.seed, self.site, round_number, attempt)


def main(file: Path, seed: int) -> None:
    """What `client/commands/run.py` does, with a generator."""
    from client.commands.opening import opened

    site, _ = opened(file)
    from client.service import serve

    serve(file, randomness=SilentAt(seed, site.site))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
