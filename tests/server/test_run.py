"""`wardround server run` as a process: whole studies over TLS, kills, pauses, and what it writes where.

The hospitals are real Sites without noise in threads of the test, so that weights can be compared with the
simulation's to the last bit.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.proto.control_pb2 import StartRunRequest
from flwr.supercore.control.control_http_client import ControlHttpClient
from typer.testing import CliRunner

from client.site import Site
from common.errors import ConfigurationError
from common.keys import generate, public_line
from common.models.network import build_network
from common.records import Reply, Request, Status
from common.study import Study
from common.training import state_of
from common.weights import Weights, from_bytes
from server import coordinator, progress
from server.checkpoint import load
from server.commands import app
from server.files import held
from server.folder import ServerFolder
from server.rounds import run
from server.strategy import FederatedAveraging
from simulations.local_grid import LocalGrid
from tests.server.hospitals import Hospital, open_site, wait_until
from tests.server.processes import ROOT, Server, make_folder, new_keys, server_of
from tests.small import small_study

STUDY = small_study(privacy={"sampling_rate": 1.0})  # whose price has a closed form


@dataclass
class Cohort:
    """The study's sites, and what their server has asked them: (site, round), in order."""

    study: Study
    keys: dict[str, EllipticCurvePrivateKey]
    asked: list[tuple[str, int]] = field(default_factory=list)
    sites: dict[str, Site] = field(default_factory=dict)

    def answer(self, name: str) -> Callable[[Request], Reply]:
        """What the site says; it is opened once, so that its ledger lasts."""
        site = self.sites.setdefault(name, open_site(self.study, name))

        def train(request: Request) -> Reply:
            self.asked.append((name, request.header.round_number))
            return site.train(request)

        return train

    @contextmanager
    def taking_part(self, server: Server, *names: str) -> Iterator[None]:
        """The named sites (default: all) are connected."""
        with ExitStack() as stack:
            for name in names or tuple(self.study.sites):
                stack.enter_context(
                    Hospital(server.address, self.keys[name], self.answer(name), server.folder.authority)
                )
            yield


def cohort_of(study: Study = STUDY) -> Cohort:
    return Cohort(study, new_keys(study))


@pytest.fixture(scope="module")
def expected() -> Weights:
    """The small study's weights as the simulation's grid computes them."""
    with LocalGrid(lambda name: open_site(STUDY, name), STUDY.sites) as grid:
        strategy = FederatedAveraging(STUDY, state_of(build_network(STUDY)), lambda: grid.roster)
        return run(grid, strategy, rounds=STUDY.training.rounds)


def final(folder: ServerFolder) -> Weights:
    return from_bytes((folder.path / "weights.safetensors").read_bytes())


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def lines(folder: ServerFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in folder.metrics.read_text().splitlines()]


def status(folder: ServerFolder) -> dict[str, Any]:
    """`wardround server status --json`."""
    done = CliRunner().invoke(app, ["status", str(folder.path), "--json"], catch_exceptions=False)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def now(folder: ServerFolder) -> dict[str, Any]:
    """What the server says of the moment."""
    return progress.read_now(folder.state / "now.json") or {}


def online(folder: ServerFolder) -> set[str]:
    """The sites that it says are connected."""
    return {site for site, one in now(folder).get("sites", {}).items() if one["online"]}


def test_a_study_over_tls_has_the_simulations_weights(tmp_path: Path, expected: Weights) -> None:
    """Two hospitals, TLS, SQLite, the whole study: the weights are those of the local grid, bit by bit."""
    cohort = cohort_of()
    folder = make_folder(tmp_path / "study", STUDY, cohort.keys)
    with server_of(folder) as server, cohort.taking_part(server):
        printed = server.finish()
    assert same(final(folder), expected)
    assert sorted(cohort.asked) == [(site, number) for site in ("east", "north") for number in (1, 2, 3)]
    assert "finished: 3 rounds" in printed
    assert [(line["round"], line["sites"], line["refused"], line["counted"]) for line in lines(folder)] == [
        (number, ["east", "north"], {}, True) for number in (1, 2, 3)
    ]
    assert status(folder)["phase"] == "finished"


def test_a_killed_server_resumes_to_the_same_weights(tmp_path: Path, expected: Weights) -> None:
    """Kill -9 in the middle of round 2, then `--resume`: the same weights, and no site was charged twice."""
    cohort = cohort_of()
    folder = make_folder(tmp_path / "study", STUDY, cohort.keys)
    with server_of(folder) as server, cohort.taking_part(server):
        wait_until(lambda: any(number == 2 for _, number in cohort.asked))
        server.end(signal.SIGKILL)
        done = load(folder.checkpoint, STUDY.digest()).round_number
        assert done in (1, 2)
        refused = CliRunner().invoke(app, ["run", str(folder.path / "study.yaml")])
        assert f"round {done} is done; add --resume" in str(refused.exception)
        with server_of(folder, "--resume") as again:
            again.finish()
    assert same(final(folder), expected)
    assert {site.ledger.steps_taken(STUDY.digest()) for site in cohort.sites.values()} == {3}  # type: ignore[attr-defined]  # a MemoryLedger


@pytest.mark.full
def test_a_stopped_server_says_so_and_resumes(tmp_path: Path, expected: Weights) -> None:
    """SIGTERM ends it with status 0 and nothing half done; `--resume` goes on; a finished study is finished again."""
    cohort = cohort_of()
    folder = make_folder(tmp_path / "study", STUDY, cohort.keys)
    with server_of(folder) as server:
        with cohort.taking_part(server, "north"):
            wait_until(lambda: online(folder) == {"north"})
        assert server.end() == 0
        assert "stopped; go on with" in server.output.read_text()
        assert "[Fleet." not in server.output.read_text()
    assert status(folder)["phase"] == "not running"
    for _ in range(2):
        with server_of(folder, "--resume") as server, cohort.taking_part(server):
            assert "finished" in server.finish()
        assert same(final(folder), expected)
    assert len(cohort.asked) == 6


@pytest.mark.full
def test_without_quorum_the_study_pauses_and_goes_on(tmp_path: Path, expected: Weights) -> None:
    """A site that fails leaves the round without quorum: it is asked for again, and the result is the same."""
    cohort = cohort_of()
    folder = make_folder(tmp_path / "study", STUDY, cohort.keys)
    honest = cohort.answer("east")
    fails = iter([True])

    def failing(request: Request) -> Reply:
        if request.header.round_number == 2 and next(fails, False):
            return Reply(request.header, Status.POLICY)
        return honest(request)

    with server_of(folder) as server, cohort.taking_part(server, "north"):
        wait_until(lambda: "1 sites connected, the study's quorum is 2" in now(folder).get("note", ""))
        assert status(folder)["phase"] == "waiting"
        with Hospital(server.address, cohort.keys["east"], failing, folder.authority):
            printed = server.finish()
    assert same(final(folder), expected)
    assert "paused: round 2: 1 usable updates, the study's quorum is 2 (east: POLICY)" in printed
    assert [(line["round"], line["counted"], line["refused"]) for line in lines(folder)] == [
        (1, True, {}),
        (2, False, {"east": "POLICY"}),
        (2, True, {}),
        (3, True, {}),
    ]
    assert cohort.asked.count(("north", 2)) == 2
    assert next(s for s in status(folder)["sites"] if s["site"] == "east")["last_refusal"] == "POLICY (round 2)"


@pytest.mark.full
def test_a_site_that_died_with_the_message_is_asked_again(tmp_path: Path, expected: Weights) -> None:
    """A client that takes the message and dies gets it again when it connects anew, within the same round."""
    cohort = cohort_of()
    folder = make_folder(tmp_path / "study", STUDY, cohort.keys)
    honest = cohort.answer("east")
    died: list[Request] = []

    def dies_once(request: Request) -> Reply | None:
        if request.header.round_number == 2 and not died:
            died.append(request)
            return None
        return honest(request)

    with ExitStack() as stack:
        server = stack.enter_context(server_of(folder))
        stack.enter_context(cohort.taking_part(server, "north"))
        stack.enter_context(Hospital(server.address, cohort.keys["east"], dies_once, folder.authority))
        server.finish()
    assert died
    assert same(final(folder), expected)
    assert [line["refused"] for line in lines(folder)] == [{}, {}, {}]


@pytest.mark.full
def test_the_deadline_ends_a_round_with_a_quorum(tmp_path: Path) -> None:
    """A site that never answers costs each round its deadline, and the study goes on with the others."""
    study = small_study(quorum=1, privacy={"sampling_rate": 1.0}, training={"rounds": 2})
    cohort = cohort_of(study)
    folder = make_folder(tmp_path / "study", study, cohort.keys, deadline_seconds=2.0)
    with server_of(folder) as server, cohort.taking_part(server, "north"):
        over: list[Request] = []

        def silent(request: Request) -> Reply | None:
            over.append(request)
            server.process.wait(timeout=60)
            return None

        with Hospital(server.address, cohort.keys["east"], silent, folder.authority):
            server.finish()
    assert {(line["round"], *line["sites"]) for line in lines(folder)} == {(1, "north"), (2, "north")}
    assert all(line["refused"] == {"east": "no reply"} for line in lines(folder))
    assert lines(folder)[0]["seconds"] >= 2.0


@pytest.mark.full
def test_a_late_site_is_admitted_while_the_server_runs(tmp_path: Path, expected: Weights) -> None:
    """`server admit` beside a running server lets the site in without a restart."""
    cohort = cohort_of()
    folder = make_folder(tmp_path / "study", STUDY, {"north": cohort.keys["north"]})
    key = tmp_path / "east.pub"
    key.write_text(public_line(cohort.keys["east"].public_key()) + " east\n")
    with server_of(folder) as server, cohort.taking_part(server):
        wait_until(lambda: online(folder) == {"north"})
        assert cohort.asked == []
        done = CliRunner().invoke(app, ["admit", str(folder.path), "east", str(key)], catch_exceptions=False)
        assert "east is now on the roster" in done.stdout
        server.finish()
    assert same(final(folder), expected)


@pytest.mark.full
def test_the_heads_of_ledgers_go_round(tmp_path: Path) -> None:
    """The head in a site's reply comes back with its next request, also from another server process."""
    study = small_study(privacy={"sampling_rate": 1.0}, training={"rounds": 2})
    cohort = cohort_of(study)
    folder = make_folder(tmp_path / "study", study, cohort.keys)
    seen: dict[str, list[str]] = {"north": [], "east": []}

    def with_head(name: str) -> Callable[[Request], Reply]:
        def answer(request: Request) -> Reply:
            seen[name].append(request.head)
            return Reply(request.header, Status.OK, request.weights, f"{len(seen[name]):064d}")

        return answer

    def take_part(server: Server) -> ExitStack:
        stack = ExitStack()
        for name in seen:
            stack.enter_context(Hospital(server.address, cohort.keys[name], with_head(name), folder.authority))
        return stack

    with server_of(folder) as server, take_part(server):
        wait_until(lambda: load(folder.checkpoint, study.digest()).round_number >= 1)
        server.end(signal.SIGKILL)
        with server_of(folder, "--resume") as again:
            again.finish()
    for heads in seen.values():  # the newest that the server kept: all but those of the round that the kill ended
        assert heads[0] == ""
        assert heads[-1] in (f"{len(heads) - 1:064d}", f"{len(heads) - 2:064d}")
    assert set(load(folder.checkpoint, study.digest()).heads) == {"north", "east"}


HOOK = """
import os, sys
def note(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.bind") or event == "open" and arguments[2] & 3:
        with os.fdopen(os.open({log!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "a") as file:
            file.write(f"{{event}} {{arguments[1] if event in ('socket.connect', 'socket.bind') else arguments[0]}}\\n")
busy = []
def hook(event, arguments):
    if not busy:
        busy.append(1)
        try:
            note(event, arguments)
        finally:
            busy.clear()
sys.addaudithook(hook)
"""


@pytest.mark.full
def test_nothing_reaches_outside_and_nothing_is_written_outside_the_folder(tmp_path: Path) -> None:
    """A whole study: the process connects to nobody, listens on one port, and opens no file elsewhere for writing."""
    study = small_study(privacy={"sampling_rate": 1.0}, training={"rounds": 1})
    cohort = cohort_of(study)
    folder = make_folder(tmp_path / "study", study, cohort.keys)
    hooks, log, home = tmp_path / "hooks", tmp_path / "audit.log", tmp_path / "home"
    hooks.mkdir()
    home.mkdir()
    (hooks / "sitecustomize.py").write_text(HOOK.format(log=str(log)))
    paths = {"PYTHONPATH": f"{hooks}:{ROOT}", "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    with server_of(folder, **paths) as server, cohort.taking_part(server):
        server.finish()
    assert list(home.iterdir()) == []
    noted = log.read_text().splitlines()
    connected = [line for line in noted if line.startswith(("socket.connect", "socket.getaddrinfo"))]
    assert [line for line in connected if "127.0.0.1" not in line] == []
    bound = [line.removeprefix("socket.bind ") for line in noted if line.startswith("socket.bind")]
    assert [address for address in bound if not address.endswith(", 0)")] == [f"('127.0.0.1', {folder.terms.port})"]
    written = [line.removeprefix("open ") for line in noted if line.startswith("open ")]
    files = [path for path in written if not path.isdigit()]  # a number: a file that was opened before
    assert files
    assert [path for path in files if not path.startswith(str(folder.path))] == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_process_listens_on_the_public_port_alone(tmp_path: Path) -> None:
    """Flower's control and runtime interfaces are on no port, and not on loopback either."""
    folder = make_folder(tmp_path / "study", STUDY, new_keys(STUDY))
    with server_of(folder) as server:
        assert listening(server.process.pid) == {folder.terms.port}


def listening(process: int) -> set[int]:
    """TCP ports that a process listens on."""
    links = [link.readlink() for link in Path(f"/proc/{process}/fd").iterdir()]
    sockets = {str(link)[8:-1] for link in links if str(link).startswith("socket:")}
    found = set()
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]:
            columns = row.split()
            if columns[3] == "0A" and columns[9] in sockets:
                found.add(int(columns[1].rsplit(":", 1)[1], 16))
    return found


def test_a_third_party_with_the_authoritys_certificate_can_start_nothing(tmp_path: Path) -> None:
    """TLS trust alone opens nothing: Flower's StartRun is 404; without trust, or in plaintext, there is no answer."""
    folder = make_folder(tmp_path / "study", STUDY, new_keys(STUDY))
    other = make_folder(tmp_path / "other", STUDY, new_keys(STUDY))
    with server_of(folder) as server:
        client = ControlHttpClient.from_server_address(server.address, False, folder.authority.read_bytes(), [])
        with pytest.raises(httpx.HTTPStatusError) as refused:
            client.StartRun(StartRunRequest())
        assert refused.value.response.status_code == 404
        client.close()
        assert Server.health(server) is not None
        server.folder = ServerFolder(other.path, folder.terms)
        assert Server.health(server) is None
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://{server.address}/health", trust_env=False)


def test_a_roster_that_is_away_for_a_moment_stays_as_it_was(tmp_path: Path) -> None:
    """An editor that saves takes roster.yaml away; the run goes on with the one before, but does not begin without."""
    folder = make_folder(tmp_path / "study", STUDY, new_keys(STUDY))
    one = coordinator._Run(folder, load(folder.checkpoint, STUDY.digest()), None, lambda _line: None)
    one._roster_read = (1, 1)
    (folder.path / "roster.yaml").unlink()
    one._read_roster()
    assert one._roster_read == (1, 1)
    one._roster_read = None
    with pytest.raises(ConfigurationError, match=r"roster\.yaml: cannot be read"):
        one._read_roster()
    one._link.executor.shutdown()


def test_the_checkpoint_is_read_with_the_folder_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second server must not start from a checkpoint that the first one is about to replace."""
    folder = make_folder(tmp_path / "study", STUDY, new_keys(STUDY), host="127.0.0.1")
    read: list[str] = []

    def note(*_arguments: object) -> None:
        read.append("checkpoint")

    monkeypatch.setattr(coordinator, "load", note)
    with held(folder.state / "lock", "study"), pytest.raises(ConfigurationError, match="in use by another process"):
        coordinator.serve(folder, resume=True, plaintext=True)
    assert read == []


def test_one_server_a_folder(tmp_path: Path) -> None:
    """A second server on the same folder is refused in one line, also with another port."""
    folder = make_folder(tmp_path / "study", STUDY, new_keys(STUDY))
    with server_of(folder):
        second = CliRunner().invoke(app, ["run", str(folder.path), "--resume"])
        assert "is in use by another process; end that one first" in str(second.exception)


@pytest.mark.full
def test_plaintext_is_for_this_machine_only(tmp_path: Path) -> None:
    """`--plaintext` needs a folder that listens on loopback, and then serves without TLS."""
    public = make_folder(tmp_path / "public", STUDY, new_keys(STUDY), host="0.0.0.0")
    refused = CliRunner().invoke(app, ["run", str(public.path), "--plaintext"])
    assert "--plaintext with host 0.0.0.0: only on this machine" in str(refused.exception)
    folder = make_folder(tmp_path / "study", STUDY, new_keys(STUDY))
    server = Server(folder, ("--plaintext",))
    try:
        wait_until(lambda: _plain(folder) is not None)
        health = _plain(folder)
        assert health is not None
        assert health["study"] == STUDY.digest()
        assert set(health) == {"wardround", "wire", "study", "code", "time"}
    finally:
        server.end()


def _plain(folder: ServerFolder) -> dict[str, Any] | None:
    try:
        answer: dict[str, Any] = httpx.get(f"http://127.0.0.1:{folder.terms.port}/health", trust_env=False).json()
    except httpx.TransportError:
        return None
    return answer


@pytest.mark.full
def test_a_port_in_use_and_a_changed_study_are_one_line(tmp_path: Path) -> None:
    """What a person can cause is said in one line, and leaves no process behind."""
    folder = make_folder(tmp_path / "study", STUDY, new_keys(STUDY))
    with socket.create_server(("127.0.0.1", folder.terms.port)):
        taken = Server(folder)
        assert taken.process.wait(timeout=60) == 2
        assert f"error: cannot listen on 127.0.0.1:{folder.terms.port}" in taken.output.read_text()
    text = (folder.path / "study.yaml").read_text()
    (folder.path / "study.yaml").write_text(text.replace("learning_rate: 0.05", "learning_rate: 0.5"))
    changed = Server(folder)
    assert changed.process.wait(timeout=60) == 2
    assert "put the file back" in changed.output.read_text()
    assert progress.read_now(folder.state / "now.json") is None


@pytest.mark.full
def test_a_site_that_is_not_on_the_roster_never_gets_in(tmp_path: Path) -> None:
    """A hospital with another key keeps knocking; the study waits, and nothing is asked of it."""
    cohort = cohort_of()
    folder = make_folder(tmp_path / "study", STUDY, cohort.keys)
    with server_of(folder) as server, cohort.taking_part(server, "north"):
        with Hospital(server.address, generate(), cohort.answer("east"), folder.authority):
            wait_until(lambda: online(folder) == {"north"})
        assert status(folder)["phase"] == "waiting"
        server.end()
    assert cohort.asked == []
