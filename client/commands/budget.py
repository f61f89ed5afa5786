"""`wardround client budget`: what this hospital's patients have been charged, and what is left. Starts without torch.

Reads the ledger beside a client that writes to it. With `--accept-restore` it is also the only way to go on with a
ledger that was put back to an older copy: a decision that only a person can take.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.errors import ConfigurationError, WardroundError

if TYPE_CHECKING:
    from client.accounts import Accounts
    from client.site_file import SiteFile
    from common.privacy.plan import Plan
    from common.study import Study

WIDTH = 120  # a narrower terminal wraps the lines: numbers that are cut off would be worse
QUESTION = """\
This ledger is to be used although entries that it once had are lost.
Every plan in it, and every plan that its anchor knows, will count as fully spent: no study of before goes on here.
A study that this hospital took part in since the copy was made, and that the table and the anchor do not name, must
be named with --lost STUDY.yaml; its cost to the patients would be forgotten otherwise.
Is nothing missing, and shall the ledger be used again?"""


def command(
    site_file: Annotated[Path | None, typer.Argument(metavar="[SITE.yaml]", help="The hospital's site file.")] = None,
    state: Annotated[Path | None, typer.Option("--state", help="The state folder, instead of a site file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    accept_restore: Annotated[
        bool, typer.Option("--accept-restore", help="Go on with an older copy of the ledger; ends all its studies.")
    ] = False,
    lost: Annotated[
        list[Path] | None, typer.Option("--lost", help="With --accept-restore: a study that the ledger forgot.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="With --accept-restore: do not ask.")] = False,
) -> None:
    """Show the privacy budget of SITE.yaml: what each study was charged, and what is left."""
    from client.ledger_file import read_accounts
    from client.ledger_place import ledger_path
    from client.state import LEDGER

    names: dict[str, str] = {}
    if site_file is not None and state is None:
        from client.site_file import load_site_file

        site = load_site_file(site_file)
        names = _names(site)
        ledger = ledger_path(site)
        if accept_restore:
            _accept(site, ledger, lost or [], yes, names)
    elif state is not None and site_file is None and not accept_restore:
        ledger = state / LEDGER
    else:
        raise ConfigurationError("name a site file, or --state DIR without --accept-restore: that needs the site file")
    if lost and not accept_restore:
        raise ConfigurationError("--lost goes with --accept-restore")
    accounts, head = read_accounts(ledger)
    found = summary(accounts, head, names)
    if as_json:
        typer.echo(json.dumps({"ledger": str(ledger), **found}, indent=2, allow_nan=False))
    else:
        show(found, str(ledger))


def _accept(site: SiteFile, ledger: Path, lost: list[Path], yes: bool, names: dict[str, str]) -> None:
    """Ask, and write that entries are lost. Standard output stays free for the result."""
    from client.ledger import DEFAULT_COHORT
    from client.ledger_file import accept_restore, read_accounts
    from common.study import load_study

    studies = [load_study(path) for path in lost]
    names |= {study.digest(): study.name for study in studies}
    if ledger.exists():
        accounts, head = read_accounts(ledger)
        show(summary(accounts, head, names), str(ledger), to_errors=True)
    else:
        typer.echo(f"{ledger}: there is none; a new one will be made", err=True)
    if not yes:
        typer.confirm(QUESTION, abort=True, err=True)
    written = accept_restore(
        ledger,
        site.policy.max_epsilon,
        site.policy.delta,
        site.cohort or DEFAULT_COHORT,
        anchor=Path(site.anchor) if site.anchor is not None else None,
        lost=_all_plans(studies),
    )
    typer.echo(f"accepted; {len(written.plans)} plan(s) were charged that this copy did not know", err=True)


def _all_plans(studies: list[Study]) -> dict[str, Plan]:
    """What studies may have charged: training, and metrics, whether or not they were told."""
    from client.accounts import metrics_of

    plans = {study.digest(): study.plan() for study in studies}
    metrics = {metrics_of(study.digest()): study.metrics_plan() for study in studies}
    return plans | {charged: plan for charged, plan in metrics.items() if plan is not None}


def _names(site: SiteFile) -> dict[str, str]:
    """Digest -> name of the study that the site file names; empty if that file cannot be read."""
    from common.study import load_study

    try:
        study = load_study(Path(site.study))
    except WardroundError:
        return {}
    return {study.digest(): study.name}


def summary(accounts: Accounts, head: str, names: dict[str, str]) -> dict[str, Any]:
    """What the command shows, as plain data.

    Args:
        accounts: of the ledger.
        head: of the ledger.
        names: study digest -> name, as far as known.
    """
    from client.accounts import METRICS, study_of
    from common.privacy.accounting import epsilon_of

    studies = [
        {
            "study": study_of(digest),
            "part": "metrics" if digest.endswith(METRICS) else "training",
            "name": names.get(study_of(digest)),
            "cohort": account.cohort,
            "sampling_rate": account.plan.sampling_rate,
            "noise_multiplier": account.plan.noise_multiplier,
            "clip": account.plan.clip,
            "delta": account.plan.delta,
            "steps_taken": account.steps_taken,
            "steps_priced": account.plan.priced_steps,
            "spare_steps_left": account.spares_left,
            "releases": len(account.released),
            "ended_by_restore": account.forfeited,
            "epsilon": epsilon_of(account.plan),
        }
        for digest, account in accounts.studies.items()
    ]
    cohorts = [
        {
            "cohort": name,
            "cap": cohort.cap,
            "delta": cohort.delta,
            "order": cohort.order,
            "plans": len(cohort.plans),
            "studies": len({study_of(charged) for charged in cohort.charges}),
            "charged": cohort.spent,
            "left": max(0.0, cohort.cap - cohort.spent),
        }
        for name, cohort in accounts.cohorts.items()
    ]
    counts = {"entries": accounts.count, "restored": accounts.restored, "head": head}
    disclosed = [{"name": entry.name, "file": entry.file} for entry in accounts.disclosed]
    return {**counts, "cohorts": cohorts, "studies": studies, "disclosed": disclosed}


def show(found: dict[str, Any], ledger: str, *, to_errors: bool = False) -> None:
    """Print a summary as a table, and a line per cohort."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True, stderr=to_errors)
    console.width = max(console.width, WIDTH)
    if found["studies"]:
        table = Table(title=f"{ledger}: {found['entries']} entries", title_justify="left")
        for heading in ("study", "cohort", "q", "sigma", "C", "delta", "steps", "spares", "releases", "epsilon"):
            table.add_column(heading, justify="left" if heading in ("study", "cohort") else "right", no_wrap=True)
        for s in found["studies"]:
            table.add_row(
                _label(s),
                s["cohort"],
                *(f"{s[key]:g}" for key in ("sampling_rate", "noise_multiplier", "clip", "delta")),
                f"{s['steps_taken']}/{s['steps_priced']}",
                str(s["spare_steps_left"]),
                str(s["releases"]),
                f"{s['epsilon']:.3f}",
            )
        console.print(table)
    else:
        console.print(f"{ledger}: no study was charged")
    for c in found["cohorts"]:
        charged = "nothing charged"
        if c["studies"] == 1:
            charged = f"epsilon {c['charged']:.3f} charged (by PLD: one {'plan' if c['plans'] == 1 else 'study'})"
        elif c["plans"]:  # what holds whichever studies are chosen after a look at these is the cap alone
            how = f"by the Renyi filter at order {c['order']:g}"
            most = max(c["cap"], c["charged"])  # more than the cap only where a restore has charged lost plans
            charged = f"epsilon {c['charged']:.3f} so far, at most {most:g} in the end ({how})"
        console.print(f"cohort {c['cohort']}: {charged}, {c['left']:.3f} left of {c['cap']:g} at delta {c['delta']:g}")
    for d in found["disclosed"]:
        console.print(f"disclosed, exact, not covered by epsilon: {d['name']} (file sha256 {d['file'][:12]}..)")
    if found["restored"]:
        console.print(f"entries were lost and accepted as lost {found['restored']} time(s)")


def _label(study: dict[str, Any]) -> str:
    """A row's first cell: digest, name, and what is not plain training."""
    words = [study["study"][:12], study["name"] or ""]
    words += ["metrics"] if study["part"] == "metrics" else []
    words += ["(ended by a restore)"] if study["ended_by_restore"] else []
    return " ".join(words)
