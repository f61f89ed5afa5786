"""What a killed server was writing does not pile up in its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import ConfigurationError
from server import coordinator
from tests.server.processes import make_folder, new_keys
from tests.small import small_study

STUDY = small_study()


def test_a_server_that_starts_removes_what_a_killed_one_was_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Halves of checkpoint, summary and weights are gone, the checkpoint itself and files of others stay."""
    folder = make_folder(tmp_path / "study", STUDY, new_keys(STUDY))
    written = [folder.checkpoint, folder.state / "now.json", folder.path / "weights.safetensors"]
    halves = [path.with_name(f".{path.name}.ab12cd_x") for path in written]
    others = [folder.state / ".nfs0001", folder.path / ".gitignore"]
    for path in (*halves, *others):
        path.write_bytes(b"half")

    def stop(*_arguments: object) -> None:
        raise ConfigurationError("far enough")

    monkeypatch.setattr(coordinator, "load", stop)
    with pytest.raises(ConfigurationError, match="far enough"):
        coordinator.serve(folder, resume=True, plaintext=True)
    assert not any(path.exists() for path in halves)
    assert all(path.exists() for path in (folder.checkpoint, *others))
