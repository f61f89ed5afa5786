"""Without TLS a study is for one machine: server and client refuse plaintext anywhere else, by whatever mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from client.fleet import Fleet
from client.network import NetworkError
from client.site_file import load_site_file
from common.keys import generate
from tests.client.coordinator import Authority, Coordinator
from tests.client.hospitals import write_site, write_study
from tests.server.processes import ROOT, make_folder, new_keys
from tests.small import small_study


def refused(*arguments: str) -> str:
    """What a command of `wardround` says as it refuses: one line, status 2."""
    done = subprocess.run(
        [sys.executable, "-m", "wardround", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_a_server_that_others_can_reach_does_not_serve_plaintext(tmp_path: Path) -> None:
    """`server run --plaintext` with a folder that listens on every address is refused before the port opens."""
    study = small_study(privacy={"sampling_rate": 1.0})
    folder = make_folder(tmp_path / "study", study, new_keys(study), host="0.0.0.0")
    said = refused("server", "run", str(folder.path / "study.yaml"), "--plaintext")
    assert "--plaintext with host 0.0.0.0: only on this machine" in said


@pytest.mark.parametrize("command", ["keygen", "enrol", "run", "leave", "budget"])
def test_a_client_does_not_speak_plaintext_to_another_machine(command: str, tmp_path: Path) -> None:
    """A site file with `plaintext: true` and an address elsewhere is refused by every command."""
    path = write_site(tmp_path, tmp_path, {"address": "192.0.2.1:8643", "plaintext": True})
    assert "server.plaintext is for this machine alone" in refused("client", command, str(path))


@pytest.mark.parametrize("served_with_tls", [True, False])
def test_nothing_falls_back_to_plaintext(served_with_tls: bool, tmp_path: Path) -> None:
    """A client and a server of which only one has TLS do not understand each other; nothing readable goes out."""
    study = write_study(tmp_path)
    authority = Authority(tmp_path / "ca")
    with Coordinator(study, authority.context() if served_with_tls else None) as server:
        address = f"localhost:{server.port}"
        terms = {"address": address, "plaintext": True} if served_with_tls else {"address": address, "ca": "ca/ca.crt"}
        site = load_site_file(write_site(tmp_path, tmp_path, terms))
        with Fleet(site.server, generate()) as fleet, pytest.raises(NetworkError):
            fleet.health()
        assert server.calls == []
