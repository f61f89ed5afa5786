"""`wardround server admit`: let a site's key in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The study's folder.")],
    site: Annotated[str, typer.Argument(metavar="SITE", help="The site's name in the study.")],
    key: Annotated[Path, typer.Argument(metavar="KEY.pub", help="The site's public key, from `client keygen`.")],
    replace: Annotated[
        bool, typer.Option("--replace", help="Take this key instead of the one that the site has.")
    ] = False,
) -> None:
    """Put SITE's public key on the roster. A running server lets it in within seconds."""
    from common.keys import fingerprint, read_public
    from server.folder import open_folder

    public = read_public(key)
    new = open_folder(folder).admit(site, public, replace=replace)
    typer.echo(f"{site} is {'now' if new else 'already'} on the roster with the key")
    typer.echo(f"  {fingerprint(public)}")
    typer.echo("compare these digits with the site by telephone; whoever holds the key speaks for the site")
