"""`wardround simulate report`: the report of a sweep's folder, made again from its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a sweep (its --out).")],
    to: Annotated[Path | None, typer.Option("--to", help="Folder for the report; default: the sweep's own.")] = None,
) -> None:
    """Write report.html, report.json and report.csv from the runs in OUT that are finished. Trains nothing."""
    from simulations.frontier import origin_of, write_report
    from simulations.sweep_folder import load_rows

    rows = load_rows(folder)
    page = write_report(rows, to or folder, origin_of(folder, rows))
    typer.echo(f"report of {len(rows)} runs written to {page}")
