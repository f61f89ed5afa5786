"""`wardround simulate plan`: what a study costs and may reach, before any hospital is asked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from simulations.advice import Expected
    from simulations.cost import Cost
    from simulations.planning import Job
    from simulations.rows import Row

USUAL = (1.0, 3.0, 8.0)
QUICK = 4  # times fewer rounds
MEGABYTE = 1e6


def command(
    study: Annotated[Path, typer.Argument(help="Study file (YAML).")],
    epsilon: Annotated[str, typer.Option("--epsilon", help="Budgets, comma-separated; default: 1,3,8.")] = "",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Synthetic cohorts to average over.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON instead of tables.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A quarter of the rounds for the expected AUROC.")] = False,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes, one thread each; same result.")] = 1,
) -> None:
    """Price, noise, time and traffic of STUDY per site, and the AUROC to expect at its sizes on synthetic patients."""
    from common.errors import ConfigurationError
    from common.study import load_study
    from simulations.overrides import override

    terms = load_study(study)
    asked = [override(terms, epsilon=one, source=str(study)).privacy.epsilon for one in epsilon.split(",") if one]
    epsilons = sorted({each for each in asked if each is not None}) or list(USUAL)
    if None in asked:
        raise ConfigurationError(f"--epsilon {epsilon}: a plan is priced at numbers > 0; remove `none`")

    import json
    import tempfile
    from dataclasses import asdict

    from rich.console import Console

    from simulations import advice
    from simulations.cost import cost_of, step_time
    from simulations.twin import LARGEST, fewer_rounds, synthetic_twin

    console = Console(quiet=as_json)
    cost = cost_of(terms, epsilons)
    _show_cost(console, terms.name, cost)
    twin = synthetic_twin(fewer_rounds(terms, max(1, terms.training.rounds // QUICK)) if quick else terms)
    notes = [advice.DISCLAIMER]
    if quick:
        notes.append(f"--quick: expected AUROC after {twin.study.training.rounds} of {terms.training.rounds} rounds.")
    large = [site for site, size in terms.sites.items() if size.declared_patients > LARGEST]
    if large:
        notes.append(f"Simulated with {LARGEST:,} patients instead of more: {', '.join(large)}.")
    with tempfile.TemporaryDirectory(prefix="wardround-plan-") as place:
        jobs = advice.twin_jobs(twin, epsilons, seeds, Path(place))
        left = advice.seconds_of(jobs, step_time(twin.study)) / min(workers, len(jobs))
        console.print(
            f"\nexpected AUROC: {len(jobs)} trainings on synthetic patients, {seeds} seed(s), about {_duration(left)}"
        )
        advice.write_records(twin, seeds, Path(place))
        rows = _trained(console, jobs, workers)
    expected = advice.expected_of(rows, terms)
    said = advice.advice(expected)
    if as_json:
        facts: dict[str, Any] = {"study": terms.name, "cost": asdict(cost), "seeds": seeds, "notes": notes}
        facts["cost"]["seconds_per_round"] = cost.seconds_per_round
        typer.echo(json.dumps(facts | {"expected": [asdict(each) for each in expected], "advice": said}, indent=1))
        return
    _show_expected(console, expected)
    for line in [*said, "", *notes]:
        console.print(line, highlight=False)


def _trained(console: Console, jobs: list[Job], workers: int) -> list[Row]:
    """The rows of all jobs; the first that fails ends the command."""
    from contextlib import closing

    from common.errors import WardroundError
    from simulations.engines import run_jobs
    from simulations.sweep_folder import rooms_digest

    rows = []
    with closing(run_jobs(jobs, rooms_digest(), workers=workers)) as ended, console.status("training") as status:
        for number, (job, answer) in enumerate(ended, start=1):
            if isinstance(answer, WardroundError):
                raise answer
            rows.append(answer)
            status.update(f"{number} of {len(jobs)}: {job.title}")
    return sorted(rows, key=lambda row: (row.epsilon or 0.0, row.seed))


def _show_cost(console: Console, name: str, cost: Cost) -> None:
    from rich.table import Table

    plans = Table(title=f"{name}: the plan of every site, per budget", title_justify="left")
    for heading in ("epsilon", "price", "delta", "q", "sigma", "clip", "steps", "spare", "noise / C together"):
        plans.add_column(heading, justify="right")
    for budget in cost.budgets:
        plan = budget.plan
        steps = (f"{plan.steps}", f"{plan.spare_steps}", f"{budget.noise_together:.4f}")
        start = (f"{budget.epsilon:g}", f"{budget.price:.4f}", f"{plan.delta:g}", f"{plan.sampling_rate:g}")
        plans.add_row(*start, f"{plan.noise_multiplier:.4f}", f"{plan.clip:g}", *steps)
    console.print(plans)

    sites = Table(title="per site", title_justify="left")
    sites.add_column("site", overflow="fold")
    for heading in ("declared", "weight", "s / round", "MB down", "MB up"):
        sites.add_column(heading, justify="right")
    for budget in cost.budgets:
        sites.add_column(f"noise / C at {budget.epsilon:g}", justify="right")
    for site in cost.sites:
        noise = (f"{budget.noise[site.site]:.4f}" for budget in cost.budgets)
        moved = (f"{site.down / MEGABYTE:.3f}", f"{site.up / MEGABYTE:.3f}")
        row = (f"{site.declared_patients:,}", f"{site.weight:.3f}", f"{site.seconds_per_round:.3f}", *moved, *noise)
        sites.add_row(site.site, *row)
    console.print(sites)
    total = cost.rounds * cost.seconds_per_round
    both = cost.rounds * max(site.down + site.up for site in cost.sites) / MEGABYTE
    minutes = cost.seconds_per_round / 60
    for line in (
        "noise / C: standard deviation of the noise on each number of a site's mean gradient, in units of the clip",
        f"training: {minutes:.2g} minutes a round, {_duration(total)} in {cost.rounds} rounds, as measured on this",
        f"  machine, one thread, on made-up records of {cost.record_steps} steps; connection and waiting come on top",
        f"traffic: {both:.1f} MB per site in {cost.rounds} rounds, {cost.parameters:,} numbers each way a round",
    ):
        console.print(line, highlight=False)


def _show_expected(console: Console, expected: list[Expected]) -> None:
    from rich.table import Table

    title = "expected AUROC, alone -> together"
    table = Table(title=title, title_justify="left")
    table.add_column("site", overflow="fold")
    table.add_column("patients", justify="right")
    budgets = list(dict.fromkeys(each.epsilon for each in expected))
    for epsilon in budgets:
        table.add_column(f"epsilon {epsilon:g}", justify="right")
    table.add_column("best possible", justify="right")
    at = {(each.site, each.epsilon): each for each in expected}
    for site in dict.fromkeys(each.site for each in expected):
        mine = [at[site, epsilon] for epsilon in budgets]
        cells = (f"{'' if e.alone is None else f'{e.alone:.3f} -> '}{e.together:.3f}" for e in mine)
        table.add_row(site, f"{mine[0].declared_patients:,}", *cells, f"{mine[0].best_possible:.3f}")
    console.print(table)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} minutes"
