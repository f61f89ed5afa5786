"""Seeded randomness for simulations: reproducible, hence not private. Injected by constructor, never configured."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from common.privacy.randomness import Randomness

STAMP = "epsilon is what this plan costs with secret randomness; these weights are not private (seeded simulation)"


class SeededRandomness(Randomness):
    """The same streams from a key that follows from (seed, site, round, attempt): anyone can make it again.

    One key per attempt, so that a site's numbers do not depend on which process runs it or what ran before.
    """

    def __init__(self, seed: int, site: str, round_number: int, attempt: int) -> None:
        self._name = f"wardround simulation/{seed}/{site}/{round_number}/{attempt}"
        super().__init__()

    def _key(self) -> bytes:
        return hashlib.sha256(self._name.encode()).digest()


class Silent(SeededRandomness):
    """Seeded sampling, no noise at all: for tests that compare weights across grids."""

    def add_noise(self, clipped_sum: NDArray[np.float64], clip: float, noise_multiplier: float) -> NDArray[np.float64]:
        """The clipped sum itself."""
        del clip, noise_multiplier
        return clipped_sum
