"""`wardround client enrol`: look at everything, show the terms in words, ask once, pin the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from client.commands.opening import ONE_LEDGER, SiteArgument, opened

if TYPE_CHECKING:
    from client.enrolment import Enrolment


def command(
    site_file: SiteArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Agree without being asked; the terms are still shown.")] = False,
) -> None:
    """Check everything that taking part needs, show the study's terms, and pin them after a yes."""
    site, state = opened(site_file)
    from client.checks import begin_ledger, check
    from client.ledger_place import ledger_path
    from client.wording import terms_in_words

    def say(name: str, detail: str) -> None:
        typer.echo(f"ok  {name:<13} {detail}")

    with state.lock():
        found = check(site, state, say)
        typer.echo(f"\n{terms_in_words(found.study, site, found.weights)}")
        _compare(found.before, found.enrolment)
        if not yes and not typer.confirm(f"Take part as {site.site} on these terms?"):
            typer.echo("Nothing was changed.")
            raise typer.Exit(1)
        # Before the yes: whoever enrolled has a ledger, and one that is gone is missed.
        begin_ledger(site, state, found.patients)
        found.enrolment.write(state)
    typer.echo(f"Enrolled. `wardround client run {site_file}` takes part; `wardround client leave` ends it.")
    typer.echo(ONE_LEDGER.format(ledger=ledger_path(site)))


def _compare(before: Enrolment | None, now: Enrolment) -> None:
    """Say what differs from an earlier yes."""
    if before is None:
        return
    names = {
        "study": "the study's terms",
        "site": "this site's name",
        "declared_patients": "the size that is published",
        "policy": "this site's policy",
        "records": "the directory of records",
        "splits": "the splits that train",
        "exclude": "the file of opt-outs",
        "authority": "the server's certificate authority",
    }
    changed = [what for field, what in names.items() if getattr(before, field) != getattr(now, field)]
    typer.echo(f"Agreed before, on {before.time}. Different since then: {', '.join(changed) or 'nothing'}.\n")
