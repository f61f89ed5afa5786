"""Command-line changes to a study: the same checks as its file, one place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.errors import ConfigurationError
from common.study import Study
from common.terms import parse


def override(
    study: Study, *, epsilon: str | None = None, seed: int | None = None, data: Path | None = None, source: str
) -> Study:
    """The study with another budget, seed or records. `epsilon` is a number > 0 or `none`. Raises ConfigurationError.

    `data` takes the place of a synthetic cohort in the terms, too: what is said beside the numbers, and the study in
    the run's folder, follow from them.
    """
    terms: dict[str, Any] = study.model_dump(mode="json")
    if epsilon is not None:
        terms["privacy"]["epsilon"] = _epsilon(epsilon)
    if seed is not None:
        terms["simulation"]["seed"] = seed
    if data is not None:
        terms["simulation"] |= {"cohort": None, "data": str(data.absolute())}
    return parse(terms, Study, source)


def _epsilon(text: str) -> float | None:
    if text.lower() in ("none", "inf"):
        return None
    try:
        return float(text)
    except ValueError:
        raise ConfigurationError(f"--epsilon {text!r}: expected a number > 0, or `none` for no noise") from None
