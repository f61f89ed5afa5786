"""`wardround simulate tune`: how many hidden units, and which cell, before a study is fixed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from common.sequences import Sequences
    from common.study import Study
    from simulations.tuning import Price, Tuned

FORMATS = (".csv", ".json")


def command(
    study: Annotated[Path, typer.Argument(help="Study file (YAML).")],
    widths: Annotated[str, typer.Option("--widths", help="Hidden units, comma-separated.")] = "8,16,32,64",
    cells: Annotated[str, typer.Option("--cells", help="gru, lstm, rnn; none: logistic regression.")] = "gru,lstm",
    folds: Annotated[int, typer.Option("--folds", min=2, max=50, help="Of the cross-validation, by patient.")] = 3,
    epsilon: Annotated[str | None, typer.Option("--epsilon", help="Budget instead of the study's.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Folder with one MEDS directory per site.")] = None,
    public: Annotated[
        bool, typer.Option("--public", help="State that the records of real patients are public.")
    ] = False,
    synthetic: Annotated[bool, typer.Option("--synthetic", help="Synthetic patients of the declared sizes.")] = False,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed instead of the study's.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="New file for the table, .csv or .json.")] = None,
) -> None:
    """Cross-validate STUDY over widths and cells. Real patients are refused, unless they are public."""
    from common.errors import ConfigurationError
    from common.study import load_study
    from simulations.overrides import override

    terms = override(load_study(study), epsilon=epsilon, seed=seed, data=data, source=str(study))
    if synthetic and data is not None:
        raise ConfigurationError("--synthetic and --data: name one of them")
    if out is not None and (out.suffix not in FORMATS or out.exists()):
        raise ConfigurationError(f"--out {out}: name a new file that ends in {' or '.join(FORMATS)}")
    real = not synthetic and terms.simulation.data is not None

    import json

    from rich.console import Console

    from simulations import tuning
    from simulations.run_folder import RESEARCH
    from simulations.seeded import STAMP

    console = Console()
    if real and not public:
        _refuse(console, tuning.price_of_choosing(terms.plan(), _count(cells, widths), folds), folds)
    terms, parts = _records(terms, study, synthetic)
    candidates = tuning.candidates_of(terms, _words(cells), _numbers(widths))
    left = tuning.seconds_of(candidates, parts, folds)
    console.print(f"{len(candidates)} candidates in {folds} folds, about {left / 60:.1f} minutes", highlight=False)
    results = []
    for result in tuning.tune(candidates, parts, folds, terms.simulation.seed):
        results.append(result)
        console.print(f"{result.name}: AUROC {result.mean:.3f} ± {result.spread:.3f}", highlight=False)
    shown = "none" if terms.privacy.epsilon is None else f"{terms.privacy.epsilon:g}"
    _show(console, results, f"{terms.name}: AUROC over {folds} folds of patients at epsilon {shown}")
    best = max(results, key=lambda result: result.mean)
    small = tuning.smallest_as_good(results)
    console.print(f"best: {best.name}; the smallest within one standard error of it: {small.name}", highlight=False)
    console.print(RESEARCH if real else "synthetic patients: the choice cost nobody anything", highlight=False)
    console.print(STAMP, highlight=False)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        plain = json.dumps(tuning.as_rows(results), indent=1) + "\n"
        out.write_text(tuning.as_csv(results) if out.suffix == ".csv" else plain, encoding="utf-8")
        console.print(f"written to {out}", highlight=False, soft_wrap=True)


def _records(study: Study, file: Path, synthetic: bool) -> tuple[Study, dict[str, Sequences]]:
    """The study and the training records of its sites: of its twin, its cohort, or its folder."""
    import tempfile

    from simulations.cohort import write_cohort
    from simulations.sources import check_records, find_directories, read_sequences, write_synthetic
    from simulations.twin import synthetic_twin

    given = study.simulation.cohort is not None or study.simulation.data is not None
    with tempfile.TemporaryDirectory(prefix="wardround-tune-") as place:
        cohort = Path(place) / "cohort"
        if synthetic or not given:
            twin = synthetic_twin(study)
            study = twin.study
            write_cohort(twin.preset, study.simulation.seed, cohort)
            directories = {site: cohort / site for site in study.sites}
        else:
            found = find_directories(study, None, file)
            directories = write_synthetic(study, study.simulation.seed, cohort) if found is None else found
        check_records(study, directories)
        splits = study.simulation.train
        return study, {site: read_sequences(study, path, splits) for site, path in directories.items()}


def _refuse(console: Console, price: Price, folds: int) -> None:
    """Say what it would cost, and stop."""
    from common.errors import ConfigurationError

    for line in (
        "epsilon per patient, at every site, on patients who are not public:",
        f"  {price.study:8.2f}  the study itself: one training, nothing chosen",
        f"  {price.best_of_runs:8.2f}  the best of a random number of runs, on average one per candidate, each trained",
        "            once (Papernot and Steinke 2022); the score that decides must be private within the plan, too",
        f"  {price.all_folds:8.2f}  every candidate in {folds} folds, and the final training: {price.trainings} in all",
    ):
        console.print(line, highlight=False)
    raise ConfigurationError(
        "tune looks at every patient many times over; tune on --synthetic patients of these sizes, or pass --public if "
        "these records are public"
    )


def _show(console: Console, results: list[Tuned], title: str) -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for heading in ("cell", "hidden", "parameters", "clip", "AUROC ± spread", "below the best"):
        table.add_column(heading, justify="left" if heading == "cell" else "right")
    best = max(result.mean for result in results)
    for result in results:
        hidden = "" if result.hidden is None else f"{result.hidden}"
        score = f"{result.mean:.3f} ± {result.spread:.3f}"
        size = (f"{result.parameters:,}", f"{result.clip:g}")
        table.add_row(result.cell, hidden, *size, score, f"{best - result.mean:.3f}")
    console.print(table)


def _count(cells: str, widths: str) -> int:
    from simulations.tuning import NO_RECURRENCE

    return sum(1 if cell == NO_RECURRENCE else len(_numbers(widths)) for cell in _words(cells))


def _words(text: str) -> list[str]:
    from common.errors import ConfigurationError

    found = [word.strip() for word in text.split(",") if word.strip()]
    if not found or len(set(found)) < len(found):
        raise ConfigurationError(f"`{text}`: name one or more, comma-separated, each once")
    return found


def _numbers(text: str) -> list[int]:
    from common.errors import ConfigurationError

    try:
        return [int(word) for word in _words(text)]
    except ValueError:
        raise ConfigurationError(f"--widths {text}: expected whole numbers, comma-separated") from None
