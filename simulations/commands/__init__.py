"""`wardround simulate`: one file per sub-command."""

import typer

<<<<<<< HEAD
from simulations.commands import cohort, partition, run, sweep
=======
from simulations.commands import report, run
>>>>>>> d9c8545 (Report of a sweep: one offline page, JSON and CSV from the same content)

app = typer.Typer(
    name="simulate",
    help="Federated simulations on this machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("run")(run.command)
<<<<<<< HEAD
app.command("sweep")(sweep.command)
app.command("cohort")(cohort.command)
app.command("partition")(partition.command)
=======
app.command("report")(report.command)
>>>>>>> d9c8545 (Report of a sweep: one offline page, JSON and CSV from the same content)
