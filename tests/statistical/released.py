"""A hospital's client as its server sees it: TRAIN messages in, replies out, over a ledger in a file."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from flwr.app import Context, Message, RecordDict
from numpy.typing import NDArray

from client.app import build_app
from client.ledger_file import SqliteLedger
from client.site import Site
from common.batching import Dataset
from common.models.network import build_network
from common.privacy.randomness import GRID_BITS, Randomness
from common.records import Reply, reply_from_message
from common.sequences import Sequences
from common.study import Study
from common.training import state_of
from common.weights import Weights
from simulations.seeded import SeededRandomness
from tests.small import request_message

Numbers = NDArray[np.float64]
Source = Callable[[int, int], Randomness]
CONTEXT = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})


class Hospital:
    """One site with a new ledger in `folder`. Use as a context manager.

    Attributes:
        divisor: public: what the site divides its noised sum by.
    """

    def __init__(
        self, study: Study, records: Sequences, folder: Path, source: Source = lambda _r, _a: Randomness()
    ) -> None:
        privacy = study.privacy
        assert privacy.epsilon is not None
        self.study = study
        self.ledger = SqliteLedger(folder / "ledger.db", privacy.epsilon, privacy.delta)
        self.site = Site("north", study, Dataset(records), self.ledger, source)
        self.divisor = study.plan().divisor(study.sites["north"].declared_patients)
        self._app = build_app(lambda _context: self.site)

    def answer(self, weights: Weights, round_number: int) -> Message:
        """The message that leaves, to a request for a round from these weights."""
        return self._app(message=request_message(self.study, weights, round_number), context=CONTEXT)

    def reply(self, weights: Weights, round_number: int) -> Reply:
        """The same, as the server reads it."""
        return reply_from_message(self.answer(weights, round_number))

    def released_sum(self, weights: Weights, round_number: int) -> Numbers:
        """[d] the noised sum of clipped gradients, read off the update: minus update times divisor."""
        reply = self.reply(weights, round_number)
        assert reply.update is not None, reply.status
        return -self.divisor * flat(reply.update)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ledger.close()


class Coupled(Randomness):
    """A coin for each person and noise for each round that do not depend on who else is there.

    Two cohorts that differ by a patient then have the same sample, but for that patient, and the same noise.

    Args:
        present: [patients] which of `persons` the site's patients are, in their order.
        persons: how many there might be.
    """

    def __init__(self, present: NDArray[np.int64], persons: int, round_number: int, seed: int = 0) -> None:
        super().__init__()
        self._present, self._persons = present, persons
        self._coins, self._noise = (SeededRandomness(seed, what, round_number, 1) for what in ("coins", "noise"))

    def joins(self, sampling_rate: float) -> NDArray[np.bool_]:
        """[persons] who would join the next step."""
        joined = np.zeros(self._persons, bool)
        joined[self._coins.poisson_sample(self._persons, sampling_rate)] = True
        return joined

    def poisson_sample(self, patients: int, sampling_rate: float) -> NDArray[np.int64]:
        """Those of the patients whose coin says so."""
        assert patients == len(self._present)
        return np.flatnonzero(self.joins(sampling_rate)[self._present])

    def add_noise(self, clipped_sum: Numbers, clip: float, noise_multiplier: float) -> Numbers:
        """The round's noise."""
        return self._noise.add_noise(clipped_sum, clip, noise_multiplier)


def flat(weights: Weights) -> Numbers:
    """All arrays end to end, in order of name."""
    return np.concatenate([weights[name].ravel() for name in sorted(weights)]).astype(np.float64)


def random_weights(study: Study, seed: int) -> Weights:
    """What an arbitrary server may send: no weight is zero."""
    random = np.random.default_rng(seed)
    start = state_of(build_network(study))
    return {name: random.normal(0, 0.5, array.shape).astype(np.float32) for name, array in start.items()}


def deviation(study: Study, parameters: int) -> float:
    """Standard deviation of the noise on the sum: sigma C, raised for the rounding to a grid (randomness.py)."""
    plan = study.plan()
    return plan.noise_multiplier * (plan.clip + grid(study) * math.sqrt(parameters))


def grid(study: Study) -> float:
    """The step of the grid to which sum and noise are rounded: the power of two that randomness.py documents."""
    plan = study.plan()
    return 2.0 ** (math.floor(math.log2(plan.noise_multiplier * plan.clip)) - GRID_BITS)
