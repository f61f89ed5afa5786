"""What `tests/client/scripted.py` hands out."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.privacy.randomness import Randomness
from tests.client.scripted import SECRET

__all__ = ["Failing", "Hanging", "Randomness"]


class Hanging(Randomness):
    """Does not come back from drawing patients until it is told to."""

    def __init__(self, note: Path) -> None:
        super().__init__()
        self._note = note

    def poisson_sample(self, patients: int, sampling_rate: float) -> NDArray[np.int64]:
        """Says which process hangs, and waits."""
        new = self._note.with_suffix(".new")
        new.write_text(str(os.getpid()))
        new.replace(self._note)
        while not self._note.with_suffix(".go").exists():
            threading.Event().wait(0.05)
        return super().poisson_sample(patients, sampling_rate)


class Failing(Randomness):
    """Fails with a patient's value in its text, and on its standard output and error."""

    def poisson_sample(self, patients: int, sampling_rate: float) -> NDArray[np.int64]:
        """Raises."""
        del patients, sampling_rate
        for stream in (sys.stdout, sys.stderr):
            print(SECRET, file=stream, flush=True)
        os.write(2, SECRET.encode())
        raise ValueError(f"cannot convert {SECRET}")
