"""A site that writes down what it does, for the tests of a round."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.ledger import Attempt, MemoryLedger
from client.site import Site
from common.batching import Dataset
from common.models.network import build_network
from common.privacy.plan import Plan
from common.records import Request
from common.training import state_of
from common.weights import Weights
from simulations.seeded import SeededRandomness
from tests.small import Patient, as_sequences, made_up_patients, small_study

STUDY = small_study()
WEIGHTS = state_of(build_network(STUDY, 9))
SECRET = "PATIENT-4711"
Change = Callable[[Request], Request]


class Diary:
    """What was done, in order."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def count(self, word: str) -> int:
        return sum(line.startswith(word) for line in self.lines)


class WatchedLedger:
    """The real ledger, and a diary of its calls; `breaks` names a call that fails with a patient's value."""

    def __init__(self, diary: Diary, breaks: str = "") -> None:
        self.real = MemoryLedger(1.0, 1e-3)
        self.diary, self.breaks = diary, breaks

    def _note(self, call: str, what: str) -> None:
        if call == self.breaks:
            raise OSError(f"{SECRET} at {call}")
        self.diary.lines.append(what)

    def admit(self, study: str, plan: Plan) -> float:
        self._note("admit", "admit")
        return self.real.admit(study, plan)

    def attempt(self, study: str, round_number: int, steps: int, weights_digest: str) -> Attempt | bytes:
        self._note("attempt", f"attempt {round_number} {steps}")
        return self.real.attempt(study, round_number, steps, weights_digest)

    def release(self, attempt: Attempt, update: bytes) -> None:
        self._note("release", f"release {attempt.round_number} {attempt.number}")
        self.real.release(attempt, update)

    def head(self) -> str:
        return self.real.head()

    def contains(self, head: str) -> bool:
        return self.real.contains(head)


class WatchedRandomness(SeededRandomness):
    """Seeded randomness that writes down when patients are touched; the first `failures` attempts fail."""

    def __init__(self, diary: Diary, round_number: int, attempt: int, failures: int = 0) -> None:
        super().__init__(1, "north", round_number, attempt)
        self.diary, self.fails = diary, attempt <= failures

    def poisson_sample(self, patients: int, sampling_rate: float) -> NDArray[np.int64]:
        """Who joins."""
        self.diary.lines.append("sample")
        if self.fails:
            raise ValueError(f"cannot convert {SECRET} to float")
        return super().poisson_sample(patients, sampling_rate)

    def add_noise(self, clipped_sum: NDArray[np.float64], clip: float, noise_multiplier: float) -> NDArray[np.float64]:
        """The noised sum."""
        self.diary.lines.append("noise")
        return super().add_noise(clipped_sum, clip, noise_multiplier)


def hospital(
    diary: Diary, patients: list[Patient] | None = None, *, breaks: str = "", failures: int = 0, study: Any = STUDY
) -> Site:
    records = as_sequences(made_up_patients(1, 40) if patients is None else patients)
    return Site(
        "north",
        study,
        Dataset(records),
        WatchedLedger(diary, breaks),
        lambda number, attempt: WatchedRandomness(diary, number, attempt, failures),
    )


def moved(weights: Weights, by: float = 0.5) -> Weights:
    return {name: array + np.float32(by) for name, array in weights.items()}


def header(**changes: Any) -> Change:
    return lambda r: dataclasses.replace(r, header=dataclasses.replace(r.header, **changes))
