"""`wardround server run`: serve a study until its last round, or until stopped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def command(
    study: Annotated[Path, typer.Argument(metavar="DIR/study.yaml", help="The study file in its folder.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoint of an earlier run, if there is one.")
    ] = False,
    log_level: Annotated[str, typer.Option("--log-level", help="debug, info, warning or error.")] = "info",
    plaintext: Annotated[
        bool, typer.Option("--plaintext", help="No TLS; only where server.yaml listens on 127.0.0.1 or ::1.")
    ] = False,
) -> None:
    """Serve the study. SIGTERM or Ctrl-C end it cleanly; `--resume` goes on from there."""
    from server.folder import open_folder
    from server.logs import logging_to

    folder = open_folder(study)
    os.environ["FLWR_HOME"] = str(folder.state / "flower")  # before Flower is imported: nothing in the home directory
    from server.coordinator import serve
    from server.grid import StoppedError

    with logging_to(folder.state / "server.log", log_level):  # after Flower's import, which sets up a log of its own
        try:
            serve(folder, resume=resume, plaintext=plaintext, tell=lambda line: typer.echo(line))
        except StoppedError:
            typer.echo(f"stopped; go on with `wardround server run {study} --resume`")
