"""`wardround server`: one file per sub-command."""

import typer

from server.commands import admit, init, run, status

app = typer.Typer(
    name="server",
    help="Run the coordinator of a study.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("init")(init.command)
app.command("admit")(admit.command)
app.command("run")(run.command)
app.command("status")(status.command)
