"""A hospital's client as it runs: real processes, TLS, signals, and deaths at the worst moments.

One story, told once: the client runs, loses its training process in the middle of a round, survives a failing round,
is stopped, started again, killed, stopped in the middle of a round, and stopped twice. The tests look at what was
left behind.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from client.state import LOG
from common.models.network import build_network
from common.provenance import code_digest
from common.records import Header, Reply, Request, Status, reply_from_message, request_to_content
from common.training import state_of
from tests.client.coordinator import Authority, Coordinator
from tests.client.hospitals import enrolled_at, write_site, write_study
from tests.client.scripted import SECRET

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(sys.platform != "linux", reason="processes are watched through /proc and pidfd"),
]

RUN = """
import sys
from pathlib import Path
if __name__ == "__main__":
    from client.service import serve
    from tests.client.scripted import Script
    site, folder = map(Path, sys.argv[1:])
    serve(site, randomness=Script(folder))
    heavy = ("torch", "opacus", "polars", "dp_accounting", "scipy", "sqlite3", "client.ledger", "client.site")
    print("imported:", *[name for name in heavy if name in sys.modules])
"""
HOOK = """
import sys
def note(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        address = arguments[1] if event in ("socket.connect", "socket.sendto") else arguments[:2]
        if isinstance(address, tuple):  # not a socket of this machine's own
            with open({path!r}, "a") as file:
                print(*address[:2], file=file)
sys.addaudithook(note)
"""
HEAVY_LIMIT = 120_000  # kB: what the process that holds the connection may take while it waits


@dataclass
class Story:
    """What happened."""

    killed_while_training: Reply
    retried: Reply
    failed: Reply
    retried_after_failure: Reply
    asked_again: Reply
    malformed: Reply
    resident_kb: int
    stopped: tuple[int, str, str]  # status, standard output, standard error
    stopped_while_training: tuple[int, str, str]
    stored: Reply
    stopped_twice: tuple[int, str, str]
    orphan_ended: bool
    child_ended_with_parent: bool
    offline_at_the_end: bool
    log: str
    strays: list[Path]
    reached: set[str]
    address: str
    written: list[bytes]


@pytest.fixture(scope="module")
def story(cohort: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("hospital")
    home = folder / "home"
    home.mkdir()
    (folder / "hook").mkdir()
    (folder / "hook" / "sitecustomize.py").write_text(HOOK.format(path=str(folder / "reached.txt")))
    study = write_study(folder, training={"recipe": "fedavg-one-step", "rounds": 4, "learning_rate": 0.02})
    authority = Authority(folder / "ca")
    processes: list[subprocess.Popen[str]] = []
    weights = state_of(build_network(study))

    def request(number: int) -> Request:
        return Request(Header(study.digest(), code_digest(), number), weights)

    with Coordinator(study, authority.context()) as server, none_left(processes):
        path = write_site(folder, cohort["north"], {"address": f"localhost:{server.port}", "ca": str(authority.file)})
        state = enrolled_at(path, server.admit)

        def start() -> subprocess.Popen[str]:
            server.online.clear()
            environment = {
                **os.environ,
                "HOME": str(home),
                "PYTHONPATH": f"{folder / 'hook'}:{Path.cwd()}",
                "OMP_NUM_THREADS": "1",
            }
            process = subprocess.Popen(
                [sys.executable, "-c", RUN, str(path), str(folder)],
                cwd=home,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            processes.append(process)
            assert server.online.wait(180)
            return process

        def ask(number: int, kind: str = "train") -> Reply:
            return reply_from_message(server.ask(request_to_content(request(number)), kind))

        def hanging(number: int, attempt: int) -> int:
            """Ask for a round that hangs; returns the process that does."""
            server.send(server.offer(request_to_content(request(number))))
            note = folder / f"training-{number}-{attempt}"
            for _ in range(3000):
                if note.exists():
                    return int(note.read_text())
                threading.Event().wait(0.05)
            raise AssertionError("the round did not begin")

        first = start()
        child = hanging(1, 1)
        os.kill(child, signal.SIGKILL)
        killed = reply_from_message(server.replies.get(timeout=60))
        retried, failed, retried_after_failure, asked_again = ask(1), ask(2), ask(2), ask(2)
        malformed = ask(2, "evaluate")
        resident = resident_kb(first.pid)
        first.send_signal(signal.SIGTERM)
        stopped = ended(first)

        second = start()
        orphan = os.pidfd_open(hanging(3, 1))
        second.kill()
        ended(second)
        orphan_ended = bool(select.select([orphan], [], [], 60)[0])

        third = start()  # the server still takes the killed one for online
        hanging(3, 2)
        third.send_signal(signal.SIGTERM)
        assert server.offline.wait(60)
        (folder / "training-3-2.go").touch()
        stopped_while_training = ended(third)

        fourth = start()
        stored = ask(3)
        child_end = os.pidfd_open(hanging(4, 1))
        fourth.send_signal(signal.SIGTERM)
        assert server.offline.wait(60)
        fourth.send_signal(signal.SIGINT)
        stopped_twice = ended(fourth)
        yield Story(
            killed_while_training=killed,
            retried=retried,
            failed=failed,
            retried_after_failure=retried_after_failure,
            asked_again=asked_again,
            malformed=malformed,
            resident_kb=resident,
            stopped=stopped,
            stopped_while_training=stopped_while_training,
            stored=stored,
            stopped_twice=stopped_twice,
            orphan_ended=orphan_ended,
            child_ended_with_parent=bool(select.select([child_end], [], [], 60)[0]),
            offline_at_the_end=server.offline.is_set(),
            log=(state / LOG).read_text(),
            strays=sorted(home.rglob("*")),
            reached=set((folder / "reached.txt").read_text().splitlines()),
            address=f"localhost {server.port}",
            written=[file.read_bytes() for file in state.path.rglob("*") if file.is_file() and file.name != "key"],
        )
        for descriptor in (orphan, child_end):
            os.close(descriptor)


@contextmanager
def none_left(processes: list[subprocess.Popen[str]]) -> Iterator[None]:
    """Whatever fails, no process stays behind."""
    try:
        yield
    finally:
        for process in processes:
            if process.returncode is None:
                process.kill()
                print(process.communicate()[1])


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, error = process.communicate(timeout=120)
    return process.returncode, out, error


def resident_kb(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


def test_a_killed_training_process_is_reported_at_once(story: Story) -> None:
    """SIGKILL in the middle of a round is LOCAL_FAILURE for that round, and the site stays: the next one works."""
    assert story.killed_while_training.status is Status.LOCAL_FAILURE
    assert story.killed_while_training.header.round_number == 1
    assert story.retried.status is Status.OK


def test_a_failing_round_is_a_code_and_the_next_works(story: Story) -> None:
    """An exception in training is LOCAL_FAILURE; the retry is OK; the same round again is the same bytes."""
    assert story.failed.status is Status.LOCAL_FAILURE
    assert story.retried_after_failure.status is Status.OK
    assert story.asked_again.update is not None
    assert story.retried_after_failure.update is not None
    for name, array in story.asked_again.update.items():
        assert (array == story.retried_after_failure.update[name]).all()


def test_every_reply_of_the_site_carries_its_ledgers_head(story: Story) -> None:
    """The head moves on with every entry, and stays where nothing was written."""
    heads = [reply.head for reply in (story.retried, story.failed, story.retried_after_failure, story.asked_again)]
    assert all(len(head) == 64 for head in heads)
    assert len(set(heads)) == 3
    assert heads[2] == heads[3]


def test_another_message_is_malformed(story: Story) -> None:
    """EVALUATE is answered with a code, and the site goes on."""
    assert story.malformed.status is Status.MALFORMED


def test_no_value_of_a_patient_is_logged_or_printed(story: Story) -> None:
    """The failing round's text was in an exception, on standard output and on standard error: nowhere to be found."""
    assert "round 2 failed with ValueError" in story.log
    for text in (story.log, *story.stopped[1:], *story.stopped_while_training[1:], *story.stopped_twice[1:]):
        assert SECRET not in text
    assert all(SECRET.encode() not in content for content in story.written)


def test_the_process_with_the_connection_stays_small(story: Story) -> None:
    """It imports neither torch nor polars nor the ledger, and takes at most 120 MB."""
    assert story.stopped[1] == "imported:\n"
    assert story.resident_kb <= HEAVY_LIMIT


def test_sigterm_ends_it_cleanly(story: Story) -> None:
    """Status 0 and a goodbye to the server, idle or in the middle of a round."""
    assert story.stopped[0] == 0
    assert story.stopped_while_training[0] == 0
    assert story.offline_at_the_end


def test_a_round_in_training_is_stored_before_the_end(story: Story) -> None:
    """SIGTERM lets a round finish: asked again after the restart, it is answered, and not trained a third time."""
    assert story.stored.status is Status.OK


def test_a_second_signal_does_not_wait(story: Story) -> None:
    """Whoever asks twice gets an end at once: the training process is killed, its attempt stays spent."""
    assert story.stopped_twice[0] == 0
    assert story.child_ended_with_parent


def test_a_training_process_does_not_outlive_a_killed_client(story: Story) -> None:
    """SIGKILL of the client ends its training process, too: the ledger never has two writers."""
    assert story.orphan_ended


def test_nothing_is_written_outside_the_state_folder(story: Story) -> None:
    """Neither the home folder nor the working directory gets a file."""
    assert story.strays == []


def test_nobody_but_the_server_is_asked_for_or_reached(story: Story) -> None:
    """All look-ups and connections of all processes, from their first line to their last, are of one address."""
    port = story.address.split()[1]
    assert story.reached <= {story.address, f"127.0.0.1 {port}", f"::1 {port}"}
    assert story.address in story.reached
