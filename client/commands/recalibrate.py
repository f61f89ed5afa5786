"""`wardround client recalibrate`: two numbers that make a finished study's risks true at this hospital."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from client.commands.opening import SiteArgument, opened
from client.commands.predict import WeightsOption
from common.schema import TUNING


def command(
    site_file: SiteArgument,
    weights: WeightsOption,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Write the two numbers here; a new file.")],
) -> None:
    """Fit slope and intercept on the tuning patients of SITE.yaml; the file is for this hospital alone."""
    from client.prediction.asked import ask
    from client.prediction.predictions import probabilities
    from client.prediction.recalibration import fit, write
    from client.prediction.weights import weights_for
    from client.site_file import study_of
    from common.errors import ConfigurationError

    site, state = opened(site_file)
    if TUNING in site.splits:
        raise ConfigurationError(
            f"{site_file}: `splits` lets tuning patients train, and a model's risks are not true for whom it trained "
            "on; go without a recalibration"
        )
    study = study_of(site)
    final = weights_for(study, weights)
    asked = ask(site, study, state, splits=(TUNING,))
    found = fit(study, final, asked, probabilities(study, final.arrays, asked, site.device))
    write(out, found)
    typer.echo(f"{out}: slope {found.slope:.4g}, intercept {found.intercept:.4g}")
    typer.echo("These are exact statistics of your patients: they are for this hospital alone.")
