"""How the numbers were made: other settings, configuration, versions, and the command that makes them again."""

from __future__ import annotations

from common.report.page import Block, Cell, Listing, Paragraph, Section, Table
from common.report.words import UNKNOWN, budget, listed, score
from simulations.reporting.curve import Settings, Sweep, auroc_at
from simulations.reporting.names import Origin, name_of, setting_words
from simulations.rows import Row


def settings_section(sweep: Sweep) -> Section | None:
    """The sweep's other settings beside the one that the page is about."""
    if not sweep.others:
        return None
    lines = []
    for settings in (sweep.settings, *sweep.others):
        rows = sweep.under(settings)
        for line in dict.fromkeys(row.line for row in rows):
            for epsilon in dict.fromkeys(row.epsilon for row in rows if row.line == line):
                chosen = _one_per_seed(sweep, settings, line, epsilon)
                here = auroc_at(chosen)
                cell = score(here.value, here.low, here.high) if here is not None else Cell(UNKNOWN)
                runs = Cell(str(len(chosen)), len(chosen))
                lines.append((Cell(setting_words(settings)), Cell(name_of(line)), Cell(budget(epsilon)), cell, runs))
    return Section(
        "settings",
        "Other settings",
        (
            Paragraph(f"Everything else on this page is about: {setting_words(sweep.settings)}."),
            Table(
                "settings-data",
                "AUROC of every line under every setting, all held-out patients",
                ("setting", "line", "epsilon", "AUROC", "runs"),
                tuple(lines),
                "Mean over the runs; below it the widest 95 % interval of the runs.",
            ),
        ),
    )


def making_section(sweep: Sweep, origin: Origin) -> Section:
    """Everything that is needed to make the page again, and to see whether it is the same."""
    blocks: list[Block] = []
    if origin.command:
        blocks.append(Listing("command", "Command that makes these runs and this page again", origin.command))
    blocks.append(_provenance(sweep.all))
    blocks += [
        Listing(f"file-{number}", f"Configuration: {name}", text)
        for number, (name, text) in enumerate(origin.files, start=1)
    ]
    return Section("making", "How this page was made", tuple(blocks))


def _provenance(rows: tuple[Row, ...]) -> Table:
    digests = sorted({row.code_digest for row in rows})
    facts = [
        ("finished runs", f"{len(rows):,}"),
        ("seeds", listed([str(seed) for seed in sorted({row.seed for row in rows})])),
        ("processor time of all runs", _hours(sum(row.cpu_seconds for row in rows))),
        ("code (sha256)", " ".join(digests)),
        ("studies (sha256)", " ".join(sorted({row.study_digest for row in rows}))),
    ]
    if len(digests) > 1:
        facts.append(("mixed code", "runs of different program versions stand side by side; run them again"))
    names = sorted({name for row in rows for name in row.versions})
    facts += [(name, listed(sorted({row.versions[name] for row in rows if name in row.versions}))) for name in names]
    return Table(
        "provenance",
        "Program, versions and runs",
        ("what", "value"),
        tuple((Cell(what), Cell(value)) for what, value in facts),
    )


def _one_per_seed(sweep: Sweep, settings: Settings, line: str, epsilon: float | None) -> list[Row]:
    """A line's rows under a setting, the line's own weighting where there are several."""
    own = sweep.pick(line, epsilon, settings=settings)
    return own or [row for row in sweep.under(settings) if row.line == line and row.epsilon == epsilon]


def _hours(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
