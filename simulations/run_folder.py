"""The run folder: everything a number can be traced back to, and a table for a person.

study.yaml           the study as it was run, features and seed included
run.json             versions, code digest, the table as data, the stamp
metrics.jsonl        a line per round: who took part, epsilon of the steps so far, pooled AUROC where taken
weights.safetensors  final weights by torch.nn's names
predictions.parquet  held-out predictions in MEDS evaluation columns (rows are patients: keep it local)
rounds.png           AUROC and epsilon by round
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from pathlib import Path

import yaml
from rich.table import Table

from common.errors import ConfigurationError
from common.privacy.accounting import epsilon_of
from common.provenance import code_digest
from common.report.figures import rounds_figure
from common.study import Study
from common.weights import to_bytes
from simulations.experiment import Progress, Result
from simulations.rows import SiteRow
from simulations.seeded import STAMP

VERSIONS = ("wardround", "torch", "opacus", "flwr", "dp-accounting", "numpy", "polars")
NO_PRIVACY = "epsilon is infinite: this run had no noise and no privacy"
RESEARCH = "research mode: the data were treated as public"


def create(out: Path, study: Study, seed: int) -> Path:
    """Make the run folder and put the study into it. Raises ConfigurationError if it exists and is not empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigurationError(f"--out {out} exists and is not empty; name a new folder, or remove it first")
    out.mkdir(parents=True, exist_ok=True)
    terms = study.model_dump(mode="json", exclude_none=True)
    terms["privacy"]["epsilon"] = study.privacy.epsilon
    terms["simulation"]["seed"] = seed
    (out / "study.yaml").write_text(yaml.safe_dump(terms, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return out


def append_metrics(out: Path, progress: Progress) -> None:
    """Add a round's line to metrics.jsonl."""
    line = {
        "round": progress.round_number,
        "seconds": round(progress.seconds, 4),
        "auroc": progress.auroc,
        "epsilon": {site: _number(value) for site, value in progress.epsilon.items()},
        "refused": progress.refused,
    }
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def finish(out: Path, result: Result, lines: dict[str, Result]) -> None:
    """Write weights, predictions, figure and run.json; `lines` are further runs by name, of which the scores stay."""
    (out / "weights.safetensors").write_bytes(to_bytes(result.weights))
    result.predictions.write_parquet(out / "predictions.parquet")
    taken = [p for p in result.history if p.auroc is not None]
    rounds_figure(
        out / "rounds.png",
        rounds=[p.round_number for p in taken],
        auroc=[p.auroc for p in taken if p.auroc is not None],
        epsilon=[max(p.epsilon.values()) for p in taken],
        budget=result.study.privacy.epsilon,
        best_possible=result.score().best_possible,
        title=f"{result.study.name}: pooled held-out AUROC and epsilon by round",
    )
    facts = {
        "study": result.study.name,
        "study_digest": result.study.digest(),
        "code_digest": code_digest(),
        "seed": result.seed,
        "stamps": stamps(result.study),
        "plan": {name: _number(value) for name, value in vars(result.study.plan()).items()},
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "table": _table(result),
        "lines": {name: _table(line) for name, line in lines.items()},
    }
    (out / "run.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def stamps(study: Study) -> list[str]:
    """What must be said beside the numbers of a simulation."""
    first = NO_PRIVACY if study.privacy.epsilon is None else STAMP
    return [first] if study.simulation.cohort else [first, RESEARCH]


def table(result: Result, title: str) -> Table:
    """The final table for a terminal."""
    epsilon = epsilon_of(result.study.plan())
    out = Table(title=title, title_justify="left")
    out.add_column("site", overflow="fold")
    for column in ("declared patients", "epsilon", "AUROC [95 % interval]", "best possible"):
        out.add_column(column, justify="right", no_wrap=column.startswith("AUROC"))
    for score in result.scores:
        if score is result.scores[-1]:
            out.add_section()
        low, value, high = (shown(number) for number in (score.auroc.low, score.auroc.value, score.auroc.high))
        out.add_row(
            score.site,
            f"{score.declared_patients:,}",
            "none" if math.isinf(epsilon) else f"{math.ceil(epsilon * 1000) / 1000:.3f}",
            f"{value} [{low}, {high}]",
            "unknown" if score.best_possible is None else f"{score.best_possible:.3f}",
        )
    return out


def shown(number: float | None) -> str:
    """A metric to three digits, or a dash where it has no value."""
    return "-" if number is None else f"{number:.3f}"


def spent(epsilon: dict[str, float]) -> str:
    """Epsilon of the steps so far, per site; said once where it is the same at all of them."""
    shown = {site: "none" if math.isinf(value) else f"{value:.2f}" for site, value in epsilon.items()}
    if len(set(shown.values())) == 1:
        return f"{next(iter(shown.values()))} at each of {len(shown)} sites"
    return "  ".join(f"{site} {value}" for site, value in shown.items())


def lines_table(result: Result, lines: dict[str, Result]) -> Table:
    """AUROC of the study and of each line beside it, on every site's held-out patients and pooled.

    A site alone is scored on its own patients; the `alone` lines make one row.
    """
    sites = [score.site for score in result.scores]
    rows: dict[str, dict[str, float | None]] = {
        result.study.training.recipe: {score.site: score.auroc.value for score in result.scores}
    }
    for name, line in lines.items():
        row, _, site = name.partition(": ")
        rows.setdefault(row, {})
        for score in line.scores:
            if site in ("", score.site):
                rows[row][score.site] = score.auroc.value
    out = Table(title="AUROC of the lines beside it, same records and budget", title_justify="left")
    out.add_column("line")
    for site in sites:
        out.add_column(site, justify="right")
    for name, scores in rows.items():
        out.add_row(name, *(shown(scores[site]) if site in scores else "" for site in sites))
    return out


def _table(result: Result) -> list[dict[str, object]]:
    """The scores as data; every site of a study has the same epsilon."""
    epsilon = _number(epsilon_of(result.study.plan()))
    return [_row(score, epsilon) for score in result.scores]


def _row(score: SiteRow, epsilon: float | None) -> dict[str, object]:
    return {
        "site": score.site,
        "declared_patients": score.declared_patients,
        "epsilon": epsilon,
        "auroc": score.auroc.value,
        "auroc_low": score.auroc.low,
        "auroc_high": score.auroc.high,
        "auprc": score.auprc.value,
        "brier": score.brier.value,
        "best_possible": score.best_possible,
    }


def _number(value: float) -> float | None:
    """JSON has neither infinity (no privacy) nor NaN (no interval): both are null."""
    return value if math.isfinite(value) else None
