"""Command-line changes to a study: the same checks as its file, one place."""

from __future__ import annotations

from typing import Any

from common.errors import ConfigurationError
from common.study import Study
from common.terms import parse


def override(study: Study, *, epsilon: str | None = None, seed: int | None = None, source: str) -> Study:
    """The study with another budget or seed. `epsilon` is a number > 0 or `none`. Raises ConfigurationError."""
    data: dict[str, Any] = study.model_dump(mode="json")
    if epsilon is not None:
        data["privacy"]["epsilon"] = _epsilon(epsilon)
    if seed is not None:
        data["simulation"]["seed"] = seed
    return parse(data, Study, source)


def _epsilon(text: str) -> float | None:
    if text.lower() in ("none", "inf"):
        return None
    try:
        return float(text)
    except ValueError:
        raise ConfigurationError(f"--epsilon {text!r}: expected a number > 0, or `none` for no noise") from None
