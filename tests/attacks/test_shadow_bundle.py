"""`flwr run` with an app that has our modules' names: what stock Flower would unpack, put first on the path and import.

Twice. At our server the command is refused. Then the worst case: the coordinator runs stock Flower itself, behind a
proxy that gives the answers of a wardround server to `GET /health`, and the hospital's own client is connected to it.
The bundle's server part runs, at the coordinator: so the bundle would work. At the hospital nothing of it does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from flwr.proto import fleet_pb2
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from client.checks import begin_ledger
from client.enrolment import Enrolment
from client.ledger_file import read_accounts
from client.state import LEDGER, LOG
from common.keys import as_flower_bytes
from common.provenance import code_digest
from common.records import WIRE_VERSION
from tests.client.hospitals import with_key, write_site, write_study
from tests.server.hospitals import wait_until
from tests.server.processes import ROOT, free_port, make_folder, new_keys, server_of
from tests.small import small_study

pytestmark = pytest.mark.full

PROJECT = """
[project]
name = "shadow"
version = "1.0.0"
description = ""
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "mallory"
[tool.flwr.app.components]
serverapp = "server.rounds:app"
clientapp = "client.app:app"
[tool.flwr.app.config]
"""
MARK = "from pathlib import Path\n(Path({folder!r}) / ('imported ' + __name__)).touch()\n"
SHADOWS = (
    "wardround",
    "client.app",
    "client.site",
    "client.ledger",
    "client.hospital",
    "common.records",
    "common.study",
)
CLIENT = """
from flwr.clientapp import ClientApp
app = ClientApp()
@app.train()
def train(message, context):
    raise SystemExit
"""
SERVER = """
import time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()
@app.main()
def main(grid, context):
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.2)
    content = RecordDict({{"fab": ConfigRecord({{"run": "client.app"}})}})
    asked = [Message(content, dst_node_id=node, message_type="train") for node in nodes]
    replies = list(grid.send_and_receive(asked, timeout=120))
    said = [str(dict(reply.content["reply"])) if reply.has_content() else "error" for reply in replies]
    (Path({folder!r}) / "replies.part").write_text("\\n".join(said))
    (Path({folder!r}) / "replies.part").rename(Path({folder!r}) / "replies")
"""
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


def write_bundle(app: Path, marks: Path) -> Path:
    """An app whose modules shadow ours; importing one leaves a mark."""
    marks.mkdir()
    for name in (*SHADOWS, "server.rounds"):
        path = app / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        more = {"client.app": CLIENT, "server.rounds": SERVER.format(folder=str(marks))}.get(name, "")
        path.write_text(MARK.format(folder=str(marks)) + more)
    (app / "__init__.py").unlink(missing_ok=True)
    (app / "pyproject.toml").write_text(PROJECT)
    return app


def flwr_run(app: Path, home: Path, connection: str) -> subprocess.CompletedProcess[str]:
    """Flower's own command."""
    home.mkdir()
    (home / "config.toml").write_text(f'[superlink]\ndefault = "target"\n\n[superlink.target]\n{connection}\n')
    command = [sys.executable, "-c", "from flwr.cli.app import app; app()", "run", str(app), "target"]
    environment = {**os.environ, **QUIET, "FLWR_HOME": str(home)}
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=900, check=False)


def test_our_server_knows_no_such_command(tmp_path: Path) -> None:
    """`flwr run` fails, the log says what was asked for, and no line of the bundle ran."""
    study = small_study()
    folder = make_folder(tmp_path / "study", study, new_keys(study))
    app = write_bundle(tmp_path / "app", tmp_path / "marks")
    connection = f'address = "localhost:{folder.terms.port}"\nroot-certificates = "{folder.authority}"\n'
    with server_of(folder):
        ran = flwr_run(app, tmp_path / "home", connection)
        assert ran.returncode != 0, ran.stdout + ran.stderr
        assert "'POST' '/v1/control/" in (folder.state / "server.log").read_text()
    assert list((tmp_path / "marks").iterdir()) == []


class Front:
    """A proxy in front of a stock SuperLink that says of itself what a wardround server says."""

    def __init__(self, upstream: int, health: dict[str, Any]) -> None:
        self.calls: list[str] = []
        front = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._say(200, json.dumps({**health, "time": time.time()}).encode(), "application/json")

            def do_POST(self) -> None:
                front.calls.append(self.path)
                body = self.rfile.read(int(self.headers.get("content-length", "0")))
                kept = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")}
                answer = httpx.post(
                    f"http://127.0.0.1:{upstream}{self.path}", content=body, headers=kept, trust_env=False, timeout=300
                )
                self._say(answer.status_code, answer.content, answer.headers.get("content-type", ""))

            def _say(self, status: int, body: bytes, media: str) -> None:
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.send_header("content-type", media)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the name is the base class's)
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@dataclass
class Story:
    """What the bundle's server part heard, the marks, the client's calls, its log and its ledger's studies."""

    replies: str
    marks: set[str]
    calls: set[str]
    log: str
    studies: int


@pytest.fixture(scope="module")
def story(cohort: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("shadow")
    study = write_study(folder)
    health = {"wardround": "0.1.0", "wire": WIRE_VERSION, "study": study.digest(), "code": code_digest()}
    app = write_bundle(folder / "app", folder / "marks")
    port = free_port()
    with ExitStack() as stack:
        front = Front(port, health)
        stack.callback(front.close)

        def start(name: str, *arguments: str, **variables: str) -> None:
            out = stack.enter_context((folder / f"{name}.out").open("wb"))
            environment = {**os.environ, **QUIET, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=folder,
                env=environment,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
            stack.callback(end, process)

        superlink = "from flwr.superlink.cli import flower_superlink; flower_superlink()"
        no_installing = "--disable-runtime-dependency-installation"
        arguments = ("-c", superlink, "--insecure", no_installing, "--host", "127.0.0.1", "--port", str(port))
        # Its processes are found on the path, and its modules are not the bundle's unless Flower puts them there.
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        (folder / "stock").mkdir()
        start("superlink", *arguments, FLWR_HOME=str(folder / "stock"), PATH=path, PYTHONPATH="")
        wait_until(lambda: answers(port), 1200)

        place = write_site(folder, cohort["north"], {"address": f"127.0.0.1:{front.port}", "plaintext": True})
        site, state, key = with_key(place)
        begin_ledger(site, state, np.array([], np.int64))
        Enrolment.of(site, study, "", "2027-01-01T00:00:00+00:00").write(state)
        fleet = FleetHttpClient.from_server_address(
            f"127.0.0.1:{port}", True, None, interceptors=[NodeAuthHttpInterceptor(key, key.public_key())]
        )
        public = as_flower_bytes(key.public_key())
        fleet.RegisterNode(fleet_pb2.RegisterNodeFleetRequest(public_key=public))
        fleet.close()
        start("client", "-m", "wardround", "client", "run", str(place))
        wait_until(lambda: "connected to" in ((state / LOG).read_text() if (state / LOG).exists() else ""), 1200)

        ran = flwr_run(app, folder / "home", f'address = "127.0.0.1:{port}"\ninsecure = true\n')
        assert ran.returncode == 0, ran.stdout + ran.stderr
        replies = folder / "marks" / "replies"
        wait_until(replies.exists, 600)
        yield Story(
            replies.read_text(),
            {mark.name for mark in (folder / "marks").iterdir()},
            set(front.calls),
            (state / LOG).read_text(),
            len(read_accounts(state / LEDGER)[0].studies),
        )


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it started: they are a session of their own."""
    if process.poll() is None:
        os.killpg(process.pid, 15)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def test_the_bundle_works_where_stock_flower_runs_it(story: Story) -> None:
    """At the coordinator's own stock server its modules were imported: nothing is wrong with the bundle."""
    assert "imported server.rounds" in story.marks


def test_nothing_of_it_ran_at_the_hospital(story: Story) -> None:
    """None of the client's modules was imported anywhere, and the client never asked for a bundle or a run."""
    assert not {f"imported {name}" for name in SHADOWS} & story.marks
    assert {call.removeprefix("/v1/fleet/") for call in story.calls} <= {
        *("pull-messages", "pull-object", "confirm-message-received", "push-messages", "push-object"),
        *("activate-node", "deactivate-node", "send-node-heartbeat"),
    }


def test_its_message_got_one_word(story: Story) -> None:
    """The hospital answered MALFORMED, said why in its log, and charged nobody."""
    assert "'status': 'MALFORMED'" in story.replies
    assert "a message was refused" in story.log
    assert story.studies == 0
