"""`wardround client check`: do this hospital's records fit the study? Offline, and without torch.

Two pages: OUT/local is for this hospital alone, OUT/share.html may be shared. They lie apart so that nobody sends the
wrong one by sending a folder's only HTML file.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from client.commands.opening import SiteArgument, opened

if TYPE_CHECKING:
    from client.inspection.requirements import Inspection
    from client.site_file import SiteFile
    from common.study import Study

QUESTION = """\
{numbers}
These numbers are exact: no epsilon covers them, and what was shared cannot be taken back. The ledger will note it;
a hospital without a ledger begins one now, with the budget of its policy for life.
Put them on the page that may be shared?"""


def command(
    site_file: SiteArgument,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Write the two pages here; absent or empty.")
    ] = None,
    disclose: Annotated[
        list[str] | None,
        typer.Option("--disclose", metavar="NAME", help="Put this exact number on the shared page; may be repeated."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="With --disclose: do not ask.")] = False,
) -> None:
    """Check the records of SITE.yaml against its study; exit status 0 if every requirement holds, else 1."""
    from client.inspection.disclosures import check_names
    from client.inspection.requirements import inspect
    from client.site_file import study_of
    from common.errors import ConfigurationError

    chosen = disclose or []
    check_names(chosen)
    if chosen and out is None:
        raise ConfigurationError("--disclose needs --out FOLDER: the ledger notes the file in which a number stands")
    if out is not None and (out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir())))):
        raise ConfigurationError(f"{out}: exists and is not empty; name a new folder")
    site, state = opened(site_file, create=True)
    study = study_of(site)
    found = inspect(site, study, state)
    for finding in found.findings:
        typer.echo(f"{finding.answer:<11} {finding.name:<15} {finding.detail}")
    if out is not None:
        _write(out, site, study, found, chosen, yes=yes)
    typer.echo("These are counts of your patients: they are for this hospital alone.")
    raise typer.Exit(0 if found.passed else 1)


def _write(out: Path, site: SiteFile, study: Study, found: Inspection, chosen: list[str], *, yes: bool) -> None:
    """Both pages; what is disclosed is in the ledger before the page that holds it is there."""
    from hashlib import sha256

    from client.inspection.disclosures import note, numbers
    from client.inspection.pages import local, shareable
    from common.keys import write_private
    from common.report.data import to_json
    from common.report.html import render

    disclosed = numbers(found, chosen)
    if disclosed and not yes:
        listed = "\n".join(f"  {name}: {text} ({what})" for name, what, text in disclosed)
        typer.confirm(QUESTION.format(numbers=listed), abort=True)
    page = local(study, site.site, found)
    shared = render(shareable(study, site.site, found.findings, disclosed)).encode()
    (out / "local").mkdir(mode=0o700, parents=True, exist_ok=True)
    write_private(out / "local" / "check.html", render(page).encode())
    write_private(out / "local" / "check.json", to_json(page).encode())
    if disclosed:
        note(site, [name for name, _, _ in disclosed], sha256(shared).hexdigest())
    write_private(out / "share.html", shared)
    typer.echo(f"{out / 'local' / 'check.html'}: for this hospital alone")
    typer.echo(f"{out / 'share.html'}: may be shared")
