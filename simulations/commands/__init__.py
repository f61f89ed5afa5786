"""`wardround simulate`: one file per sub-command."""

import typer

from simulations.commands import run

app = typer.Typer(
    name="simulate",
    help="Federated simulations on this machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.callback()(lambda: None)  # keeps `run` a sub-command while it is the only one
app.command("run")(run.command)
