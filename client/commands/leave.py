"""`wardround client leave`: end taking part; what was spent stays written down."""

from __future__ import annotations

from typing import Annotated

import typer

from client.commands.opening import SiteArgument, opened


def command(
    site_file: SiteArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Leave the study: tell the server, forget the agreed terms; ledger and key are kept."""
    site, state = opened(site_file)
    from client.enrolment import Enrolment
    from client.fleet import Fleet
    from client.ledger_place import ledger_path
    from client.network import NetworkError
    from client.state import ENROLMENT, KEY, NODE
    from common.errors import ConfigurationError
    from common.keys import load_private

    with state.lock():
        found = Enrolment.read(state)
        if found is None:
            raise ConfigurationError(f"{state.path}: not enrolled, so there is nothing to leave")
        if not yes and not typer.confirm(f"Leave study {found.name} as {found.site}?"):
            typer.echo("Nothing was changed.")
            raise typer.Exit(1)
        node = (state.read_json(NODE) or {}).get("node")
        try:
            if node is not None:
                with Fleet(site.server, load_private(state / KEY)) as fleet:
                    fleet.goodbye(node)
            said = "The server was told."
        except NetworkError as error:
            said = f"The server could not be told ({error}); it will notice within a minute."
        state.remove(ENROLMENT)
        state.remove(NODE)
    typer.echo(
        f"Left study {found.name}. {said} Ledger ({ledger_path(site)}) and key are kept: what was spent stays spent.\n"
        "Ask the coordinator to take this site's key off the roster."
    )
