"""`wardround client keygen`: this hospital's key pair, made once and never overwritten."""

from __future__ import annotations

import typer

from client.commands.opening import ONE_LEDGER, SiteArgument, opened


def command(site_file: SiteArgument) -> None:
    """Make this hospital's key in the state folder and print its public half for the coordinator."""
    from client.ledger_place import ledger_path
    from client.state import KEY, PUBLIC
    from common.errors import ConfigurationError
    from common.keys import fingerprint, generate, private_to_pem, public_line, write_private

    site, state = opened(site_file, create=True)
    with state.lock():
        if (state / KEY).exists():
            raise ConfigurationError(
                f"{state / KEY}: exists and is not overwritten; its public line is in {state / PUBLIC}. To replace the "
                "key, move both files away, and have the coordinator admit the new one"
            )
        key = generate()
        line = f"{public_line(key)} {site.site}"
        state.remove(PUBLIC)
        write_private(state / PUBLIC, line.encode() + b"\n")
        write_private(state / KEY, private_to_pem(key))
    typer.echo(line)
    typer.echo(f"\nfingerprint: {fingerprint(key.public_key())}")
    typer.echo(
        f"Send the line above (it is also in {state / PUBLIC}) to the study's coordinator, who admits it as site "
        f"`{site.site}`,\nand compare the fingerprint by telephone. The private key stays in {state / KEY}."
    )
    typer.echo(ONE_LEDGER.format(ledger=ledger_path(site)))
