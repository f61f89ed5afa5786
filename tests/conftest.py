"""What several rooms' tests share: a tiny cohort on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from simulations.cohort import PRESETS, write_cohort


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """MEDS directory by site: north 80, east 50, south 30 and west 16 training patients."""
    return {p.name: p for p in write_cohort(PRESETS["medium"], 3, tmp_path_factory.mktemp("tiny") / "c", scale=0.02)}
