"""Somebody with the authority's certificate, and nothing else, against a running server: refused, and in its log.

On stock Flower the same calls run code at every hospital. The attacks come one after the other against one server
process; afterwards two honest hospitals take part, and the study ends as if nothing had happened.
"""

from __future__ import annotations

import base64
import datetime
import logging
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.proto import control_pb2, fab_pb2, fleet_pb2, run_pb2, runtime_pb2
from flwr.proto.node_pb2 import Node
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.primitives.asymmetric import sign_message
from flwr.superlink.main import create_app

from common.keys import as_flower_bytes, generate
from common.study import Study
from server.progress import read_now
from server.public import REFUSALS_LINES, REFUSALS_SECONDS, Refusals
from tests.server.hospitals import Connection, Hospital, open_site, wait_until
from tests.server.processes import Server, make_folder, new_keys, server_of
from tests.small import small_study

PROTOBUF = {"content-type": "application/protobuf"}
CODE = b"PK\x03\x04 import os; os.system('id')"
STUDY = small_study(privacy={"sampling_rate": 1.0})  # whose price has a closed form


@dataclass
class Target:
    """A running server, and what a third party has: its address and ca.crt."""

    server: Server
    study: Study
    keys: dict[str, EllipticCurvePrivateKey]
    made: list[Connection] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"https://{self.server.address}"

    def client(self) -> httpx.Client:
        trust = ssl.create_default_context(cafile=self.server.folder.authority)
        return httpx.Client(base_url=self.url, verify=trust, trust_env=False)

    def stranger(self, key: EllipticCurvePrivateKey) -> Connection:
        self.made.append(Connection(self.server.address, key, self.server.folder.authority))
        return self.made[-1]

    def log(self) -> str:
        return (self.server.folder.state / "server.log").read_text()

    def holds(self, content: bytes) -> bool:
        """Whether any file of the study's folder holds these bytes."""
        return any(content in read(path) for path in self.server.folder.path.rglob("*") if path.is_file())


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:  # the database's journal comes and goes
        return b""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    keys = new_keys(STUDY)
    folder = make_folder(tmp_path_factory.mktemp("target") / "study", STUDY, keys)
    with server_of(folder) as server:
        wait_until(lambda: (read_now(folder.state / "now.json") or {}).get("phase") == "waiting")
        made = Target(server, STUDY, keys)
        yield made
        for connection in made.made:
            connection.client.close()


def status_of(error: pytest.ExceptionInfo[httpx.HTTPStatusError]) -> int:
    return error.value.response.status_code


def test_a_run_with_code_cannot_be_started(target: Target) -> None:
    """What `flwr run` sends, an app bundle with a StartRun, is 404; the log names the call and where it came from."""
    fab = fab_pb2.Fab(hash_str="0" * 64, content=CODE)
    client = ControlHttpClient.from_server_address(
        target.server.address, False, target.server.folder.authority.read_bytes(), []
    )
    with pytest.raises(httpx.HTTPStatusError) as refused:
        client.StartRun(control_pb2.StartRunRequest(fab=fab))
    client.close()
    assert status_of(refused) == 404
    assert not target.holds(CODE)
    assert "refused: 'POST' '/v1/control/start-run' from 127.0.0.1, status 404" in target.log()


BODIES: dict[str, Any] = {
    "/v1/runtime/acquire-task": runtime_pb2.AcquireTaskRequest(),
    "/v1/fleet/register-node": fleet_pb2.RegisterNodeFleetRequest(public_key=b"mine"),
    "/v1/fleet/get-fab": fab_pb2.GetFabRequest(node=Node(node_id=1), hash_str="0" * 64, run_id=1),
    "/v1/fleet/get-run": run_pb2.GetRunRequest(node=Node(node_id=1), run_id=1),
    "/v1/control/list-nodes": control_pb2.ListNodesRequest(),
}


@pytest.mark.parametrize("path", BODIES)
def test_a_call_that_is_not_a_sites_is_not_there(path: str, target: Target) -> None:
    """Taking the server's tasks, registering a key, listing hospitals, fetching code: 404, and a line in the log."""
    with target.client() as client:
        answer = client.post(path, content=BODIES[path].SerializeToString(), headers=PROTOBUF)
    assert answer.status_code == 404
    assert f"'POST' '{path}' from 127.0.0.1, status 404" in target.log()


def test_a_key_that_nobody_registered_gets_nothing(target: Target) -> None:
    """A stranger's key is refused whatever it asks, also in the name of a hospital's node, before a body is read."""
    stranger = target.stranger(generate())
    for node in range(1, 4):
        stranger.node = Node(node_id=node)
        for call in (stranger.activate, stranger.heartbeat, stranger.pull, stranger.deactivate):
            with pytest.raises(httpx.HTTPStatusError) as refused:
                call()
            assert status_of(refused) == 401
    assert "'POST' '/v1/fleet/activate-node' from 127.0.0.1, status 401" in target.log()


def signed(public: bytes, key: EllipticCurvePrivateKey, age: float) -> dict[str, str]:
    """Flower's headers: this public key, and a time so many seconds ago, signed with that private key."""
    time = (datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=age)).isoformat(timespec="seconds")
    signature = sign_message(key, time.encode())
    return {
        **PROTOBUF,
        "flwr-public-key": base64.b64encode(public).decode(),
        "flwr-timestamp": time,
        "flwr-signature": base64.b64encode(signature).decode(),
    }


@pytest.mark.parametrize(("forged", "age"), [(True, 0.0), (False, 400.0), (False, -60.0)])
def test_a_hospitals_public_key_is_not_enough(forged: bool, age: float, target: Target) -> None:
    """North's public key with another's signature, or north's own signature of some minutes ago, is 401."""
    north = target.keys["north"]
    public = as_flower_bytes(north.public_key())
    body = fleet_pb2.ActivateNodeRequest(public_key=public, heartbeat_interval=30).SerializeToString()
    headers = signed(public, generate() if forged else north, age)
    with target.client() as client:
        refused = client.post("/v1/fleet/activate-node", content=body, headers=headers)
    assert refused.status_code == 401
    now = read_now(target.server.folder.state / "now.json") or {}
    assert not any(site["online"] for site in now["sites"].values())


def test_there_is_no_way_around_tls(target: Target) -> None:
    """No answer in plaintext, and none that a client without the authority's certificate accepts."""
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://{target.server.address}/health", trust_env=False)
    with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
        httpx.get(f"{target.url}/health", trust_env=False)


def test_a_path_cannot_write_its_own_log_line(target: Target) -> None:
    """Line ends in a path are quoted."""
    with target.client() as client:
        client.get("/x%0a2027-01-01 00:00:00,000 INFO wardround.server: round 1: north, east, 0.1 s")
    assert r"/x\n2027-01-01 00:00:00,000 INFO" in target.log()
    assert not any(line.startswith("2027-01-01") for line in target.log().splitlines())


def test_none_of_flowers_other_routes_is_there(target: Target) -> None:
    """Every route that starts runs, steers them or does the server's own work is 404."""
    routes = {(m.upper(), path) for path, methods in create_app().openapi()["paths"].items() for m in methods}
    mine = {(m, path) for m, path in routes if path.startswith(("/v1/control/", "/v1/runtime/"))}
    assert len(mine) > 50
    with target.client() as client:
        assert {client.request(method, path).status_code for method, path in mine} == {404}


def test_knocking_does_not_fill_the_disk(caplog: pytest.LogCaptureFixture) -> None:
    """A thousand refusals a minute are so many lines and a number, and the next minute has its own."""
    now = 0.0
    refusals = Refusals(lambda: now)
    scope = {"method": "GET", "path": "/", "client": ("192.0.2.1", 5)}
    with caplog.at_level(logging.INFO, "wardround.server"):
        for _ in range(1000):
            refusals.note(scope, 404)
        now = REFUSALS_SECONDS
        refusals.note(scope, 404)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == lines[-1] == "refused: 'GET' '/' from 192.0.2.1, status 404"
    assert lines[-2] == f"refused: {1000 - REFUSALS_LINES} more requests before the next line"
    assert len(lines) == REFUSALS_LINES + 2


def test_afterwards_the_study_runs_as_if_nothing_had_happened(target: Target) -> None:
    """Two honest hospitals connect, and every round has both."""
    server, folder = target.server, target.server.folder
    sites = {name: open_site(target.study, name) for name in target.study.sites}
    north, east = (
        Hospital(server.address, target.keys[name], sites[name].train, folder.authority) for name in ("north", "east")
    )
    with north, east:
        said = server.finish()
    assert f"finished: {target.study.training.rounds} rounds" in said
    assert (folder.path / "weights.safetensors").exists()
