"""Private randomness: who is sampled, and the noise. From the operating system's entropy, through a stream cipher.

`Randomness` has no seed: no configuration, environment variable or message can reach its key. A simulation that must
be reproducible passes an object of its own (`simulations/seeded.py`) where this one goes; its result says so.

Floating point. Noise computed in floating point can give away the low-order bits of what it hides (Mironov 2012;
Haney et al. 2021, "Precision-based attacks"). The clipped sum g and the noise z are therefore both rounded to one
public grid, a power of two at most 2^-GRID_BITS of the noise's standard deviation, and added there, exactly, in
float64: the result is a function of (g rounded + z) alone. Rounding moves each coordinate of two neighbouring sums
by at most half a grid step, so the sensitivity grows by grid * sqrt(d); the standard deviation is raised by that much.
What is left: Box-Muller on 53-bit uniforms ends at 8.6 standard deviations (adds about d * 3e-17 to delta a step),
and log and cos are rounded, which can matter only at the borders between grid cells.

The alternative that lost: torch.normal on a seeded Mersenne Twister or Philox generator (what Opacus uses), whose
state follows from a few outputs or from a seed that a server knows.
"""

from __future__ import annotations

import math
import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

GRID_BITS = 24
BLOCK = 1 << 16  # normals made at a time: their temporaries stay in cache
KEY_BYTES = 32


class Randomness:
    """Sampling and noise for one site, from a fresh secret key of AES-256 in counter mode.

    Guarantee:
        Every patient joins independently with probability at most q (q rounded down to a multiple of 2^-64).
        The noise is Gaussian with at least the standard deviation asked for, independent between calls.
        Two objects, processes or retries never share a key: a forked child is refused, an object cannot be pickled.
    """

    def __init__(self) -> None:
        cipher = Cipher(algorithms.AES(self._key()), modes.CTR(bytes(16)))
        self._stream = cipher.encryptor()
        self._process = os.getpid()

    def _key(self) -> bytes:
        return os.urandom(KEY_BYTES)

    def bits(self, count: int) -> NDArray[np.uint64]:
        """`count` independent uniform 64-bit words."""
        if os.getpid() != self._process:
            raise RuntimeError("randomness was made in another process: a fork would repeat its noise; make a new one")
        if count == 0:
            return np.empty(0, np.uint64)
        return np.frombuffer(self._stream.update(bytes(8 * count)), np.uint64)

    def poisson_sample(self, patients: int, sampling_rate: float) -> NDArray[np.int64]:
        """Indices [B], ascending, of who joins a step: each of `patients` with probability q; B may be 0."""
        if sampling_rate >= 1:
            return np.arange(patients)
        threshold = np.uint64(math.floor(math.ldexp(sampling_rate, 64)))
        return np.flatnonzero(self.bits(patients) < threshold)

    def normal(self, count: int) -> NDArray[np.float64]:
        """`count` independent standard normal numbers (Box and Muller 1958), in blocks."""
        out = np.empty(count)
        for start in range(0, count, BLOCK):
            size = min(BLOCK, count - start)
            half = (size + 1) // 2
            words = self.bits(2 * half) >> np.uint64(11)
            uniform = (words.astype(np.float64) + 0.5) * 2.0**-53  # never 0: log stays finite
            radius = np.sqrt(-2.0 * np.log(uniform[:half]))
            angle = (2.0 * math.pi) * uniform[half:]
            pairs = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
            out[start : start + size] = pairs[:size]
        return out

    def add_noise(self, clipped_sum: NDArray[np.float64], clip: float, noise_multiplier: float) -> NDArray[np.float64]:
        """The clipped sum [d] with Gaussian noise of standard deviation at least noise_multiplier * clip, on a grid.

        Args:
            clipped_sum: float64 [d], finite, of L2 sensitivity `clip`.
            clip: C > 0.
            noise_multiplier: sigma > 0.

        Raises:
            ValueError: sigma C is not positive and finite: a call for no noise is a mistake.
        """
        if not 0 < noise_multiplier * clip < math.inf:
            raise ValueError(f"noise of {noise_multiplier} x {clip} must be positive and finite; correct the plan")
        grid = math.ldexp(0.5, math.frexp(noise_multiplier * clip)[1] - GRID_BITS)  # frexp: exact, where log2 rounds
        deviation = noise_multiplier * (clip + grid * math.sqrt(clipped_sum.size))
        noise = self.normal(clipped_sum.size) * deviation
        return grid * (np.rint(clipped_sum / grid) + np.rint(noise / grid))
