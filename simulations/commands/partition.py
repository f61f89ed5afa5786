"""`wardround simulate partition`: any MEDS records as virtual hospitals on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    data: Annotated[Path, typer.Argument(help="A MEDS directory, or a folder of some, which are pooled first.")],
    out: Annotated[Path, typer.Argument(help="New folder; gets a MEDS directory per virtual hospital.")],
    task: Annotated[str, typer.Option("--task", help="Label file whose patients are dealt out.")],
    by: Annotated[str, typer.Option("--by", help="column, code, iid, label, size, covariate or time.")],
    sites: Annotated[int | None, typer.Option("--sites", help="How many; `column` and `code` find theirs.")] = None,
    column: Annotated[str | None, typer.Option("--column", help="Event column that names the hospital.")] = None,
    code: Annotated[str | None, typer.Option("--code", help="Code that names the hospital, or the covariate.")] = None,
    alpha: Annotated[float | None, typer.Option("--alpha", help="Dirichlet label skew; small is strong.")] = None,
    sigma: Annotated[float | None, typer.Option("--sigma", help="Log-normal size skew; 0 is none.")] = None,
    minimum: Annotated[int, typer.Option("--minimum", help="Training patients that every site must have.")] = 10,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Another seed, another dealing.")] = 0,
) -> None:
    """Deal the labelled patients of DATA out to virtual hospitals in OUT; nobody is split.

    Prints size, prevalence and shift of each site: true counts, so only for records that are treated as public.
    """
    from rich.console import Console
    from rich.table import Table

    from common.terms import parse
    from simulations.partition import PartitionSpec, find_sources, partition, site_terms

    terms = {"by": by, "sites": sites, "column": column, "code": code, "alpha": alpha, "sigma": sigma}
    given = {name: value for name, value in terms.items() if value is not None}
    spec = parse({**given, "minimum_patients": minimum}, PartitionSpec, "partition")
    reports = partition(find_sources(data), out, spec, task, seed)

    table = Table(title=f"{out.name}, by {by}, seed {seed}: {task}", title_justify="left")
    table.add_column("site", overflow="fold")
    for heading in ("training", "patients", "events", "prevalence", "shift", "by chance"):
        table.add_column(heading, justify="right")
    for report in reports:
        table.add_row(
            report.site,
            f"{report.training_patients:,}",
            f"{report.patients:,}",
            f"{report.events:,}",
            "" if report.prevalence is None else f"{report.prevalence:.3f}",
            f"{report.shift:.3f}",
            f"{report.chance_shift:.3f}",
        )
    console = Console()
    console.print(table)
    console.print("shift: total variation distance of code frequencies to the pooled ones, 0 to 1", highlight=False)
    console.print("for a study over these sites:\n\nsites:", highlight=False)
    for name, site in site_terms(reports).items():
        console.print(f"  {name}: {{declared_patients: {site.declared_patients}}}", highlight=False, soft_wrap=True)
    console.print("\nresearch mode: the data were treated as public", highlight=False)
    console.print(f"written to {out}", highlight=False, soft_wrap=True)
