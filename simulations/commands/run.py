"""`wardround simulate run`: one study over virtual hospitals, with a table at the end and a folder of evidence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    study: Annotated[Path, typer.Argument(help="Study file (YAML).")],
    out: Annotated[Path, typer.Option("--out", help="New folder for the run.")],
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder with one MEDS directory per site (real records).")
    ] = None,
    epsilon: Annotated[
        str | None, typer.Option("--epsilon", help="Budget instead of the study's; `none`: no noise.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed instead of the study's.")] = None,
    lines: Annotated[
        str, typer.Option("--lines", help="Beside it, comma-separated: logistic,alone,fedavg-local,naive,no-noise.")
    ] = "",
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes, one thread each; same result.")] = 1,
) -> None:
    """Train STUDY over virtual hospitals and print accuracy beside epsilon, per site."""
    from common.study import load_study
    from simulations.overrides import override
    from simulations.sources import check_records, find_directories, write_synthetic

    terms = override(load_study(study), epsilon=epsilon, seed=seed, data=data, source=str(study))
    chosen_seed = terms.simulation.seed
    plan = terms.plan()
    directories = find_directories(terms, data, study)
    if directories is not None:
        check_records(terms, directories)

    from rich.console import Console

    from common.device import resolve
    from simulations import run_folder
    from simulations.experiment import HeldOut, Progress, simulate
    from simulations.hospitals import Hospitals
    from simulations.lines import lines_of

    resolve(terms.device)
    beside = lines_of(terms, [name for name in lines.split(",") if name])
    held_out = HeldOut(Hospitals(terms, directories, chosen_seed)) if directories is not None else None
    run_folder.create(out, terms, chosen_seed)  # from here on nothing is refused for what stands in a file
    if directories is None:
        directories = write_synthetic(terms, chosen_seed, out / "cohort")
    hospitals = Hospitals(terms, directories, chosen_seed)
    console = Console()
    console.print(
        f"{terms.name}: {len(terms.sites)} sites, {terms.training.rounds} rounds of {terms.training.local_steps} "
        f"local step(s), {terms.model.cell}, q {plan.sampling_rate}, sigma {plan.noise_multiplier}, clip {plan.clip}",
        highlight=False,
    )

    def show(progress: Progress) -> None:
        run_folder.append_metrics(out, progress)
        for site, reason in progress.refused.items():
            console.print(f"round {progress.round_number}: {site} sent no update ({reason})", highlight=False)
        if progress.auroc is not None:
            spent = run_folder.spent(progress.epsilon)
            console.print(
                f"round {progress.round_number:>{len(str(progress.rounds))}}/{progress.rounds}  "
                f"AUROC {progress.auroc:.3f}  epsilon so far: {spent}",
                highlight=False,
            )

    result = simulate(hospitals, workers=workers, held_out=held_out, on_round=show)
    others = {}
    for name, line in beside.items():
        console.print(f"beside it: {name}", highlight=False)
        scored_on = HeldOut(Hospitals(line.model_copy(update={"sites": terms.sites}), directories, chosen_seed))
        others[name] = simulate(Hospitals(line, directories, chosen_seed), workers=workers, held_out=scored_on)
    run_folder.finish(out, result, others)
    console.print(run_folder.table(result, f"{terms.name}, seed {chosen_seed}: held-out patients"))
    if others:
        console.print(run_folder.lines_table(result, others))
    console.print(f"epsilon: per patient, add or remove one, delta {terms.privacy.delta}", highlight=False)
    for stamp in run_folder.stamps(terms):
        console.print(stamp, highlight=False)
    console.print(f"written to {out}", highlight=False)
