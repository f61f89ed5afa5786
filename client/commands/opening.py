"""What every command of a hospital begins with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from client.site_file import SiteFile
    from client.state import StateFolder

ONE_LEDGER = (
    "One ledger per patient: another study at the same time has a state folder of its own and names this ledger "
    "(`ledger: {ledger}`);\na second ledger for the same patients would be a second budget."
)
SiteArgument = Annotated[Path, typer.Argument(metavar="SITE.yaml", help="This hospital's own site file.")]


def opened(path: Path, *, create: bool = False) -> tuple[SiteFile, StateFolder]:
    """The site file and its state folder; from here on new files are this user's alone, and Flower's go there, too."""
    from client.site_file import load_site_file
    from client.state import StateFolder

    os.umask(0o077)
    site = load_site_file(path)
    state = StateFolder(Path(site.state), create=create)
    state.flower_home()
    return site, state
