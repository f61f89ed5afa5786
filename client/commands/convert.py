"""`wardround client convert`: a raw extract, as the site file's `format:` describes it, to a MEDS folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.errors import ConfigurationError

if TYPE_CHECKING:
    from client.readers.formats import Format


def command(
    file: Annotated[
        Path,
        typer.Argument(metavar="SITE.yaml", help="A site file with `format:`, or `version: 1` and `format:` alone."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The MEDS folder to write; absent or empty.")],
) -> None:
    """Convert a raw extract to a MEDS folder, which `records:` of the site file can name."""
    from client.readers.convert import convert

    os.umask(0o077)
    done = convert(format_of(file), file.absolute().parent, out.absolute())
    typer.echo(f"{out}: {done.events:,} events, {done.patients:,} patients, {done.codes:,} codes, {done.shards} files")
    for task, rows in sorted(done.labels.items()):
        typer.echo(f"labels of task {task}: {rows:,} rows")
    for reason, count in done.left_out.items():
        typer.echo(f"left out: {count:,} {reason}")
    typer.echo("These are counts of your patients: they are for this hospital alone.")


def format_of(file: Path) -> Format:
    """The `format:` of a site file, or of a file that has nothing else.

    Raises:
        ConfigurationError: names file, key and remedy.
    """
    from client.readers.formats import Extract
    from client.site_file import load_site_file
    from common.terms import load, read_yaml

    data = read_yaml(file)
    if not (isinstance(data, dict) and "site" in data):
        return load(file, Extract).format
    terms = load_site_file(file).format
    if terms is None:
        raise ConfigurationError(
            f"{file}: has no `format:`, so it does not say what the raw extract looks like; add it"
        )
    return terms
