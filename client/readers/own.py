"""The site's own records, as its site file names them: without those who opted out, in the splits that train."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from client.readers.meds import MedsDirectory
from client.readers.optouts import WithoutOptouts, read_optouts
from client.site_file import SiteFile
from client.state import StateFolder
from common.sequences import Sequences

if TYPE_CHECKING:
    from common.study import Study


def read_records(site: SiteFile, study: Study, state: StateFolder) -> Sequences:
    """The site's training sequences, without the patients who opted out. Raises DataError."""
    root = Path(site.records)
    directory = MedsDirectory(root) if site.exclude is None else WithoutOptouts(root, read_optouts(Path(site.exclude)))
    return directory.read(
        study.task.name,
        study.features,
        site.splits,
        max_steps=study.records.max_steps,
        bin_hours=study.records.bin_hours,
        split_key=state.split_key(),
    )
