"""`wardround client predict`: risks of a hospital's own patients by a study's final weights, and how good they are.

Offline. Nothing is sent, nothing is charged: predictions from released weights are post-processing. What is written
is about patients, for this hospital alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from client.commands.opening import SiteArgument, opened
from common.schema import HELD_OUT

if TYPE_CHECKING:
    from client.prediction.evaluation import Evaluation
    from client.prediction.recalibration import Recalibration
    from client.prediction.weights import FinalWeights
    from client.site_file import SiteFile
    from common.study import Study

WeightsOption = Annotated[
    Path, typer.Option("--weights", metavar="FILE", help="weights.safetensors of the finished study.")
]


def command(
    site_file: SiteArgument,
    weights: WeightsOption,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Write here; absent or empty.")],
    csv: Annotated[bool, typer.Option("--csv", help="Also write predictions.csv.")] = False,
    split: Annotated[
        list[str] | None,
        typer.Option("--split", metavar="NAME", help="Patients of this split; may be repeated. Default: held_out."),
    ] = None,
    rows: Annotated[
        Path | None,
        typer.Option("--rows", metavar="FILE", help="Patients and times to predict for, instead of the label file."),
    ] = None,
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="Also each patient without a row, at the last event of the record.")
    ] = False,
    recalibration: Annotated[
        Path | None,
        typer.Option("--recalibration", metavar="FILE", help="Apply what `wardround client recalibrate` wrote."),
    ] = None,
    groups: Annotated[
        Path | None,
        typer.Option("--groups", metavar="FILE", help="Groups to compare; default: sex and age by their names."),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold",
            min=0.0,
            max=1.0,
            help="Risk from which a patient is flagged; default: the study's prevalence.",
        ),
    ] = None,
    resamples: Annotated[
        int, typer.Option("--resamples", min=1, max=100_000, help="Resamples of patients behind each interval.")
    ] = 1000,
) -> None:
    """Predict for the patients of SITE.yaml and judge the predictions on the held-out ones; everything stays here."""
    from client.prediction.asked import ask
    from client.prediction.evaluation import evaluate
    from client.prediction.groups import groupings
    from client.prediction.output import new_folder, require_new
    from client.prediction.page import page
    from client.prediction.predictions import probabilities, table
    from client.prediction.recalibration import read
    from client.prediction.weights import weights_for
    from client.site_file import study_of
    from common.report.data import to_json
    from common.report.html import render

    require_new(out)
    site, state = opened(site_file)
    study = study_of(site)
    groups_of = groupings(study.features, groups)
    flagged_from = study.task.prevalence if threshold is None else threshold
    final = weights_for(study, weights)
    local = None if recalibration is None else read(recalibration, study, final)
    asked = ask(site, study, state, splits=tuple(split or (HELD_OUT,)), rows=rows, unlabelled=unlabelled)
    risk = probabilities(study, final.arrays, asked, site.device, local.calibration if local else None)
    predictions = table(asked, risk, flagged_from)
    judged: Evaluation | None = None
    if asked.held_out.any():
        judged = evaluate(study.features, groups_of, asked, risk, threshold=flagged_from, resamples=resamples)
    with new_folder(out) as folder:
        predictions.write_parquet(folder / "predictions.parquet")
        if csv:
            predictions.write_csv(folder / "predictions.csv")
        if judged is not None:
            title = f"Predictions of study “{study.name}” at {site.site}"
            shown = page(title, judged, _facts(site, study, final, local, resamples))
            (folder / "evaluation.html").write_text(render(shown), encoding="utf-8")
            (folder / "evaluation.json").write_text(to_json(shown), encoding="utf-8")
    unknown = int((~asked.known).sum())
    typer.echo(f"{out / 'predictions.parquet'}: {len(predictions):,} predictions, {unknown:,} of them without a label")
    if judged is None:
        typer.echo("no evaluation: no held-out patient with a label is among them")
    else:
        typer.echo(f"{out / 'evaluation.html'}: {judged.overall.patients:,} held-out patients")
    typer.echo("These are predictions and numbers about your patients: they are for this hospital alone.")


def _facts(
    site: SiteFile, study: Study, weights: FinalWeights, local: Recalibration | None, resamples: int
) -> list[tuple[str, str]]:
    from importlib.metadata import version

    from common.provenance import code_digest

    recalibrated = "none" if local is None else f"slope {local.slope:.4g}, intercept {local.intercept:.4g}, fitted here"
    return [
        ("site", site.site),
        ("study", study.name),
        ("study's digest", study.digest()),
        ("task", study.task.name),
        ("weights, sha256 of the file", weights.sha256),
        ("local recalibration", recalibrated),
        ("who is judged", "patients of the split held_out with a label"),
        ("splits that train here", ", ".join(site.splits)),
        ("resamples behind each interval", f"{resamples:,}"),
        ("wardround", version("wardround")),
        ("wardround's code digest", code_digest()),
    ]
