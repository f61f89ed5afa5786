"""A hospital's client, as a process, on a machine that fails it: disk, memory, certificate, a second client, signals.

Its server is the test's own (tests/client/coordinator.py). What each fault cost the ledger is counted at the end.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from client.checks import begin_ledger, check
from client.ledger_file import read_accounts
from client.state import LEDGER, LOG, StateFolder
from common.models.network import build_network
from common.provenance import code_digest
from common.records import Header, Reply, Request, Status, reply_from_message, request_to_content
from common.study import Study
from common.training import state_of
from tests.client.coordinator import Authority, Coordinator
from tests.client.hospitals import with_key, write_site, write_study
from tests.e2e.deployment import ROOT, wait_until
from tests.e2e.failing import disk, full, told

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(sys.platform != "linux", reason="mounts file systems, limits another process"),
]

ROUNDS, SPARE = 20, 8
DIRECTED = (str(ROOT / "tests" / "e2e" / "directed_client.py"),)
COMMAND = ("-m", "wardround", "client", "run")


@dataclass
class Place:
    """An enrolled hospital and its server.

    Attributes:
        folder: of everything; `disk` in it is a file system of its own, with the state folder.
        tls: what the server shows; its certificate can be exchanged while it runs.
    """

    folder: Path
    study: Study
    authority: Authority
    tls: Any
    server: Coordinator
    file: Path
    state: StateFolder
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, *arguments: str | Path, how: tuple[str, ...] = DIRECTED) -> subprocess.Popen[str]:
        """Start a client; what it says goes to said-N.txt."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(self.folder / "home")}
        with self.said(len(self.started)).open("w") as said:
            command = [sys.executable, *how, str(self.file), *map(str, arguments)]
            process = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=said, stderr=said, text=True)
        self.started.append(process)
        return process

    def said(self, number: int) -> Path:
        return self.folder / f"said-{number}.txt"

    def connected(self) -> subprocess.Popen[str]:
        """Start a directed client and wait until it is online."""
        self.server.online.clear()
        process = self.start(self.folder)
        assert self.server.online.wait(300), self.said(len(self.started) - 1).read_text()
        return process

    def send(self, number: int) -> None:
        """Ask for a round."""
        request = Request(Header(self.study.digest(), code_digest(), number), state_of(build_network(self.study)))
        self.server.send(self.server.offer(request_to_content(request)))

    def reply(self) -> Reply:
        return reply_from_message(self.server.replies.get(timeout=300))

    def ask(self, number: int) -> Reply:
        self.send(number)
        return self.reply()

    def held(self, number: int, attempt: int) -> int:
        """Ask for a round that stops before it draws its patients; returns the training process."""
        (self.folder / "hold").write_text(str(number))
        self.send(number)
        note = self.folder / f"training-{number}-{attempt}"
        wait_until(note.exists, f"attempt {attempt} at round {number}")
        return int(note.read_text())

    def go(self) -> None:
        (self.folder / "hold").unlink()

    @property
    def log(self) -> str:
        return (self.state / LOG).read_text()

    def spent(self) -> tuple[int, int]:
        """(steps that the ledger has marked, rounds that it has released)."""
        accounts, _ = read_accounts(self.state / LEDGER)
        account = accounts.studies[self.study.digest()]
        return account.steps_taken, len(account.released)


@contextmanager
def enrolled(folder: Path, records: Path, *, kilobytes: int = 4000) -> Iterator[Place]:
    """An enrolled hospital whose state folder lies on a small disk of its own; all that was started ends."""
    (folder / "home").mkdir()
    study = write_study(
        folder,
        training={"recipe": "fedavg-one-step", "rounds": ROUNDS, "learning_rate": 0.02},
        privacy={"epsilon": 3.0, "delta": 1e-5, "sampling_rate": 0.25, "clip": 1.0, "spare_rounds": SPARE},
    )
    authority = Authority(folder / "ca")
    tls = authority.context()
    with ExitStack() as stack:
        stack.enter_context(disk(folder / "disk", kilobytes))
        server = stack.enter_context(Coordinator(study, tls))
        terms = {"address": f"localhost:{server.port}", "ca": str(authority.file)}
        file = write_site(folder, records, terms, state="disk/state")
        site, state, key = with_key(file)
        server.admit(key.public_key())
        with state.lock():
            found = check(site, state, lambda _name, _detail: None)
            begin_ledger(site, state, found.patients)
            found.enrolment.write(state)
        place = Place(folder, study, authority, tls, server, file, state)
        try:
            yield place
        finally:
            for process in place.started:
                if process.poll() is None:
                    process.kill()
                    process.wait()


def show(place: Place, **certificate: Any) -> None:
    """Make the server show another certificate of the study's authority, and break the connections that there are."""
    before = set(place.authority.folder.glob("server-*.pem"))
    place.authority.context(**certificate)
    (fresh,) = set(place.authority.folder.glob("server-*.pem")) - before
    place.tls.load_cert_chain(fresh)

    def hang_up(_path: str, _status: int, _headers: dict[str, str], _body: bytes) -> tuple[int, dict[str, str], bytes]:
        place.server.spoil = None
        return 500, {"connection": "close"}, b""

    place.server.online.clear()
    place.server.spoil = hang_up


@pytest.fixture(scope="module")
def place(cohort: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Shared by the tests of one running client, in their order; each leaves it running."""
    with enrolled(tmp_path_factory.mktemp("hospital"), cohort["north"]) as made:
        made.connected()
        assert made.ask(1).status is Status.OK
        yield made


def test_a_full_disk_trains_nothing_and_costs_nothing(place: Place) -> None:
    """No byte left: LOCAL_FAILURE, no attempt marked, the client lives; with space the round is trained."""
    before = place.spent()
    with full(place.folder / "disk"):
        refused = place.ask(2)
        assert place.spent() == before
    began = time.monotonic()
    assert (refused.status, refused.update) == (Status.LOCAL_FAILURE, None)
    assert place.ask(2).status is Status.OK
    told("disk of ledger and log full before a round; with space again to the round's update", began)
    assert place.spent() == (before[0] + 1, before[1] + 1)


def test_an_update_that_does_not_fit_does_not_leave(place: Place) -> None:
    """The disk fills while a round trains: marked, trained, not stored, not sent; the next attempt is a spare step."""
    before = place.spent()
    place.held(3, 1)
    with full(place.folder / "disk"):
        place.go()
        lost = place.reply()
    began = time.monotonic()
    assert (lost.status, lost.update) == (Status.LOCAL_FAILURE, None)
    assert place.spent() == (before[0] + 1, before[1])
    assert place.ask(3).status is Status.OK
    told("disk full while a round trains; with space again to the update", began)
    assert place.spent() == (before[0] + 2, before[1] + 1)
    assert "free some space" in place.log


def test_a_round_that_needs_more_memory_than_there_is_fails_alone(place: Place) -> None:
    """A limit on the training process's memory: LOCAL_FAILURE, and with memory the next attempt is OK."""
    before = place.spent()
    child = place.held(4, 1)
    status = Path(f"/proc/{child}/status").read_text().splitlines()
    now = 1024 * int(next(line for line in status if line.startswith("VmSize")).split()[1])
    old = resource.prlimit(child, resource.RLIMIT_AS, (now + 2**28, resource.RLIM_INFINITY))
    (place.folder / "greedy").touch()
    place.go()
    lost = place.reply()
    began = time.monotonic()
    resource.prlimit(child, resource.RLIMIT_AS, old)
    (place.folder / "greedy").unlink()
    assert (lost.status, lost.update) == (Status.LOCAL_FAILURE, None)
    assert "round 4 failed with" in place.log
    assert place.ask(4).status is Status.OK
    told("out of memory in training (limit on its address space); with memory again to the update", began)
    assert place.spent() == (before[0] + 2, before[1] + 1)


def test_the_systems_out_of_memory_killer_costs_one_attempt(place: Place) -> None:
    """The training process is gone from one moment to the next: LOCAL_FAILURE at once, and a new one trains."""
    before = place.spent()
    os.kill(place.held(5, 1), signal.SIGKILL)
    place.go()
    began = time.monotonic()
    assert place.reply().status is Status.LOCAL_FAILURE
    told("training process killed as the system does for memory; to the server's notice", began)
    assert place.ask(5).status is Status.OK
    told("the same, to the update of the next attempt", began)
    assert place.spent() == (before[0] + 2, before[1] + 1)
    assert "often for want of memory" in place.log


def test_a_second_client_on_the_state_folder_ends_and_the_first_goes_on(place: Place) -> None:
    """One line and status 2; nothing of the ledger or the connection changes hands."""
    second = place.start(how=COMMAND)
    assert second.wait(300) == 2
    said = place.said(len(place.started) - 1).read_text()
    assert "in use by another process of wardround" in said
    assert "Traceback" not in said
    assert place.started[0].poll() is None
    assert place.ask(6).status is Status.OK


@pytest.mark.parametrize(
    ("certificate", "line"),
    [
        ({"days": (-5, -1)}, "its certificate has expired; check this machine's clock, or ask the coordinator"),
        ({"days": (1, 5)}, "its certificate is not valid yet; check this machine's clock"),
        ({"name": "elsewhere.example"}, "its certificate is for another name than `localhost`"),
    ],
    ids=["expired", "not yet", "another name"],
)
def test_a_wrong_certificate_keeps_the_client_away_until_it_is_right(
    certificate: dict[str, Any], line: str, place: Place
) -> None:
    """The running client asks nothing of such a server, says why, tries on, and is back by itself."""
    show(place, **certificate)
    wait_until(lambda: line in place.log, "the line about the certificate")
    assert not place.server.online.is_set()
    assert place.started[0].poll() is None
    show(place)
    place.server.spoil = None
    began = time.monotonic()
    assert place.server.online.wait(120)
    told(f"server's certificate wrong ({line.split(';')[0]}); once right, to the connection", began)


def test_a_server_that_is_away_is_waited_for(place: Place) -> None:
    """Away for 30 s, refusing every call: the client tries on, says so, and is back within its wait."""
    over = threading.Event()

    def away(path: str, status: int, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        return (status, headers, body) if over.is_set() else (503, {"connection": "close"}, b"")

    place.server.online.clear()
    place.server.spoil = away
    over.wait(30)
    over.set()
    began = time.monotonic()
    assert place.server.online.wait(120)
    told("proxy that answers 503 for 30 s; once the server is back, to the connection", began)
    assert place.ask(7).status is Status.OK


def test_nothing_of_all_this_was_charged_twice(place: Place) -> None:
    """A step for each attempt that was marked, a release for each round that was answered; no traceback anywhere."""
    assert place.spent() == (10, 7)
    place.started[0].send_signal(signal.SIGTERM)
    assert place.started[0].wait(120) == 0
    for number in range(len(place.started)):
        assert "Traceback" not in place.said(number).read_text()


def test_a_log_that_cannot_be_written_stops_no_round(cohort: dict[str, Path], tmp_path: Path) -> None:
    """client.log on a full disk, the ledger on another: rounds go on, and no traceback is printed for each line."""
    with enrolled(tmp_path, cohort["north"]) as place, disk(tmp_path / "small", 64) as small:
        log, elsewhere = place.state / LOG, small / "log"
        log.touch(0o600)
        elsewhere.touch(0o600)
        subprocess.run(["mount", "--bind", str(elsewhere), str(log)], check=True)
        try:
            with full(small):
                client = place.connected()
                assert [place.ask(number).status for number in (1, 2)] == [Status.OK, Status.OK]
                client.send_signal(signal.SIGTERM)
                assert client.wait(120) == 0
        finally:
            subprocess.run(["umount", "--lazy", str(log)], check=True)
        said = place.said(0).read_text()
        assert "round 2: OK" in said
        assert "Traceback" not in said
        assert said.count("cannot be written") == 1
        assert place.spent() == (2, 2)


def test_a_read_only_state_folder_is_one_line(cohort: dict[str, Path], tmp_path: Path) -> None:
    """Nothing is trained from a state folder that cannot be written: each command ends with a line and status 2."""
    with enrolled(tmp_path, cohort["north"]) as place:
        with disk(place.state.path, 0, read_only=True):
            for how in (COMMAND, ("-m", "wardround", "client", "budget"), ("-m", "wardround", "client", "leave")):
                process = place.start(how=how)
                status, said = process.wait(300), place.said(len(place.started) - 1).read_text()
                assert "Traceback" not in said
                if how[-1] == "budget":  # only reads
                    continue
                assert status == 2, said
                (line,) = said.splitlines()
                assert line.startswith(f"error: {place.state.path}")
                assert "cannot be written" in line
        place.connected()
        assert place.ask(1).status is Status.OK


def signalled(place: Place, route: str) -> Callable[[Any], Any]:
    """The fleet route as always, but the newest client is asked to end in the middle of it."""
    from tests.client.coordinator import _ROUTES

    def answer(request: Any) -> Any:
        del place.server.answers[route]
        place.started[-1].send_signal(signal.SIGTERM)
        return _ROUTES[route][1](place.server, request)

    return answer


def test_sigterm_ends_it_cleanly_in_every_phase(cohort: dict[str, Path], tmp_path: Path) -> None:
    """Whatever it is doing, SIGTERM is status 0 without a traceback, and the next client goes on from there."""
    with enrolled(tmp_path, cohort["north"]) as place:
        started = place.folder / "disk" / "state" / LOG

        def ended(phase: str, began: float) -> None:
            status, said = place.started[-1].wait(120), place.said(len(place.started) - 1).read_text()
            told(f"SIGTERM while {phase}, to the end", began)
            assert status == 0, (phase, said)
            assert "Traceback" not in said, (phase, said)
            assert "error:" not in said, (phase, said)

        client = place.start(how=COMMAND)  # reading records
        wait_until(lambda: started.exists(), "the log")
        began = time.monotonic()
        client.send_signal(signal.SIGTERM)
        ended("it opens its records", began)

        for route, phase in (
            ("activate-node", "it connects"),
            ("pull-object", "it fetches the weights"),
            ("push-messages", "it announces its update"),
            ("push-object", "it sends its update"),
        ):
            place.server.online.clear()
            place.server.answers[route] = signalled(place, route)
            place.start(place.folder)
            if route != "activate-node":
                place.send(1)
            wait_until(lambda route=route: route not in place.server.answers, phase)  # type: ignore[misc]  # a default argument
            ended(phase, time.monotonic())

        place.server.online.clear()
        place.server.roster.clear()  # nobody is let in: it waits
        client = place.start(how=COMMAND)
        wait_until(lambda: "next try" in place.said(len(place.started) - 1).read_text(), "a refusal")
        began = time.monotonic()
        client.send_signal(signal.SIGTERM)
        ended("it waits for its next try", began)
        assert place.spent() == (1, 1)
