"""Virtual hospitals: MEDS directories opened as the sites of a study, with seeded randomness and ledgers in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from client.ledger import MemoryLedger
from client.readers.meds import read
from client.site import Site
from common.batching import Dataset
from common.device import resolve
from common.errors import ConfigurationError
from common.sequences import Sequences
from common.study import Study
from simulations.cohort import PRESETS, write_cohort
from simulations.seeded import SeededRandomness

HELD_OUT = "held_out"

# A sweep opens the same records many times over; they do not change while a process lives.
_ALREADY_READ: dict[tuple[object, ...], Sequences] = {}


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

    def sequences(self, site: str, splits: tuple[str, ...]) -> Sequences:
        """The site's sequences of these splits. Raises DataError if they cannot be used."""
        terms, schema = self.study.records, self.study.features
        key = (
            self.directories[site],
            self.study.task.name,
            schema.digest(),
            splits,
            terms.max_steps,
            terms.bin_hours,
        )
        if key not in _ALREADY_READ:
            _ALREADY_READ[key] = read(
                self.directories[site],
                self.study.task.name,
                schema,
                splits,
                max_steps=terms.max_steps,
                bin_hours=terms.bin_hours,
            )
        return _ALREADY_READ[key]

    def dataset(self, site: str, splits: tuple[str, ...]) -> Dataset:
        """The same as a Dataset on the study's device."""
        return Dataset(
            self.sequences(site, splits),
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


def find_directories(study: Study, data: Path | None, study_file: Path) -> dict[str, Path] | None:
    """The MEDS directory of each site: `data` or the study's `simulation.data`, with a folder per site.

    Returns None if the study's records are a synthetic cohort, still to be written.

    Raises:
        ConfigurationError: no source of records, an unknown preset, or a site without a folder.
    """
    simulation = study.simulation
    if data is None and simulation.cohort is not None:
        if simulation.cohort not in PRESETS:
            raise ConfigurationError(f"simulation.cohort = {simulation.cohort}: known are {', '.join(sorted(PRESETS))}")
        recipes = {recipe.name for recipe in PRESETS[simulation.cohort].sites}
        unknown = sorted(set(study.sites) - recipes)
        if unknown:
            raise ConfigurationError(
                f"site `{unknown[0]}` is not in cohort {simulation.cohort}, which has {', '.join(sorted(recipes))}"
            )
        return None
    root = data
    if root is None and simulation.data is not None:
        root = study_file.parent / simulation.data
    if root is None:
        raise ConfigurationError(
            f"{study_file}: names no records; pass --data FOLDER with one MEDS directory per site "
            f"({', '.join(study.sites)}), or set simulation.cohort"
        )
    directories = {name: root / name for name in study.sites}
    for name, directory in directories.items():
        if not directory.is_dir():
            raise ConfigurationError(f"site `{name}`: no folder {directory}; --data must hold one per site")
    return directories


def write_synthetic(study: Study, seed: int, out: Path) -> dict[str, Path]:
    """Write the study's synthetic cohort below `out`; the directory of each of its sites."""
    assert study.simulation.cohort is not None
    written = write_cohort(PRESETS[study.simulation.cohort], seed, out)
    return {path.name: path for path in written if path.name in study.sites}
