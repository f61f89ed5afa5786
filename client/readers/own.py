"""The site's own records, as its site file names them: without those who opted out, in the splits that train.

Who is held out for metrics is said by the records' split file where there is one, else by a keyed hash of the patient's
id (client/readers/meds.py). The file wins: people here wrote it, and other work of theirs may rest on it. Either way
`splits` of a site file cannot name `held_out`, so who is held out never trains.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from client.readers.meds import MedsDirectory
from client.readers.optouts import WithoutOptouts, read_optouts
from client.site_file import SiteFile
from client.state import StateFolder
from common.schema import HELD_OUT, SPLIT, SUBJECT_ID
from common.sequences import Sequences

if TYPE_CHECKING:
    from common.study import Study


def read_records(site: SiteFile, study: Study, state: StateFolder) -> Sequences:
    """The site's training sequences, without the patients who opted out. Raises DataError."""
    return _read(_directory(site), site.splits, study, state)


def read_held_out(site: SiteFile, study: Study, state: StateFolder) -> Sequences | None:
    """The sequences of those who never train, without who opted out; None if there is nobody. Raises DataError."""
    directory = _directory(site)
    subjects = directory.labels(study.task.name)[SUBJECT_ID].unique()
    if HELD_OUT not in directory.splits(subjects, state.split_key())[SPLIT]:
        return None
    return _read(directory, (HELD_OUT,), study, state)


def _directory(site: SiteFile) -> MedsDirectory:
    root = Path(site.records)
    return MedsDirectory(root) if site.exclude is None else WithoutOptouts(root, read_optouts(Path(site.exclude)))


def _read(directory: MedsDirectory, splits: tuple[str, ...], study: Study, state: StateFolder) -> Sequences:
    return directory.read(
        study.task.name,
        study.features,
        splits,
        max_steps=study.records.max_steps,
        bin_hours=study.records.bin_hours,
        split_key=state.split_key(),
    )
