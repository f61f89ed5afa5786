"""What the tests of enrolment and of what it leaves behind share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.client.coordinator import Authority, Coordinator
from tests.client.enrolling import Place
from tests.client.hospitals import with_key, write_site, write_study


@pytest.fixture
def own_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a command sets for its process is put back."""
    monkeypatch.setenv("FLWR_HOME", "")
    umask = os.umask(0o022)
    yield
    os.umask(umask)


@pytest.fixture
def place(own_process: None, cohort: dict[str, Path], tmp_path: Path) -> Iterator[Place]:
    study, authority = write_study(tmp_path), Authority(tmp_path / "ca")
    with Coordinator(study, authority.context()) as server:
        address = {"address": f"localhost:{server.port}", "ca": "ca/ca.crt"}
        path = write_site(tmp_path, cohort["north"], address)
        site, state, key = with_key(path)
        server.admit(key.public_key())
        yield Place(tmp_path, path, site, state, study, server)
