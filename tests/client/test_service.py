"""The service: what it answers, when it tries again, and when it is done; with a network and a trainer made up here."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from client import service
from client.enrolment import Enrolment
from client.fleet import Incoming, rehearsal
from client.heartbeat import Heartbeat
from client.network import ContestedError, Health, Limit, NetworkError
from client.service import Service, serve
from client.site_file import SiteFile
from client.state import NODE, StateFolder
from client.stopping import Stop, stoppable
from client.trainer import Ready
from common.errors import ConfigurationError
from common.provenance import code_digest
from common.records import (
    WIRE_VERSION,
    Header,
    Reply,
    Request,
    Status,
    reply_from_message,
    reply_to_content,
    request_to_content,
)
from tests.client.hospitals import with_key, write_site, write_study

STUDY, HEAD = "a" * 64, "b" * 64
READY = Ready(STUDY, 3, (48,))
WEIGHTS = {"w": np.zeros((3, 4), np.float32)}


class Trained:
    """A trainer that says what it is told to."""

    def __init__(self, *answers: Callable[[Message], Message | None]) -> None:
        self.answers = list(answers)
        self.asked: list[Message] = []

    def start(self) -> Ready:
        return READY

    def answer(self, message: Message, node: int) -> Message | None:
        self.asked.append(message)
        return self.answers.pop(0)(message)


class Network:
    """A fleet over a list of events: a message to pull, None, or an error to raise; after the last one, Stop."""

    def __init__(self, events: list[Any], clock: list[float]) -> None:
        self.events, self.clock = events, clock
        self.sent: list[Reply] = []
        self.previous: list[int | None] = []
        self.limits: list[Limit] = []
        self.push_fails = 0
        self.seen = Health("0.1.0", WIRE_VERSION, STUDY, code_digest(), 0.0, None)

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_exception: object) -> None:
        pass

    def health(self) -> Health:
        return self.seen

    def activate(self, previous: int | None) -> int:
        self.previous.append(previous)
        return 9

    def heartbeat(self) -> None:
        pass

    def pull(self, limit: Limit) -> Incoming | None:
        self.limits.append(limit)
        if not self.events:
            raise Stop
        event = self.events.pop(0)
        if isinstance(event, Exception):
            raise event
        return event  # type: ignore[no-any-return]  # the test's own list

    def push(self, reply: Message, request: Message) -> bool:
        if self.push_fails:
            self.push_fails -= 1
            raise NetworkError("the line went dead")
        self.sent.append(reply_from_message(reply))
        return True


@pytest.fixture
def clock() -> list[float]:
    return [0.0]


@pytest.fixture
def hospital(tmp_path: Path) -> tuple[SiteFile, StateFolder]:
    write_study(tmp_path)
    site, state, _ = with_key(write_site(tmp_path, tmp_path, {"address": "localhost:1", "plaintext": True}))
    return site, state


def run(
    hospital: tuple[SiteFile, StateFolder],
    trainer: Trained,
    network: Network,
    clock: list[float],
    *,
    ends: bool = False,
    connect: Callable[[], Any] | None = None,
) -> list[float]:
    """Run the service until the network is out of events; returns how long it paused, each time."""
    site, state = hospital
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        clock[0] += seconds

    enrolment = Enrolment(
        study=STUDY,
        name="s",
        site="north",
        declared_patients=80,
        policy="c" * 64,
        records="records",
        splits=("train",),
        exclude=None,
        authority="",
        certificate="",
        time="now",
    )
    one = Service(
        site,
        state,
        enrolment,
        trainer,  # type: ignore[arg-type]  # as far as the service looks
        connect or (lambda: network),  # type: ignore[arg-type]  # as far as the service looks
        exit_when_finished=ends,
        pause=pause,
        clock=lambda: clock[0],
    )
    if ends:
        one.run()
    else:
        with pytest.raises(Stop):
            one.run()
    return pauses


def request(number: int = 1) -> Message:
    content = Request(Header(STUDY, code_digest(), number), WEIGHTS, HEAD)
    return rehearsal(request_to_content(content), 9)


def answers(status: Status, number: int = 1) -> Callable[[Message], Message]:
    update = WEIGHTS if status is Status.OK else None
    reply = Reply(Header(STUDY, code_digest(), number), status, update, "d" * 64)
    return lambda message: Message(reply_to_content(reply), reply_to=message)


def test_a_request_is_answered_by_the_trainer(hospital: Any, clock: list[float]) -> None:
    """What the training process replies is what is sent, within the limit of the study's own network."""
    network = Network([Incoming(request())], clock)
    run(hospital, Trained(answers(Status.OK)), network, clock)
    assert [(reply.status, reply.head) for reply in network.sent] == [(Status.OK, "d" * 64)]
    assert set(network.limits) == {Limit.of(READY.arrays)}


def test_a_trainer_that_died_is_a_local_failure(hospital: Any, clock: list[float]) -> None:
    """No answer becomes LOCAL_FAILURE for that very round; the head is the server's own, so it forgets nothing."""
    network = Network([Incoming(request(2)), Incoming(request(2))], clock)
    run(hospital, Trained(lambda _m: None, answers(Status.OK, 2)), network, clock)
    first, second = network.sent
    assert (first.header, first.status, first.head) == (
        Header(STUDY, code_digest(), 2),
        Status.LOCAL_FAILURE,
        HEAD,
    )
    assert second.status is Status.OK


@pytest.mark.parametrize(
    "incoming",
    [
        Incoming(rehearsal(RecordDict(), 9), "message type is not train"),
        Incoming(rehearsal(RecordDict(), 9)),
        Incoming(rehearsal(RecordDict({"request": ConfigRecord({"import": "os"})}), 9)),
    ],
)
def test_what_is_no_request_is_malformed_and_reaches_no_trainer(
    hospital: Any, clock: list[float], incoming: Incoming
) -> None:
    """A message of another type, without content or with other records gets MALFORMED; the records stay shut."""
    trainer, network = Trained(), Network([incoming], clock)
    run(hospital, trainer, network, clock)
    assert network.sent == [Reply(Header(STUDY, code_digest(), 0), Status.MALFORMED)]
    assert trainer.asked == []


def test_only_what_the_wire_format_knows_leaves(hospital: Any, clock: list[float]) -> None:
    """If the training process ever said anything else, a LOCAL_FAILURE would leave instead."""
    network = Network([Incoming(request())], clock)
    extra = RecordDict({"metrics": ConfigRecord({"auroc": 0.9})})
    run(hospital, Trained(lambda message: Message(extra, reply_to=message)), network, clock)
    assert [reply.status for reply in network.sent] == [Status.LOCAL_FAILURE]


def test_a_reply_that_could_not_be_sent_is_sent_next_time(hospital: Any, clock: list[float]) -> None:
    """A line that breaks while the update is sent costs no second training."""
    network = Network([Incoming(request())], clock)
    network.push_fails = 2
    trainer = Trained(answers(Status.OK))
    run(hospital, trainer, network, clock)
    assert [reply.status for reply in network.sent] == [Status.OK]
    assert len(trainer.asked) == 1


def test_it_tries_for_ever_and_says_so(hospital: Any, clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    """Waits grow to a minute, a little apart from other sites'; each is announced with its cause; success resets."""
    caplog.set_level(logging.INFO)
    failures = [NetworkError("nobody there")] * 9
    network = Network([None], clock)

    def connect() -> Network:
        if failures:
            raise failures.pop()
        return network

    pauses = run(hospital, Trained(), network, clock, connect=connect)
    expected = [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert all(0.8 * want <= got <= 1.2 * want for got, want in zip(pauses[:9], expected, strict=True))
    assert "nobody there; next try in 32 s" in caplog.text


def test_a_full_disk_does_not_end_a_connection(
    hospital: Any, clock: list[float], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of this session could not be noted: said in the log, and rounds are answered all the same."""

    def full(_state: StateFolder, name: str, _data: object) -> None:
        raise ConfigurationError(f"{name}: cannot be written (No space left on device); make room")

    monkeypatch.setattr(StateFolder, "write_json", full)
    network = Network([Incoming(request())], clock)
    run(hospital, Trained(answers(Status.OK)), network, clock)
    assert [reply.status for reply in network.sent] == [Status.OK]
    assert "node.json: cannot be written" in caplog.text


def test_ten_minutes_without_a_server_are_over_a_wait_later(hospital: Any, clock: list[float]) -> None:
    """The longest wait is a minute and a fifth, however long it lasted; until then it is no burden to anybody."""
    network, tries = Network([None], clock), list[float]()

    def connect() -> Network:
        tries.append(clock[0])
        if clock[0] < 600:
            raise NetworkError("nobody there")
        return network

    run(hospital, Trained(), network, clock, connect=connect)
    assert 600 <= tries[-1] <= 600 + 1.2 * service.LONGEST_WAIT
    assert len(tries) <= 20


def test_a_second_process_with_the_key_ends_it_with_an_error(
    hospital: Any, clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    """It does not try again, and says why in the log as an error."""
    network = Network([ContestedError("another process uses this site's key")], clock)
    with caplog.at_level(logging.ERROR, "wardround.client"), pytest.raises(ContestedError):
        run(hospital, Trained(), network, clock)
    assert [record.getMessage() for record in caplog.records] == ["another process uses this site's key"]


def test_it_comes_back_with_the_number_of_before(hospital: Any, clock: list[float]) -> None:
    """The server's number for this site is kept on disk; for another server's address it is not used."""
    state = hospital[1]
    network = Network([NetworkError("gone")], clock)
    run(hospital, Trained(), network, clock)
    assert network.previous == [None, 9]
    state.write_json(NODE, {"node": 5, "server": "elsewhere:1"})
    network = Network([], clock)
    run(hospital, Trained(), network, clock)
    assert network.previous == [None]


def test_questions_become_rarer_while_nothing_comes(hospital: Any, clock: list[float]) -> None:
    """From 20 a second just after a message to one a second, never more often than before."""
    network = Network([None] * 200, clock)
    pauses = run(hospital, Trained(), network, clock)
    assert pauses[0] == 0.05
    assert pauses[-1] == 1.0
    assert pauses == sorted(pauses)


def test_it_waits_on_after_the_last_round_unless_asked_to_end(hospital: Any, clock: list[float]) -> None:
    """The last round may be asked for again, so by default the site stays."""
    network = Network([Incoming(request(3)), *[None] * 300], clock)
    run(hospital, Trained(answers(Status.OK, 3)), network, clock)
    assert not network.events


def test_it_ends_when_the_study_is_over_if_asked_to(hospital: Any, clock: list[float]) -> None:
    """The last round's update was taken and for two minutes nothing more came."""
    network = Network([Incoming(request(3)), *[None] * 1000], clock)
    run(hospital, Trained(answers(Status.OK, 3)), network, clock, ends=True)
    assert clock[0] >= service.QUIET_SECONDS
    assert network.events


def test_it_ends_when_the_server_has_gone_after_the_last_round(hospital: Any, clock: list[float]) -> None:
    """A server that was switched off after the study is as good an end."""
    network = Network([Incoming(request(3))], clock)
    calls = []

    def connect() -> Network:
        calls.append(clock[0])
        if len(calls) > 1:
            raise NetworkError("gone")
        network.events.append(NetworkError("gone"))
        return network

    run(hospital, Trained(answers(Status.OK, 3)), network, clock, ends=True, connect=connect)
    assert clock[0] >= service.QUIET_SECONDS


@pytest.mark.parametrize(("status", "number"), [(Status.OK, 2), (Status.BUDGET, 3), (Status.LOCAL_FAILURE, 3)])
def test_nothing_but_the_last_rounds_update_ends_it(
    hospital: Any, clock: list[float], status: Status, number: int
) -> None:
    """An earlier round, or a last round that failed here, is not the end of the study."""
    network = Network([Incoming(request(number)), *[None] * 300], clock)
    with pytest.raises(Stop):
        run(hospital, Trained(answers(status, number)), network, clock, ends=True)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"code": "0" * 64}, "another version of wardround"),
        ({"wire": 99}, "another version of wardround"),
        ({"study": "0" * 64}, "another study than was enrolled for"),
    ],
)
def test_a_server_that_differs_is_named_in_the_log(
    hospital: Any, clock: list[float], caplog: pytest.LogCaptureFixture, change: dict[str, Any], expected: str
) -> None:
    """The site goes online and answers with a code, and its own people read why."""
    network = Network([], clock)
    network.seen = Health(**{**vars(network.seen), **change})
    run(hospital, Trained(), network, clock)
    assert expected in caplog.text
    assert network.previous == [None]


def test_a_site_that_did_not_enrol_does_not_start(hospital: tuple[SiteFile, StateFolder]) -> None:
    """Without a person's yes nothing is opened and nobody is called."""
    path = Path(hospital[0].study).parent / "site.yaml"
    with pytest.raises(ConfigurationError, match="not enrolled yet; run `wardround client enrol` first"):
        serve(path)


def test_a_script_that_serves_writes_to_the_state_folder_alone(
    hospital: tuple[SiteFile, StateFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`serve` itself, not only the command, sends what Flower and torch write into the state folder."""
    for variable in ("FLWR_HOME", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(variable, "elsewhere")
    site, state = hospital
    with pytest.raises(ConfigurationError, match="not enrolled"):
        serve(Path(site.state).parent / "site.yaml")
    assert os.environ["FLWR_HOME"] == str(state / "flower")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(state / "torch")


def test_a_second_client_on_the_same_folder_is_refused(hospital: tuple[SiteFile, StateFolder]) -> None:
    """Two clients would be two writers of one ledger: the second ends with one line, and changes nothing."""
    path = Path(hospital[0].study).parent / "site.yaml"
    before = {file.name: file.read_bytes() for file in hospital[1].path.iterdir() if file.is_file()}
    with hospital[1].lock(), pytest.raises(ConfigurationError, match="in use by another process"):
        serve(path)
    after = {file.name: file.read_bytes() for file in hospital[1].path.iterdir() if file.is_file()}
    after.pop("lock")
    assert after == before


def test_heartbeats_surface_their_failure_where_it_is_asked_for() -> None:
    """A beat that fails does not end the thread: `check` raises it until a later beat succeeds."""
    beats = threading.Semaphore(0)
    outcome: list[NetworkError | None] = [NetworkError("lost")]

    def beat() -> None:
        beats.release()
        if outcome[0] is not None:
            raise outcome[0]

    heartbeat = Heartbeat(beat, 0.001, after_failure=0.001)
    with heartbeat:
        for _ in range(3):
            assert beats.acquire(timeout=30)
        with pytest.raises(NetworkError, match="lost"):
            heartbeat.check()
        outcome[0] = None
        for _ in range(3):
            assert beats.acquire(timeout=30)
        heartbeat.check()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_whatever_waits(number: signal.Signals) -> None:
    """Both signals raise Stop out of a long wait, and the handlers of before come back."""

    def interrupted() -> None:
        with stoppable():
            os.kill(os.getpid(), number)
            threading.Event().wait(60)

    before = signal.getsignal(number)
    with pytest.raises(Stop):
        interrupted()
    assert signal.getsignal(number) is before


def test_a_second_signal_says_that_it_is_one() -> None:
    """Whoever is tidying up when the second comes learns that somebody does not want to wait."""
    found: list[bool] = []
    with stoppable():
        for _ in range(3):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                threading.Event().wait(60)
            except Stop as stop:
                found.append(stop.again)
    assert found == [False, True, True]


def test_stop_is_no_failure() -> None:
    """No handler of failures swallows it."""
    assert not issubclass(Stop, Exception)


def test_a_heartbeat_that_fails_oddly_goes_on() -> None:
    """An exception that nobody foresaw surfaces as a NetworkError with its class, and the thread beats on."""
    beats = threading.Semaphore(0)

    def beat() -> None:
        beats.release()
        raise AssertionError("what the server said")

    with Heartbeat(beat, 0.001, after_failure=0.001) as heartbeat:
        for _ in range(3):
            assert beats.acquire(timeout=30)
        with pytest.raises(NetworkError, match="failed with AssertionError; connecting anew"):
            heartbeat.check()
