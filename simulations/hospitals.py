"""Virtual hospitals: MEDS directories opened as the sites of a study, with seeded randomness and ledgers in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from client.ledger import MemoryLedger
from client.site import Site
from common.batching import Dataset
from common.device import resolve
from common.study import Study
from simulations.seeded import SeededRandomness
from simulations.sources import read_sequences

HELD_OUT = "held_out"


@dataclass(frozen=True)
class Hospitals:
    """The sites of a simulated study. Picklable: a worker process opens its sites with `open`.

    Attributes:
        study: the terms; every site of it has a directory.
        directories: MEDS directory by site name.
        seed: of sampling and noise (see simulations/seeded.py).
        randomness: class of the source; tests pass `Silent` for runs without noise.
    """

    study: Study
    directories: dict[str, Path]
    seed: int
    randomness: type[SeededRandomness] = SeededRandomness

    def dataset(self, site: str, splits: tuple[str, ...]) -> Dataset:
        """The site's sequences of these splits, on the study's device. Raises DataError if they cannot be used."""
        return Dataset(
            read_sequences(self.study, self.directories[site], splits),
            centre_mask=self.study.model.centre_mask,
            device=resolve(self.study.device),
        )

    def open(self, site: str) -> Site:
        """The site with its training records and a fresh ledger capped at the study's own epsilon."""
        privacy = self.study.privacy
        cap = float("inf") if privacy.epsilon is None else privacy.epsilon
        return Site(
            site,
            self.study,
            self.dataset(site, self.study.simulation.train),
            MemoryLedger(cap, privacy.delta),
            lambda round_number, attempt: self.randomness(self.seed, site, round_number, attempt),
        )
