"""The site's own records, as its site file names them: codes mapped, without those who opted out.

`open_records` is the one door: whatever a study reads or counts here, `check` and `run` alike, comes through it.

Who is held out for metrics is said by the records' split file where there is one, else by a keyed hash of the patient's
id (client/readers/meds.py). The file wins: people here wrote it, and other work of theirs may rest on it. Either way
`splits` of a site file cannot name `held_out`, so who is held out never trains.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from client.mapping import code_map_of
from client.readers.meds import MedsDirectory
from client.readers.optouts import WithoutOptouts, read_optouts
from client.site_file import SiteFile
from client.state import StateFolder
from common.schema import HELD_OUT, SPLIT, SUBJECT_ID
from common.sequences import Sequences

if TYPE_CHECKING:
    from common.schema import FeatureSchema
    from common.study import Study


def open_records(site: SiteFile, schema: FeatureSchema) -> MedsDirectory:
    """The records as a study with these inputs reads them.

    Raises:
        DataError: no records, or a file of opt-outs that cannot be used.
        ConfigurationError: a code map that cannot be used.
    """
    return _opened(site, code_map_of(site, schema).of_records)


def open_unmapped(site: SiteFile) -> MedsDirectory:
    """The same with the site's own codes, for whoever makes the map. Raises as `open_records`."""
    return _opened(site, {})


def _opened(site: SiteFile, counts_as: dict[str, str]) -> MedsDirectory:
    root = Path(site.records)
    if site.exclude is None:
        return MedsDirectory(root, counts_as)
    return WithoutOptouts(root, read_optouts(Path(site.exclude)), counts_as)


def read_records(site: SiteFile, study: Study, state: StateFolder) -> Sequences:
    """The site's training sequences, without the patients who opted out. Raises DataError."""
    return _read(open_records(site, study.features), site.splits, study, state)


def read_held_out(site: SiteFile, study: Study, state: StateFolder) -> Sequences | None:
    """The sequences of those who never train, without who opted out; None if there is nobody. Raises DataError."""
    directory = open_records(site, study.features)
    subjects = directory.labels(study.task.name)[SUBJECT_ID].unique()
    if HELD_OUT not in directory.splits(subjects, state.split_key())[SPLIT]:
        return None
    return _read(directory, (HELD_OUT,), study, state)


def _read(directory: MedsDirectory, splits: tuple[str, ...], study: Study, state: StateFolder) -> Sequences:
    return directory.read(
        study.task.name,
        study.features,
        splits,
        max_steps=study.records.max_steps,
        bin_hours=study.records.bin_hours,
        split_key=state.split_key(),
    )
