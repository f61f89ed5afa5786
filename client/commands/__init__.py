"""`wardround client`: one file per sub-command. Nothing heavy is imported before a command runs."""

import typer

from client.commands import budget, check, convert, enrol, keygen, label, leave, map_codes, predict, recalibrate, run

app = typer.Typer(
    name="client",
    help="Take part in a study as a hospital.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("convert")(convert.command)
app.command("label")(label.command)
app.command("map-codes")(map_codes.command)
app.command("keygen")(keygen.command)
app.command("check")(check.command)
app.command("enrol")(enrol.command)
app.command("run")(run.command)
app.command("budget")(budget.command)
app.command("leave")(leave.command)
app.command("predict")(predict.command)
app.command("recalibrate")(recalibrate.command)
