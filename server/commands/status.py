"""`wardround server status`: how far a study is, who takes part, what it cost them. Reads files only."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Group

    from server.folder import ServerFolder
    from server.progress import Status

EVERY = 2.0


def command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The study's folder.")],
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every two seconds, until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As data, for other programs.")] = False,
) -> None:
    """Show rounds, sites, budgets and the time left. Works beside a running server and without one."""
    from common.errors import ConfigurationError
    from server import evaluation
    from server.folder import open_folder

    if watch and as_json:
        raise ConfigurationError("--watch is for people, --json for programs; take one of them")
    opened = open_folder(folder)
    if as_json:
        typer.echo(json.dumps({**_status(opened).as_dict(), "evaluation": evaluation.read(opened.path)}, indent=1))
        return
    from rich.console import Console
    from rich.live import Live

    console = Console()
    if not watch:
        console.print(_shown(opened))
        return
    with Live(_shown(opened), console=console, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(EVERY)
                live.update(_shown(opened), refresh=True)
        except KeyboardInterrupt:
            pass


def _status(folder: ServerFolder) -> Status:
    from server import progress

    done = progress.round_of(folder.checkpoint)
    return progress.summarise(
        folder.study(),
        done,
        progress.read(folder.metrics, done),
        progress.read_now(folder.state / "now.json"),
        frozenset(folder.roster()),
    )


def _shown(folder: ServerFolder) -> Group:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from server import evaluation

    status, evaluated = _status(folder), evaluation.read(folder.path)
    left = f", about {_span(status.seconds_left)} left" if status.seconds_left else ""
    lines = [
        f"study {status.study} ({status.digest[:12]}): {status.phase}",
        f"round {status.round} of {status.rounds}{left}; quorum {status.quorum} of {len(status.sites)}",
    ]
    if status.note:
        lines.append(status.note)
    table = Table(box=None)
    for column in ("site", "declared", "connection", "last seen", "rounds", "epsilon so far", "last without update"):
        table.add_column(column, overflow="fold")
    for site in status.sites:
        online = (
            "contested: call it" if site.contested else {True: "connected", False: "away", None: "unknown"}[site.online]
        )
        table.add_row(
            site.site,
            f"{site.declared_patients:,}",
            online if site.admitted else "not admitted",
            f"{_span(max(0.0, time.time() - site.last_seen))} ago" if site.last_seen else "",
            str(site.rounds),
            f"{site.epsilon:.3f}",
            site.last_refusal or "",
        )
    guarantee = (
        f"epsilon per patient at delta {status.delta:g}; the guarantee is the whole plan's, {status.guarantee:.3f}, "
        "also if the study stops early. A site's own ledger counts further attempts that never reached this server."
    )
    if status.guarantee_with_metrics is not None:
        guarantee += f" For a site that tells metrics it is {status.guarantee_with_metrics:.3f}, both together."
    found = [] if evaluated is None else evaluation.lines(evaluated)
    return Group(*(Text(line) for line in lines), table, Text(guarantee), *(Text(line) for line in found))


def _span(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
