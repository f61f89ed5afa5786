"""A hospital's state folder was copied, and somebody starts a second client with the key in it.

Real processes over TLS. Flower takes both for one node: without our own check each would get half of the messages
(`test_flower_itself_takes_two_processes_for_one`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from flwr.proto import fleet_pb2

from client.fleet import Fleet
from client.network import ContestedError, Limit
from client.site_file import ServerTerms
from client.state import KEY, LOG, PUBLIC, StateFolder
from common.keys import generate, load_private, private_to_pem, write_private
from common.records import Reply, Request, Status
from server import progress
from server.superlink import SuperLink
from tests.client.hospitals import enrolled_at, write_site, write_study
from tests.server import hospitals as others
from tests.server.hospitals import Connection, wait_until
from tests.server.processes import ROOT, make_folder, server_of

ROUNDS = 12
ALARM = "another process uses this site's key"


@dataclass
class Story:
    """What happened.

    Attributes:
        ends: exit status of the hospital's client and of the thief's, and what each said.
        log: the hospital's; `line`: the server's.
        contested: `server status` when both had ended.
        rounds: lines of the server's metrics.
        printed: what the server said.
    """

    ends: dict[str, tuple[int, str]]
    log: str
    line: str
    contested: progress.Status
    rounds: list[dict[str, object]]
    printed: str


@pytest.fixture(scope="module")
def story(cohort: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("stolen")
    study = write_study(
        folder, quorum=2, training={"recipe": "fedavg-one-step", "rounds": ROUNDS, "learning_rate": 0.02}
    )
    east = generate()
    kept = make_folder(folder / "study", study, {"east": east}, deadline_seconds=600.0)

    def admit(key: EllipticCurvePublicKey) -> None:
        before = read_rosters()
        kept.admit("north", key, replace=True)
        wait_until(lambda: read_rosters() > before, 300)

    def read_rosters() -> int:
        """How often the running server has taken up a new roster."""
        return (kept.state / "server.log").read_text().count("roster:")

    def moment() -> progress.Status:
        lines = progress.read(kept.metrics)
        now = progress.read_now(kept.state / "now.json")
        return progress.summarise(study, progress.round_of(kept.checkpoint), lines, now, frozenset(kept.roster()))

    with ExitStack() as stack:
        server = stack.enter_context(server_of(kept))
        place = write_site(folder, cohort["north"], {"address": server.address, "ca": str(kept.authority)})
        state = enrolled_at(place, admit)
        (folder / "thief").mkdir()
        shutil.copytree(state.path, folder / "thief" / "state")  # as a backup has it
        shutil.copy(folder / "study.yaml", folder / "thief" / "study.yaml")
        copied = folder / "thief" / "site.yaml"
        shutil.copy(place, copied)
        held = Held(ROUNDS // 2)
        stack.enter_context(others.Hospital(server.address, east, held.answer, kept.authority))

        def run(site_file: Path) -> subprocess.Popen[bytes]:
            out = stack.enter_context((site_file.parent / "said").open("ab"))
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            command = [sys.executable, "-m", "wardround", "client", "run", str(site_file)]
            process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        first = run(place)
        wait_until(lambda: progress.round_of(kept.checkpoint) >= ROUNDS // 2 - 1, 1200)
        second = run(copied)  # now east holds the round back, so that the study is still on
        ends = {
            name: (process.wait(1200), (site_file.parent / "said").read_text())
            for name, process, site_file in (("hospital", first, place), ("thief", second, copied))
        }
        wait_until(lambda: any(site.contested for site in moment().sites), 60)
        contested, log = moment(), (state / LOG).read_text()
        held.on()
        new_key(state)
        admit(load_private(state / KEY).public_key())
        run(place)
        server.process.wait(1200)
        line, printed = (kept.state / "server.log").read_text(), server.finish()
    return Story(ends, log, line, contested, progress.read(kept.metrics), printed)


class Held:
    """East's answers: at once, but from one round on only when the test says so."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.free = threading.Event()

    def on(self) -> None:
        self.free.set()

    def answer(self, request: Request) -> Reply:
        if request.header.round_number >= self.number:
            self.free.wait()
        update = {name: np.zeros_like(array) for name, array in request.weights.items()}
        return Reply(request.header, Status.OK, update)


def new_key(state: StateFolder) -> None:
    """As a person does: the old key is moved away, and `client keygen` makes another."""
    for name in (KEY, PUBLIC):
        (state / name).unlink(missing_ok=True)
    write_private(state / KEY, private_to_pem(generate()))


@pytest.mark.full
def test_the_first_process_stops_and_says_why(story: Story) -> None:
    """It ends with an error, in its output and its log, that names what happened and whom to call."""
    status, said = story.ends["hospital"]
    assert status == 2
    assert ALARM in said
    assert "call the coordinator" in said
    assert any(ALARM in line and " ERROR " in line for line in story.log.splitlines())


@pytest.mark.full
def test_the_thief_is_shut_out_too(story: Story) -> None:
    """Nobody can tell at the server which of the two is the hospital."""
    status, said = story.ends["thief"]
    assert status == 2
    assert ALARM in said


@pytest.mark.full
def test_the_server_pauses_the_site_and_says_so(story: Story) -> None:
    """`server status` calls it contested and not online; the log has one line of it."""
    assert {one.site: one.contested for one in story.contested.sites} == {"north": True, "east": False}
    assert [one.online for one in story.contested.sites if one.site == "north"] == [False]
    assert story.contested.round < ROUNDS
    assert story.line.count("site north is contested: two processes use its key") == 1


@pytest.mark.full
def test_a_new_key_ends_it(story: Story) -> None:
    """With a new key and the same ledger the hospital takes part again, and the study ends."""
    assert f"finished: {ROUNDS} rounds" in story.printed
    assert story.rounds[-1]["sites"] == ["east", "north"]


@pytest.fixture
def link(tmp_path: Path) -> Iterator[SuperLink]:
    made = SuperLink(tmp_path / "superlink.db", ("127.0.0.1", 0), dict)
    made.start()
    yield made
    made.stop()


def test_flower_itself_takes_two_processes_for_one(link: SuperLink) -> None:
    """Two of Flower's own clients with one key: the second's hello succeeds, and both go on asking and being alive."""
    key = generate()
    link.admit({"north": key.public_key()})
    one, two = (Connection(f"127.0.0.1:{link.port}", key) for _ in range(2))
    try:
        number = one.activate()
        two.node = one.node  # it stands in the state folder
        two.deactivate()
        assert two.activate() == number
        assert one.heartbeat()
        assert two.heartbeat()
        assert not any(site.contested for site in link.presence().values())  # they name no process
        for connection in (one, two):
            answer = connection.client.PullMessages(fleet_pb2.PullMessagesRequest(node=connection.node))
            assert not answer.messages_list
    finally:
        one.client.close()
        two.client.close()


def test_of_two_of_our_own_neither_is_heard(link: SuperLink) -> None:
    """The first one's next request after the second one's hello shuts both out; another site is not concerned."""
    key = generate()
    link.admit({"north": key.public_key()})
    server = ServerTerms(address=f"127.0.0.1:{link.port}", plaintext=True)
    with Fleet(server, key, instance="one") as one, Fleet(server, key, instance="two") as two:
        number = one.activate()
        assert two.activate(number) == number
        two.heartbeat()

        def contested() -> bool:
            try:
                one.heartbeat()
            except ContestedError:
                return True
            return False

        wait_until(contested, 300)
        for fleet in (one, two):
            with pytest.raises(ContestedError, match=ALARM):
                fleet.pull(Limit.of([8]))
            with pytest.raises(ContestedError, match=ALARM):
                fleet.activate(number)
        (site,) = link.presence().values()
        assert (site.contested, site.online) == (True, False)


def test_a_thief_without_the_sites_number_does_not_get_in_unseen(link: SuperLink) -> None:
    """With the key alone a hello is refused while the site is online, and is the alarm all the same."""
    key = generate()
    link.admit({"north": key.public_key()})
    server = ServerTerms(address=f"127.0.0.1:{link.port}", plaintext=True)
    with Fleet(server, key, instance="hospital") as hospital, Fleet(server, key, instance="thief") as thief:
        hospital.activate()
        with pytest.raises(Exception, match="not on the roster"):
            thief.activate()

        def contested() -> bool:
            try:
                hospital.heartbeat()
            except ContestedError:
                return True
            return False

        wait_until(contested, 300)
