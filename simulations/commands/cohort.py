"""`wardround simulate cohort`: virtual hospitals on disk, and how well any model could do on them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    out: Annotated[Path, typer.Argument(help="New folder; gets a MEDS directory per hospital.")],
    preset: Annotated[str, typer.Option("--preset", help="easy, medium, hard or twelve.")] = "medium",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Another seed, other patients.")] = 0,
    scale: Annotated[float, typer.Option("--scale", help="Factor on the number of patients.")] = 1.0,
    sites: Annotated[str, typer.Option("--sites", help="Only these, comma-separated.")] = "",
    task: Annotated[str, typer.Option("--task", help="Shown in the table: diagnosis, phenotype_0 .. 9.")] = "diagnosis",
) -> None:
    """Write the hospitals of a preset to OUT and print what is known about them.

    The same preset, seed and scale give the same records. `wardround simulate run STUDY --data OUT` reads them.
    """
    from rich.console import Console

    from common.errors import ConfigurationError
    from simulations.cohort import BINARY_TASKS, find_preset, write_cohort
    from simulations.cohort_table import table

    if task not in BINARY_TASKS:
        raise ConfigurationError(f"--task {task}: choose one of {', '.join(BINARY_TASKS)}")
    chosen = [name for name in sites.split(",") if name] or None
    written = write_cohort(find_preset(preset), seed, out, scale=scale, sites=chosen)
    console = Console()
    console.print(table(written, task, f"{preset}, seed {seed}: {task}, and the best possible scores"))
    console.print(f"written to {out}", highlight=False)
