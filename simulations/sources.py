"""Where a simulation's records come from: a synthetic cohort, or a folder with a MEDS directory per site.

No torch here: a study or record that cannot be used is refused before anything slow is imported.
"""

from __future__ import annotations

from pathlib import Path

from client.readers.meds import read
from common.errors import ConfigurationError
from common.sequences import Sequences, check_trainable
from common.study import Study
from simulations.cohort import PRESETS, write_cohort

# Records without a split file are split by a keyed hash of the patient id. A site's own key is secret; a simulation's
# is not, and the same for every seed, so that all seeds are scored on the same patients.
SPLIT_KEY = b"wardround simulation split key"

# A sweep opens the same records many times over; they do not change while a process lives.
_already_read: dict[tuple[object, ...], Sequences] = {}


def read_sequences(study: Study, directory: Path, splits: tuple[str, ...]) -> Sequences:
    """The sequences of these splits in a MEDS directory, as the study wants them. Raises DataError."""
    terms, schema, task = study.records, study.features, study.task.name
    key = (directory, task, schema.digest(), splits, terms.max_steps, terms.bin_hours)
    if key not in _already_read:
        _already_read[key] = read(
            directory, task, schema, splits, max_steps=terms.max_steps, bin_hours=terms.bin_hours, split_key=SPLIT_KEY
        )
    return _already_read[key]


def check_records(study: Study, directories: dict[str, Path]) -> None:
    """Read every site's training records once and refuse what cannot be trained on, naming the site."""
    for site, directory in directories.items():
        splits = study.simulation.train
        check_trainable(read_sequences(study, directory, splits), f"site {site}, {' + '.join(splits)}")


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
    written = write_cohort(PRESETS[study.simulation.cohort], seed, out, scale=study.simulation.cohort_scale)
    return {path.name: path for path in written if path.name in study.sites}
