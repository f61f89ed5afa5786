"""A sweep small enough to run in seconds, and rows made up by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from common.privacy.plan import Plan
from simulations.planning import Job, plan_jobs
from simulations.rows import Bin, CalibrationRow, Estimate, RoundRow, Row, SiteRow, Subgroup, Traffic
from simulations.sweep import load_sweep

ROOT = Path(__file__).resolve().parents[2]
GROUPS = {"sex": {"static": "SEX//F", "levels": {"female": 1, "male": 0}}, "age": {"static": "AGE", "bands": [60]}}


def small_sweep(folder: Path, *, study: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A sweep file over two synthetic sites and three rounds; `study` changes sections of its study."""
    terms = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    terms["features"] = str(ROOT / "configs" / "features" / "synthetic.yaml")
    terms["sites"] = {"north": {"declared_patients": 160}, "east": {"declared_patients": 100}}
    terms["quorum"] = 2
    terms["model"] |= {"hidden": 6, "embedding": 4}
    terms["training"] |= {"rounds": 3}
    terms["simulation"] |= {"cohort_scale": 0.04}
    for section, change in (study or {}).items():
        terms[section] = terms[section] | change if isinstance(change, dict) and section != "sites" else change
    (folder / "study.yaml").write_text(yaml.safe_dump(terms, sort_keys=False))
    sweep = {
        "version": 1,
        "name": "small",
        "study": "study.yaml",
        "lines": ["fedavg-one-step"],
        "epsilon": [3],
        "seeds": [0],
        "resamples": 20,
        "scored_rounds": 1,
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep | changes, sort_keys=False))
    return folder / "sweep.yaml"


def jobs_of(folder: Path, **changes: Any) -> list[Job]:
    """The jobs of a small sweep."""
    file = small_sweep(folder, **changes)
    return plan_jobs(load_sweep(file), file, None, folder / "out")


def row(**changes: Any) -> Row:
    """A row that nobody computed."""
    site = SiteRow("north", 160, 320, 320, 40, Estimate(0.7, 0.6, 0.8), Estimate(0.3), Estimate(0.1, 0.0, 0.2), 0.86)
    made_up = Row(
        line="fedavg-one-step",
        study="small",
        settings={"model.cell": "gru"},
        terms={},
        epsilon=3.0,
        spent=2.9,
        delta=1e-5,
        seed=0,
        plan=Plan(0.25, 2.0, 3.0, 1e-5, 160, 4),
        weighting="precision",
        weights={"north": 1.0},
        sites=(site, replace(site, site="pooled")),
        calibration=CalibrationRow((Bin(20, 0.1, 0.2, 0.05, 0.4),), 0.9, -0.1, None),
        subgroups=(Subgroup("sex", "female", 200, 25, Estimate(0.7)), Subgroup("sex", "male", None, None, None)),
        rounds=(RoundRow(1, 0.6, 1.0),),
        bytes_per_round={"north": Traffic(100, 90)},
        parameters=25,
        seconds=1.5,
        cpu_seconds=1.0,
        study_digest="s",
        code_digest="c",
        versions={"python": "3"},
        research_mode=False,
    )
    return replace(made_up, **changes)
