"""`wardround client map-codes`: which of this hospital's codes could count as the study's. Offline, without torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from client.commands.opening import SiteArgument


def command(
    site_file: SiteArgument,
    study_file: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study, as the coordinator gave it.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="MAP.yaml", help="Write the entries here.")] = None,
    codes: Annotated[
        Path | None,
        typer.Option("--codes", metavar="CODES.parquet", help="The consortium's descriptions and parents of codes."),
    ] = None,
    task_file: Annotated[
        Path | None, typer.Option("--task", metavar="TASK.yaml", help="A task whose code sets are looked for, too.")
    ] = None,
) -> None:
    """Propose a code map for SITE.yaml: exact, parent and description matches, for a person to confirm."""
    from client.labels.terms import TaskFile
    from client.mapping import CodeMap
    from client.mapping_proposals import About, read_about
    from client.mapping_survey import survey_codes, write_map
    from client.readers.own import open_unmapped
    from client.site_file import load_site_file
    from common.errors import ConfigurationError
    from common.study import load_study
    from common.terms import load

    os.umask(0o077)
    if out is not None and os.path.lexists(out):
        raise ConfigurationError(f"{out}: exists and is not overwritten; name another file")
    site, schema = load_site_file(site_file), load_study(study_file).features
    there = CodeMap(version=1)
    if site.code_map is not None and os.path.lexists(site.code_map):
        there = load(Path(site.code_map), CodeMap)
    directory = open_unmapped(site)
    own = directory.root / "metadata" / "codes.parquet"
    study = read_about(codes) if codes is not None else About()
    asked = load(task_file, TaskFile).codes() if task_file is not None else ()
    found = survey_codes(
        directory, schema, read_about(own) if own.exists() else About(), study, there=there, asked=asked
    )
    total = sum(found.events.values())
    typer.echo(f"{total:,} events of {len(found.events):,} codes; events with a code of study schema {schema.name}:")
    typer.echo(f"  {found.before:6.1%} as they are")
    typer.echo(f"  {found.confirmed:6.1%} with the {len(there.of_records):,} entries that are confirmed")
    typer.echo(f"  {found.proposed:6.1%} if every entry were confirmed")
    for how in ("exact", "parent", "text"):
        some = [entry for entry in found.new if entry.how == how]
        share = sum(found.events[entry.site] for entry in some) / max(1, total)
        typer.echo(f"proposed, {how + ':':<7} {len(some):,} codes, {share:.1%} of the events")
    typer.echo(f"without a proposal: {found.unknown:,} codes")
    if out is not None:
        left_out = write_map(out, found.code_map, study)
        typer.echo(f"{out}: written; confirm each entry, then name the file as `code_map` in the site file")
        if left_out:
            typer.echo(f"left out: {left_out:,} entries of the rarest codes, the file would be too large")
    typer.echo("These are counts of your patients: they are for this hospital alone.")
