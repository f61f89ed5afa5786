"""`wardround server init`: a study's folder with keys, certificates and starting weights; or a new certificate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New folder for the study.")],
    study: Annotated[Path | None, typer.Option("--study", help="Study file (YAML).")] = None,
    name: Annotated[
        list[str] | None, typer.Option("--name", help="Host name or address that sites dial; may be given again.")
    ] = None,
    port: Annotated[int | None, typer.Option("--port", min=1, max=65535, help="Public port (default 8643).")] = None,
    renew_certificate: Annotated[
        bool, typer.Option("--renew-certificate", help="Only make a new server certificate in an existing DIR.")
    ] = False,
) -> None:
    """Make DIR: the study, its certificate authority, the server's certificate, an empty roster, starting weights."""
    from common.errors import ConfigurationError
    from server.certificates import days_left
    from server.folder import PORT, create, open_folder

    names = tuple(name or ())
    if renew_certificate:
        if study is not None or port is not None:
            raise ConfigurationError("--renew-certificate changes the certificate only; leave --study and --port out")
        opened = open_folder(folder)
        left = days_left(opened.renew_certificate(names))
        typer.echo(f"new certificate for {', '.join(names or opened.terms.names)}, valid for {left:.0f} days")
        typer.echo("a running server takes it when it is restarted; hospitals need nothing new")
        return
    if study is None or not names:
        raise ConfigurationError("init needs --study STUDY.yaml and at least one --name HOST that sites dial")
    from common.keys import spoken
    from common.study import load_study
    from server.folder import read_certificate

    terms = load_study(study)
    terms.plan()  # refuses a budget that cannot be met before anything is written
    made = create(folder, terms, names, port=port or PORT)
    _write_starting_weights(made.checkpoint, made.terms.study, folder)
    from cryptography.hazmat.primitives.serialization import Encoding

    authority = read_certificate(made.authority).public_bytes(Encoding.DER)
    typer.echo(f"study     {terms.name}, digest {made.terms.study}")
    typer.echo(f"hospitals get {folder / 'study.yaml'} and {made.authority}")
    typer.echo(f"          and dial {', '.join(made.terms.names)}, port {made.terms.port}")
    typer.echo(f"authority {spoken(authority)}   (read it to them by telephone)")
    typer.echo(f"next      wardround server admit {folder} SITE KEY.pub   for each of {', '.join(terms.sites)}")
    typer.echo(f"          wardround server run {folder / 'study.yaml'}")


def _write_starting_weights(path: Path, digest: str, folder: Path) -> None:
    """Now, because building the network loads torch, which `server run` does without."""
    from common.models.network import build_network
    from common.study import load_study
    from common.training import state_of
    from server.checkpoint import Checkpoint, save

    save(path, Checkpoint(0, state_of(build_network(load_study(folder / "study.yaml")))), digest)
