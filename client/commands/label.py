"""`wardround client label`: labels of a task from events, by a template. Starts without torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from client.commands.opening import SiteArgument


def command(
    task_file: Annotated[Path, typer.Argument(metavar="TASK.yaml", help="The task, as the coordinator gave it.")],
    site_file: SiteArgument,
) -> None:
    """Make the label files of TASK.yaml from the records of SITE.yaml, by the site's `label_codes` and `code_map`."""
    from client.labels.terms import TaskFile
    from client.labels.write import write_labels
    from client.mapping import code_map_of
    from client.readers.meds import MedsDirectory
    from client.site_file import load_site_file, study_of
    from common.errors import ConfigurationError
    from common.terms import load

    os.umask(0o077)
    task, site = load(task_file, TaskFile), load_site_file(site_file)
    if site.label_codes is None:
        raise ConfigurationError(f"{site_file}: has no `label_codes`, so nobody knows what an admission is; add it")
    records, schema = MedsDirectory(Path(site.records)), study_of(site).features
    for done in write_labels(records, task, site.label_codes, schema, code_map_of(site, schema)):
        typer.echo(f"{done.path}: {done.rows:,} labels of {done.patients:,} patients, {done.positives:,} positive")
    for reason, count in sorted(done.left_out.items()):  # the same for every file of a task: the stays are the same
        typer.echo(f"left out: {count:,} {reason}")
