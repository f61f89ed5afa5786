"""A stream of noise belongs to the process that made it."""

from __future__ import annotations

import os

import numpy as np
import pytest

from common.privacy.randomness import Randomness


def test_a_stream_is_refused_in_any_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits, samples and noise raise where the process is not the one that drew the key (test_randomness.py forks)."""
    source = Randomness()
    here = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: here + 1)
    with pytest.raises(RuntimeError, match="another process"):
        source.bits(1)
    with pytest.raises(RuntimeError, match="another process"):
        source.poisson_sample(10, 0.5)
    with pytest.raises(RuntimeError, match="another process"):
        source.add_noise(np.zeros(3), 1.0, 1.0)
