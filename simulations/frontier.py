"""From rows to a report: accuracy against privacy, for a person (HTML) and for a program (JSON, CSV).

`report.html` is one file that needs nothing else; `report.json` and `report.csv` hold what it shows, unrounded. All
three are made from one `Page`. Neither torch nor Flower is imported: a report is remade in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from common.errors import ConfigurationError
from common.report.data import to_csv, to_json
from common.report.html import render
from common.report.page import Page, Section
from common.study import load_study
from common.terms import read_yaml
from simulations.reporting.accuracy import accuracy_section
from simulations.reporting.curve import Sweep
from simulations.reporting.hospitals import hospitals_section
from simulations.reporting.making import making_section, settings_section
from simulations.reporting.names import Origin
from simulations.reporting.people import calibration_section, subgroups_section
from simulations.reporting.privacy import budget_section, epsilon_section, stamps, traffic_section
from simulations.reporting.rounds import rounds_section
from simulations.reporting.summary import summary_section
from simulations.rows import Row

NAMES = ("report.html", "report.json", "report.csv")


def write_report(rows: Sequence[Row], out: Path, origin: Origin | None = None) -> Path:
    """Write report.html, report.json and report.csv into the folder `out`; the path of the first.

    Args:
        rows: finished runs, in any order but that of the lines, which the report keeps.
        out: an existing or new folder; an older report in it is replaced.
        origin: study, configuration and command of the sweep, as far as they are known.

    Raises:
        DataError: no rows.
    """
    page = build_page(rows, origin or Origin())
    out.mkdir(parents=True, exist_ok=True)
    for name, text in zip(NAMES, (render(page), to_json(page), to_csv(page)), strict=True):
        (out / name).write_text(text, encoding="utf-8", errors="replace")
    return out / NAMES[0]


def origin_of(folders: Sequence[Path], rows: Sequence[Row]) -> Origin:
    """What folders of sweeps say of how they were made: their files, such that these alone make them again.

    Raises:
        ConfigurationError: a file that is missing or cannot be read, or sweeps of different studies.
    """
    first, *others = [load_study(folder / "study.yaml") for folder in folders]
    for folder, study in zip(folders[1:], others, strict=True):
        if study != first:
            raise ConfigurationError(f"{folder}: another study than in {folders[0]}; make a report of each")
    data = " --data FOLDER" if any(row.research_mode for row in rows) else ""
    names = [f"sweep-{number}" if others else "sweep" for number in range(1, len(folders) + 1)]
    sweeps = [read_yaml(folder / "sweep.yaml") for folder in folders]
    again = [f"runs/again-{name}" for name in names]
    runs = [f"wardround simulate sweep {name}.yaml{data} --out {to}" for name, to in zip(names, again, strict=True)]
    beside = "".join(f" --with {to}" for to in again[1:])
    return Origin(
        study=first,
        files=(
            *((f"{name}.yaml", _compact({**s, "study": "study.yaml"})) for name, s in zip(names, sweeps, strict=True)),
            ("study.yaml", _compact(read_yaml(folders[0] / "study.yaml"))),
        ),
        command="\n".join(
            ["# the files below, saved side by side", *runs, f"wardround simulate report {again[0]}{beside}"]
        ),
    )


def build_page(rows: Sequence[Row], origin: Origin) -> Page:
    """The report's content; a section for which the sweep has no numbers is left out."""
    sweep = Sweep(rows)
    at = sweep.headline(origin.study.privacy.epsilon if origin.study else None)
    sections: list[Section | None] = [
        summary_section(sweep, at, origin),
        epsilon_section(sweep),
        accuracy_section(sweep, at),
        hospitals_section(sweep, at),
        subgroups_section(sweep, at),
        calibration_section(sweep, at),
        rounds_section(sweep, at),
        budget_section(sweep, at),
        traffic_section(sweep, at),
        settings_section(sweep),
        making_section(sweep, origin),
    ]
    name = origin.study.name if origin.study else next(row.study for row in sweep.rows if row.line == sweep.main)
    return Page(
        title=f"Study “{name}”: accuracy and privacy",
        stamps=stamps(sweep),
        sections=tuple(section for section in sections if section is not None),
        made_by="Made by wardround, research software, not a medical device. This page loads nothing from anywhere.",
    )


def _compact(data: dict[str, Any]) -> str:
    """YAML with lists of words on one line: a code list of 400 entries would fill ten pages of paper."""
    text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)
    return text
