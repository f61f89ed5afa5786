"""`wardround client run`: take part, for as long as the study lasts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from client.commands.opening import SiteArgument, opened


def command(
    site_file: SiteArgument,
    dry_run: Annotated[
        Path | None,
        typer.Option(
            "--dry-run",
            metavar="DIR",
            help="Make one round's reply offline, without a patient in it, and write it to DIR.",
        ),
    ] = None,
    log_level: Annotated[
        str | None, typer.Option("--log-level", help="debug, info, warning or error; instead of the site file's.")
    ] = None,
    exit_when_finished: Annotated[
        bool, typer.Option("--exit-when-finished", help="End after the study's last round instead of waiting on.")
    ] = False,
) -> None:
    """Take part in the study of SITE.yaml until stopped (SIGTERM or Ctrl-C end it cleanly)."""
    from client.stopping import Stop, stoppable

    try:
        with stoppable():
            _run(site_file, dry_run, log_level, exit_when_finished)
    except Stop:
        raise typer.Exit(0) from None


def _run(site_file: Path, folder: Path | None, log_level: str | None, exit_when_finished: bool) -> None:
    from common.errors import ConfigurationError

    if log_level not in (None, "debug", "info", "warning", "error"):
        raise ConfigurationError("--log-level must be debug, info, warning or error")
    site, state = opened(site_file)
    if folder is None:
        from client.service import serve

        serve(site_file, log_level=log_level, exit_when_finished=exit_when_finished)
        return
    from client.dry_run import dry_run

    written = dry_run(site, state, folder)
    typer.echo(
        f"{written.reply.status}: {written.nbytes:,} bytes would have been sent; {folder / 'reply.json'} lists them."
    )
    typer.echo("Nothing was sent and nothing was charged.")
    typer.echo("No patient was drawn: fields and sizes are those of a real round, the update is noise alone.")
