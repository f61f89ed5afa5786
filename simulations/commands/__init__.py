"""`wardround simulate`: one file per sub-command."""

import typer

from simulations.commands import cohort, partition, plan, report, run, sweep, tune

app = typer.Typer(
    name="simulate",
    help="Federated simulations on this machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("run")(run.command)
app.command("sweep")(sweep.command)
app.command("report")(report.command)
app.command("plan")(plan.command)
app.command("tune")(tune.command)
app.command("cohort")(cohort.command)
app.command("partition")(partition.command)
