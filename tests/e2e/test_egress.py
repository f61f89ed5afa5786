"""Everything that leaves a hospital stands in docs/egress.md, and nothing else leaves.

One story with real processes: a hospital makes its key, enrols, takes part in three rounds, tells metrics and leaves,
with a recorder between it and the study's server. All that was sent is decoded to the last byte; the fields are
compared with the page's tables. An audit hook in the hospital's processes notes every other way out.
"""

from __future__ import annotations

import datetime
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from client.fleet import Fleet, bodies, rehearsal
from client.hospital import Hospital, site_with
from client.ledger import MemoryLedger
from client.site_file import load_site_file
from client.state import KEY, PUBLIC, StateFolder
from common.keys import generate, load_private, read_public
from common.models.network import build_network
from common.provenance import code_digest
from common.records import Header, Reply, Request, Status, request_to_content
from common.training import state_of
from tests.client.hospitals import with_key, write_site, write_study
from tests.e2e.traffic import Pushed, Recorder, Sent, body_of, documented_in, fields_in, replies_in, seen_in
from tests.server import hospitals as others
from tests.server.hospitals import wait_until
from tests.server.processes import ROOT, make_folder, server_of

pytestmark = pytest.mark.full  # a minute of real processes; .ci/run has its share of those

PAGE = ROOT / "docs" / "egress.md"
HOOK = """
import sys
def note(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg"):
        address = arguments[:2] if event.startswith("socket.get") else arguments[1]
        if isinstance(address, tuple):  # not a socket of this machine's own
            with open({path!r}, "a") as file:
                print(*address[:2], file=file)
    elif event in ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec"):
        with open({path!r} + ".programs", "a") as file:
            print(arguments[0], file=file)
sys.addaudithook(note)
"""
ROUNDS = 3


@dataclass
class Story:
    """What happened: requests by phase, and what else the hospital's processes reached or started."""

    offline: list[Sent]  # keygen, budget and dry run
    enrolling: list[Sent]
    training: list[Sent]
    leaving: list[Sent]
    names: list[str | None]
    reached: set[str]
    programs: set[str]
    port: int
    dry: list[Pushed]
    node: int

    @property
    def all(self) -> list[Sent]:
        return [*self.offline, *self.enrolling, *self.training, *self.leaving]

    @property
    def replies(self) -> list[Pushed]:
        """Of the rounds."""
        return replies_in(self.training)[:ROUNDS]

    @property
    def metrics(self) -> list[Pushed]:
        """What came after them."""
        return replies_in(self.training)[ROUNDS:]


@pytest.fixture(scope="module")
def story(cohort: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    place = tmp_path_factory.mktemp("egress")
    study = write_study(place / "terms", quorum=2, metrics={"noise_multiplier": 2.0, "bins": 6})
    policy = {"max_epsilon": 6.0, "delta": 1e-5, "min_metrics_noise": 2.0}
    east = generate()
    folder = make_folder(place / "study", study, {"east": east})
    reached = place / "reached"
    (place / "hook").mkdir()
    (place / "hook" / "sitecustomize.py").write_text(HOOK.format(path=str(reached)))
    Path(f"{reached}.programs").touch()
    environment = {**os.environ, "PYTHONPATH": f"{place / 'hook'}:{ROOT}", "OMP_NUM_THREADS": "1"}

    with (
        server_of(folder) as server,
        Recorder(folder.terms.port, folder.certificate, folder.key, folder.authority) as recorder,
    ):
        files = {"study": str(folder.path / "study.yaml"), "policy": policy}
        path = write_site(
            place, cohort["north"], {"address": f"localhost:{recorder.port}", "ca": str(folder.authority)}, **files
        )
        site = load_site_file(path)

        def command(*arguments: str) -> str:
            done = subprocess.run(
                [sys.executable, "-m", "wardround", "client", *arguments],
                cwd=place,
                env=environment,
                capture_output=True,
                text=True,
                timeout=240,
                check=False,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout

        seen = 0

        def taken() -> list[Sent]:
            """What has been sent since the last time."""
            nonlocal seen
            sent = recorder.sent()
            new, seen = sent[seen:], len(sent)
            return new

        command("keygen", str(path))
        folder.admit("north", read_public(Path(site.state) / PUBLIC))
        offline = taken()
        command("enrol", str(path), "--yes")
        enrolling = taken()
        command("run", str(path), "--dry-run", str(place / "dry"))
        offline += taken()

        def answer(request: Request) -> Reply | None:
            """East answers every round once, and is silent when asked for metrics: so the server goes on waiting."""
            if request.header.round_number in answered:
                return None
            answered.add(request.header.round_number)
            return Reply(request.header, Status.OK, {name: 0 * array for name, array in request.weights.items()})

        answered: set[int] = set()
        run = [sys.executable, "-m", "wardround", "client", "run", str(path)]
        with (place / "out").open("wb") as out:
            client = subprocess.Popen(run, cwd=place, env=environment, stdout=out, stderr=out)
        try:
            with others.Hospital(server.address, east, answer, folder.authority):
                wait_until(lambda: _complete(recorder, ROUNDS + 1) or client.poll() is not None, 240)
            client.send_signal(signal.SIGTERM)
            assert client.wait(60) == 0, (place / "out").read_text()
        finally:
            if client.poll() is None:
                client.kill()
                client.wait()
        training = taken()
        command("budget", str(path))
        offline += taken()
        command("leave", str(path), "--yes")
        state = StateFolder(Path(site.state))
        with Fleet(site.server, load_private(state / KEY)) as fleet:  # real ones come every 20 seconds
            node = fleet.activate()
            fleet.heartbeat()
        yield Story(
            offline=offline,
            enrolling=enrolling,
            training=training,
            leaving=taken(),
            names=recorder.names,
            reached=set(reached.read_text().splitlines()),
            programs=set(Path(f"{reached}.programs").read_text().splitlines()),
            port=recorder.port,
            dry=[dry_reply(place / "dry")],
            node=node,
        )


def _complete(recorder: Recorder, wanted: int) -> bool:
    """Whether so many replies have left whole: the client goes on to ask for the next message."""
    asked = [one.route for one in recorder.sent(whole=False)]
    pushes = [index for index, route in enumerate(asked) if route == "push-messages"]
    return len(pushes) >= wanted and "pull-messages" in asked[pushes[wanted - 1] :]


def dry_reply(folder: Path) -> Pushed:
    """What a dry run wrote, in the form of recorded traffic."""
    files = sorted(folder.glob("request-*.bin"))
    routes = ["push-messages", *["push-object"] * (len(files) - 1)]
    return pushed([(route, file.read_bytes()) for route, file in zip(routes, files, strict=True)])


def pushed(requests: list[tuple[str, bytes]]) -> Pushed:
    (reply,) = replies_in(Sent(f"POST /v1/fleet/{route}", [], body) for route, body in requests)
    return reply


def test_the_page_lists_every_field_that_left_and_no_other(story: Story) -> None:
    """Requests, headers, protobuf fields, records, keys: what was seen and what docs/egress.md lists are the same."""
    listed = documented_in(PAGE.read_text(encoding="utf-8"))
    seen = seen_in(story.all)
    assert {where: names - listed.get(where, set()) for where, names in seen.items()} == {w: set() for w in seen}
    assert {where: names - seen.get(where, set()) for where, names in listed.items()} == {w: set() for w in listed}


def test_it_reaches_nobody_but_the_server(story: Story) -> None:
    """All look-ups and connections of all processes are of the server's address, and no other program is started."""
    assert story.reached <= {f"{host} {story.port}" for host in ("localhost", "127.0.0.1", "::1")}
    assert set(story.names) == {"localhost"}
    assert story.programs == set()


def test_key_budget_and_dry_run_send_nothing(story: Story) -> None:
    """Commands that need no server do not talk to it."""
    assert story.offline == []


def test_enrolling_says_that_the_key_is_there_and_nothing_else(story: Story) -> None:
    """Before the yes the server hears a question for its public facts, hello and goodbye."""
    assert [one.line for one in story.enrolling] == [
        "GET /health",
        "POST /v1/fleet/activate-node",
        "POST /v1/fleet/deactivate-node",
    ]


def test_leaving_is_a_goodbye(story: Story) -> None:
    """Leaving is one request; what follows it is the test's own heartbeat."""
    assert [one.route for one in story.leaving] == [
        *("deactivate-node", "activate-node", "send-node-heartbeat", "deactivate-node")
    ]


def test_no_clock_finer_than_a_second_leaves(story: Story) -> None:
    """Signed times are whole seconds; a reply's times are its request's; how long training took is sent as 0."""
    signed = [dict(one.headers)["flwr-timestamp"] for one in story.all if one.body]
    assert [time for time in signed if datetime.datetime.fromisoformat(time).microsecond] == []
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", time) for time in signed)
    for reply in story.replies:
        fields = dict(fields_in(reply.announcement))
        assert fields["clientapp_runtime_list"] == 0.0
        assert fields["messages_list.metadata.created_at"] == dict(reply.fields()["Message"])["metadata.created_at"]


def test_each_round_is_one_reply_of_the_same_size(story: Story) -> None:
    """Three rounds, three replies: the same objects, each as large as in the round before."""
    sizes = [
        sorted((kind, len(fields)) for kind, fields in reply.fields().items())
        + sorted(len(content) for content in reply.objects.values())
        for reply in story.replies
    ]
    assert len(sizes) == ROUNDS
    assert sizes[0] == sizes[1] == sizes[2]
    assert [dict(reply.fields()["reply"])["round"] for reply in story.replies] == [1, 2, 3]


def test_metrics_are_one_reply_of_noised_numbers(story: Story) -> None:
    """Asked once, answered once: a histogram of the study's form, none of whose numbers is a count."""
    (reply,) = story.metrics
    fields = reply.fields()
    assert [name for name, _ in fields["metrics"]] == ["histogram"]
    assert "update" not in fields
    ((_, cells),) = fields["ArrayChunk"]
    assert (cells.shape, cells.dtype) == ((2, 6), np.float32)
    assert (cells != np.round(cells * 12) / 12).all()  # with up to four records a patient, counts are twelfths
    assert dict(fields["reply"])["status"] == "OK"


# Named by chance, by time or by the ledger; and the update itself with everything that is named after its hash.
OWN = {
    *("node.node_id", "session_id", "run_id", "messages_list.metadata.run_id", "metadata.run_id"),
    *("messages_list.metadata.message_id", "messages_list.metadata.src_node_id", "metadata.src_node_id"),
    *("messages_list.metadata.reply_to_message_id", "metadata.reply_to_message_id"),
    *("messages_list.metadata.created_at", "messages_list.metadata.ttl", "metadata.created_at", "metadata.ttl"),
    *("messages_list.metadata.dst_task_id", "metadata.dst_task_id", "message_object_trees.object_id", "head"),
}


def test_a_dry_run_writes_what_is_sent(story: Story) -> None:
    """Field by field the first round's reply, but for `OWN` and the noised numbers.

    The ledger's head is empty in a dry run, which has no ledger.
    """
    dry, sent = story.dry[0], story.replies[0]
    assert _comparable(dry) == _comparable(sent)
    node = story.node
    envelope = dict(fields_in(sent.announcement))
    assert (envelope["node.node_id"], envelope["messages_list.metadata.src_node_id"]) == (node, node)


def _comparable(reply: Pushed) -> Any:
    """A reply without what is its own: the values of `OWN`, hashes, and the numbers of the update."""

    def plain(fields: Any) -> list[tuple[str, Any]]:
        return [(name, None if name in OWN else value) for name, value in fields]

    fields = reply.fields()
    return (
        plain(fields_in(reply.announcement)),
        {kind: plain(fields[kind]) for kind in ("Message", "reply", "Array")},
        {kind: [name for name, _ in fields[kind]] for kind in ("RecordDict", "update")},
        [(name, array.dtype, array.shape) for name, array in fields["ArrayChunk"]],
    )


def test_nothing_but_the_update_depends_on_the_records(cohort: dict[str, Path], tmp_path: Path) -> None:
    """Two hospitals that differ in their records alone send the same bytes but for head and update, of equal size."""
    sent: list[Pushed] = []
    for name in ("north", "west"):  # 80 and 16 patients, under the same name
        study = write_study(tmp_path / name)
        path = write_site(tmp_path / name, cohort[name], {"address": "localhost:1", "plaintext": True})
        site, state, _ = with_key(path)
        hospital = Hospital(site_with(MemoryLedger(3.0, 1e-5), site, study, state))
        request = Request(Header(study.digest(), code_digest(), 1), state_of(build_network(study)))
        if not sent:
            message = rehearsal(request_to_content(request), 2)
        parts = bodies(Message(hospital.answer(message, 2).content, reply_to=message), message, 2)
        sent.append(pushed([(route.rsplit("/", 1)[1], body) for route, _, body in parts]))
    one, other = sent
    assert len(one.announcement.SerializeToString()) == len(other.announcement.SerializeToString())
    assert sorted(map(len, one.objects.values())) == sorted(map(len, other.objects.values()))
    fields, others_ = one.fields(), other.fields()
    for kind in ("Message", "reply", "Array"):
        assert fields[kind] == others_[kind]
    for kind in ("RecordDict", "update"):
        assert [name for name, _ in fields[kind]] == [name for name, _ in others_[kind]]
    envelope, theirs = list(fields_in(one.announcement)), list(fields_in(other.announcement))
    hashes = {"message_object_trees.object_id", "messages_list.metadata.message_id"}
    assert [pair for pair in envelope if pair[0] not in hashes] == [pair for pair in theirs if pair[0] not in hashes]
    updates = [dict(kinds["ArrayChunk"]) for kinds in (fields, others_)]
    assert all(not np.array_equal(updates[0][name], updates[1][name]) for name in updates[0])


Spoil = Callable[[Sent], Sent]


def _with_header(sent: Sent) -> Sent:
    return Sent(sent.line, [*sent.headers, ("x-patients", "1042")], sent.body)


def _with_field(sent: Sent) -> Sent:
    message = body_of(sent)
    message.messages_list[0].metadata.group_id = "1042 patients"
    return Sent(sent.line, sent.headers, message.SerializeToString(deterministic=True))


def _with_unknown_field(sent: Sent) -> Sent:
    return Sent(sent.line, sent.headers, sent.body + b"\xfa\x06\x041042")


def _with_query(sent: Sent) -> Sent:
    return Sent(sent.line + "?patients=1042", sent.headers, sent.body)


@pytest.mark.parametrize("spoil", [_with_header, _with_field, _with_unknown_field, _with_query])
def test_a_field_more_would_be_noticed(spoil: Spoil, story: Story) -> None:
    """The decoder and the comparison have teeth: one more header, field, unknown field or path fails."""
    sent = [spoil(one) if one.route == "push-messages" else one for one in story.training]
    listed = documented_in(PAGE.read_text(encoding="utf-8"))
    try:
        seen = seen_in(sent)
    except (AssertionError, KeyError):
        return
    assert any(names - listed.get(where, set()) for where, names in seen.items()) or seen.keys() - listed.keys()
