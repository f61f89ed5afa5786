"""A hospital whose records a test may change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.client.prediction.predicting import Desk


@pytest.fixture
def desk(own_process: None, cohort: dict[str, Path], tmp_path: Path) -> Desk:
    """North: 80 training and 160 held-out patients."""
    shutil.copytree(cohort["north"], tmp_path / "records")
    return Desk.make(tmp_path, tmp_path / "records")
