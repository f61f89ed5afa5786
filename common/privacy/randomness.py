"""Private randomness: who is sampled, and the noise. From the operating system's entropy, through a stream cipher.

`Randomness` has no seed: no configuration, environment variable or message can reach its key. A simulation that must
be reproducible passes an object of its own (`simulations/seeded.py`) where this one goes; its result says so.

Floating point. Noise computed in floating point can give away the low-order bits of what it hides: a released number
that no noise could have carried from a neighbour's sum tells the two apart (Mironov 2012; Haney et al. 2022; on DP-SGD
Jin et al. 2022). Done against it:

- Sum and noise are both rounded to one public grid, a power of two at most 2^-GRID_BITS of the noise's standard
  deviation, and added there, exactly (for sums up to 2^28 standard deviations). What is released is a function of
  (sum on the grid) + (noise on the grid) alone, and each grid point in reach can come from either sum.
- Rounding moves each coordinate of two neighbouring sums by at most half a grid step, so their distance grows by at
  most grid * sqrt(d) (Casacuberta et al. 2022 on leaving that out); the standard deviation is raised by that much.
- Box and Muller's pairs lie on circles (Holohan and Braghin 2021 invert them); between two circles may lie grid cells
  that no noise reaches. A radius made from 53 bits, as is usual, leaves such cells beyond 6.6 standard deviations:
  2,000 pairs of parameters get there once in 10,000 studies of 164 steps, ten times a delta of 1e-5. Ours is made from
  64 bits, and from 128 where it is large: no cell is empty out to 11 standard deviations (beyond: one pair in 10^26),
  and beyond 1e-5 each has 500 circles. The numbers end at 13.4.
- Drawing noise takes as many steps whatever comes out, but for one pair in 4 billion: nothing is rejected and drawn
  again, which could be timed (Jin et al. 2022).

Not defended against: the probability of a grid point is that of the Gaussian to the rounding of float64's log, cos
and sin, not exactly. The exact way, a discrete Gaussian (Canonne, Kamath and Steinke 2020), was left out: it draws
numbers one by one, by rejection. The sum itself is made in float32; its rounding is bounded beside the clip
(`norms.py`), not hidden. Who can read this process's memory, time its caches, weaken the operating system's generator
or copy the virtual machine while a step runs (the copy would repeat the stream) is outside.

The alternative that lost: torch.normal on a seeded Mersenne Twister or Philox generator (what Opacus uses), whose
state follows from a few outputs or from a seed that a server knows.
"""

from __future__ import annotations

import math
import os

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

GRID_BITS = 24
LARGE_RADIUS = np.uint64(1 << 32)  # words below it, which make the largest radii, get 64 bits more
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
        """`count` independent standard normal numbers, in blocks."""
        out = np.empty(count)
        for start in range(0, count, BLOCK):
            part = out[start : start + BLOCK]
            part[:] = self._normal_block(len(part))
        return out

    def _normal_block(self, count: int) -> NDArray[np.float64]:
        """Box and Muller 1958: radius from a uniform number in (0, 1], angle from another; a point gives two normals.

        By torch's log, cos and sin: numpy's take two to three times as long.
        """
        half = (count + 1) // 2
        words = self.bits(2 * half)
        uniform = words[:half] * 2.0**-64
        low = np.flatnonzero(words[:half] < LARGE_RADIUS)
        uniform[low] += (self.bits(len(low)) + 0.5) * 2.0**-128  # never 0: log stays finite
        radius = torch.from_numpy(uniform).log_().mul_(-2).sqrt_()
        angle = torch.from_numpy((words[half:] >> np.uint64(11)) * (2 * math.pi * 2.0**-53))
        pairs = torch.cat([angle.cos().mul_(radius), angle.sin().mul_(radius)])
        return pairs.numpy()[:count]

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
        noised = self.normal(clipped_sum.size)
        for start in range(0, noised.size, BLOCK):
            part = noised[start : start + BLOCK]
            part *= deviation / grid  # exact: grid is a power of two
            np.rint(part, out=part)
            part += np.rint(clipped_sum[start : start + BLOCK].astype(np.float64, copy=False) / grid)
            part *= grid
        return noised
