"""A study's folder and its server as a process of its own, for the tests that kill it."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from common.keys import generate
from common.models.network import build_network
from common.study import Study
from common.training import state_of
from server.checkpoint import Checkpoint, save
from server.folder import ServerFolder, create
from tests.server.hospitals import wait_until

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300.0  # seconds; a machine may be busy with many such tests


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def make_folder(path: Path, study: Study, keys: dict[str, EllipticCurvePrivateKey], **changes: Any) -> ServerFolder:
    """A study's folder on loopback with these sites admitted; `changes` go into server.yaml."""
    folder = create(path, study, ("localhost",), port=free_port())
    terms = folder.terms.model_copy(update={"host": "127.0.0.1", **changes})
    (path / "server.yaml").write_text(yaml.safe_dump(terms.model_dump(mode="json")))
    save(folder.checkpoint, Checkpoint(0, state_of(build_network(study))), study.digest())
    for site, key in keys.items():
        folder.admit(site, key.public_key())
    return ServerFolder(path, terms)


@dataclass
class Server:
    """`wardround server run` in a process of its own."""

    folder: ServerFolder
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.output = self.folder.path.parent / f"{self.folder.path.name}.out"
        command = [sys.executable, "-m", "wardround", "server", "run", str(self.folder.path / "study.yaml")]
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [*command, *self.arguments],
                cwd=ROOT,
                stdout=output,
                stderr=output,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **self.environment},
            )

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"localhost:{self.folder.terms.port}"

    def health(self) -> dict[str, Any] | None:
        """What it says of itself; None while it is not up."""
        try:
            trust = ssl.create_default_context(cafile=self.folder.authority)
            with httpx.Client(verify=trust, trust_env=False) as client:
                answer: dict[str, Any] = client.get(f"https://{self.address}/health").json()
                return answer
        except httpx.TransportError:
            return None

    def up(self) -> None:
        """Wait until it answers."""

        def holds() -> bool:
            assert self.process.poll() is None, self.output.read_text()
            return self.health() is not None

        wait_until(holds, PATIENCE)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait; returns the exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout=PATIENCE)

    def finish(self) -> str:
        """Wait for its own end; returns what it printed."""
        assert self.process.wait(timeout=PATIENCE) == 0, self.output.read_text()
        return self.output.read_text()


@contextmanager
def server_of(folder: ServerFolder, *arguments: str, **environment: str) -> Iterator[Server]:
    """A server that is up, and gone afterwards."""
    server = Server(folder, arguments, environment)
    try:
        server.up()
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


def new_keys(study: Study) -> dict[str, EllipticCurvePrivateKey]:
    """A key for each site."""
    return {site: generate() for site in study.sites}
