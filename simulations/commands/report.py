"""`wardround simulate report`: the report of a sweep's folder, made again from its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a sweep (its --out).")],
    beside: Annotated[
        list[Path] | None,
        typer.Option("--with", help="Folder of a further sweep of the same study, such as one over ways of weighting."),
    ] = None,
    to: Annotated[Path | None, typer.Option("--to", help="Folder for the report; default: OUT.")] = None,
) -> None:
    """Write report.html, report.json and report.csv from the runs in OUT that are finished. Trains nothing."""
    from simulations.frontier import origin_of, write_report
    from simulations.rows import load_rows

    folders = [folder, *(beside or [])]
    rows = [row for each in folders for row in load_rows(each)]
    page = write_report(rows, to or folder, origin_of(folders, rows))
    typer.echo(f"report of {len(rows)} runs written to {page}")
