"""`wardround simulate sweep`: lines over epsilon, settings and seeds, resumable, with a table at the end."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from simulations.planning import Job
    from simulations.rows import Row
    from simulations.sweep_folder import SweepFolder

ENOUGH = 0.05  # of the work, before its speed says something about the rest


def command(
    sweep: Annotated[Path, typer.Argument(help="Sweep file (YAML); it names its study.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the sweep; one that was begun is continued.")],
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder with one MEDS directory per site (real records).")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes, one thread each; same rows.")] = 1,
    engine: Annotated[
        Literal["local", "ray"], typer.Option("--engine", help="`ray` runs the rows as Ray tasks (extra `ray`).")
    ] = "local",
    force: Annotated[bool, typer.Option("--force", help="Mix rows of other code with those of today's.")] = False,
) -> None:
    """Run every row of SWEEP that OUT lacks and print mean AUROC by line and epsilon."""
    from rich.console import Console

    from common.errors import WardroundError
    from common.study import load_study
    from simulations.curves import curve_table
    from simulations.frontier import origin_of, write_report
    from simulations.planning import plan_jobs
    from simulations.rows import load_rows
    from simulations.run_folder import RESEARCH
    from simulations.seeded import STAMP
    from simulations.sweep import load_sweep
    from simulations.sweep_folder import SweepFolder

    console = Console()
    terms = load_sweep(sweep)
    study = load_study(sweep.parent / terms.study)
    folder = SweepFolder(out)
    folder.begin(terms, study)
    jobs = plan_jobs(terms, sweep, data, out)
    there = folder.resume(jobs, mixed=force)
    missing = [job for job in jobs if job.file_name not in there]
    console.print(
        f"{terms.name}: {len(jobs)} rows over {len(terms.seeds)} seeds; {len(there)} are there, {len(missing)} to run",
        highlight=False,
    )
    failed = _run(console, folder, missing, workers, engine)
    rows = load_rows(out)
    folder.conclude(rows)
    if rows:
        console.print(curve_table(rows, f"{terms.name}: held-out AUROC, mean ± deviation over seeds"))
        console.print(f"epsilon: per patient and site, add or remove one, delta {study.privacy.delta}", highlight=False)
        console.print(STAMP, highlight=False)
        if any(row.research_mode for row in rows):
            console.print(RESEARCH, highlight=False)
        page = write_report(rows, out, origin_of([out], rows))
        console.print(f"report: {page}", highlight=False)
    console.print(f"written to {out}", highlight=False)
    if failed:
        raise WardroundError(f"{failed} of {len(jobs)} rows failed, see above; the same command runs them again")


def _run(console: Console, folder: SweepFolder, jobs: list[Job], workers: int, engine: Literal["local", "ray"]) -> int:
    """Run the jobs, store what they give, say how long it will take; the number that failed."""
    from common.errors import WardroundError
    from simulations.engines import run_jobs
    from simulations.sweep_folder import rooms_digest

    began, total, done, failed = time.monotonic(), sum(job.effort for job in jobs), 0.0, 0
    with closing(run_jobs(jobs, rooms_digest(), workers=workers, engine=engine)) as ended:
        for number, (job, answer) in enumerate(ended, start=1):
            done += job.effort
            passed = time.monotonic() - began
            if isinstance(answer, WardroundError):
                failed += 1
                told = f"failed: {answer}"
            else:
                folder.store(job, answer)
                told = _told(answer)
            told_enough = ENOUGH * total < done < total  # the first rows also read the records
            left = f"; about {_minutes(passed / done * (total - done))} left" if told_enough else ""
            console.print(
                f"[{number}/{len(jobs)}] {job.title}: {told}{left}", highlight=False, markup=False, soft_wrap=True
            )
    return failed


def _told(row: Row) -> str:
    auroc = row.site().auroc.value
    return f"AUROC {'undefined' if auroc is None else f'{auroc:.3f}'} ({row.seconds:.0f} s)"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
