"""The coordinator's server, as a process: a full disk, a clock that is off, and SIGTERM whatever it is doing.

Its hospitals are real Sites without noise in threads of the test (tests/server/test_run.py), so that a study that went
through all of it can be compared with an undisturbed one, to the last bit.
"""

from __future__ import annotations

import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from common.records import Reply, Request, Status
from common.weights import Weights
from server.progress import round_of
from tests.e2e.failing import Clock, disk, full, told
from tests.server.hospitals import Hospital, wait_until
from tests.server.processes import Server, make_folder, server_of
from tests.server.test_run import STUDY, Cohort, cohort_of, expected, final, lines, now, online, same

__all__ = ["expected"]  # a fixture

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(sys.platform != "linux", reason="mounts file systems, puts a clock off"),
]
LONG = 300.0


def said(server: Server) -> str:
    return server.output.read_text()


def test_a_full_disk_ends_the_server_with_a_line_and_no_round_is_lost(tmp_path: Path, expected: Weights) -> None:
    """The disk fills in round 2: the server says so and ends; with space, `--resume` goes on to the same weights."""
    cohort = cohort_of()
    with disk(tmp_path / "study", 8000) as place, ExitStack() as fills:
        folder = make_folder(place, STUDY, cohort.keys)
        honest = cohort.answer("east")

        def filling(request: Request) -> Reply:
            reply = honest(request)
            if request.header.round_number == 2 and not (place / "filler").exists():
                fills.enter_context(full(place))
            return reply

        with server_of(folder) as server, cohort.taking_part(server, "north"):
            with Hospital(server.address, cohort.keys["east"], filling, folder.authority):
                assert server.process.wait(LONG) == 2, said(server)
            assert re.search(r"error: .*(full|No space left on device).*; free space", said(server))
            assert "defect" not in said(server)
        fills.close()
        began = time.monotonic()
        with server_of(folder, "--resume") as server, cohort.taking_part(server):
            wait_until(lambda: round_of(folder.checkpoint) >= 2, LONG)
            told("disk of the server's state full; from `--resume` with space again to the round's checkpoint", began)
            assert server.process.wait(LONG) == 0
        assert same(final(folder), expected)
        assert [line["round"] for line in lines(folder) if line["counted"]][-1] == 3
        assert "Traceback" not in said(server)


@pytest.mark.parametrize("off", [3600, -3600], ids=["ahead", "behind"])
def test_a_clock_that_is_off_by_an_hour_stops_the_study_and_harms_nothing(
    off: int, tmp_path: Path, expected: Weights
) -> None:
    """The server's clock jumps within round 2: hospitals are turned away, no round counts; once right, it goes on."""
    cohort, clock = cohort_of(), Clock(tmp_path)
    folder = make_folder(tmp_path / "study", STUDY, cohort.keys, deadline_seconds=20.0)
    honest, jumped = cohort.answer("east"), threading.Event()

    def jumping(request: Request) -> Reply:
        reply = honest(request)
        if request.header.round_number == 2 and not jumped.is_set():
            clock.set(off)
            jumped.set()
        return reply

    with server_of(folder, **clock.environment) as server, ExitStack() as stack:
        with_east(cohort, server, stack, jumping)
        assert jumped.wait(LONG)
        wait_until(lambda: "status 401" in (folder.state / "server.log").read_text(), LONG)
        assert [line["round"] for line in lines(folder) if line["counted"]] == [1]
        clock.set(0)
        began = time.monotonic()
        wait_until(lambda: [line["round"] for line in lines(folder) if line["counted"]][-1] >= 2, LONG)
        told(f"server's clock {off:+d} s within a round; once right, to the round's checkpoint", began)
        assert server.process.wait(LONG) == 0
    assert same(final(folder), expected)
    assert "Traceback" not in said(server)


def reads_the_study(cohort: Cohort, server: Server, stack: ExitStack) -> None:
    """It listens, and has just begun."""


def waits_for_sites(cohort: Cohort, server: Server, stack: ExitStack) -> None:
    stack.enter_context(cohort.taking_part(server, "north"))
    wait_until(lambda: online(server.folder) == {"north"}, LONG)


def with_east(cohort: Cohort, server: Server, stack: ExitStack, answer: Callable[[Request], Reply]) -> None:
    stack.enter_context(cohort.taking_part(server, "north"))
    stack.enter_context(Hospital(server.address, cohort.keys["east"], answer, server.folder.authority))


def waits_for_replies(cohort: Cohort, server: Server, stack: ExitStack) -> None:
    asked, honest = threading.Event(), cohort.answer("east")

    def holding(request: Request) -> Reply:
        asked.set()
        server.process.wait(LONG)
        return honest(request)

    with_east(cohort, server, stack, holding)
    assert asked.wait(LONG)


def is_paused(cohort: Cohort, server: Server, stack: ExitStack) -> None:
    with_east(cohort, server, stack, lambda request: Reply(request.header, Status.POLICY))
    wait_until(lambda: "usable updates" in now(server.folder).get("note", ""), LONG)


def writes_down_a_round(cohort: Cohort, server: Server, stack: ExitStack) -> None:
    honest = cohort.answer("east")

    def one_round(request: Request) -> Reply:
        if request.header.round_number > 1:  # or the study might be over before the signal comes
            server.process.wait(LONG)
        return honest(request)

    with_east(cohort, server, stack, one_round)
    wait_until(lambda: any(line["counted"] for line in lines(server.folder)), LONG)


PHASES = (reads_the_study, waits_for_sites, waits_for_replies, is_paused, writes_down_a_round)


def test_sigterm_ends_it_cleanly_in_every_phase_and_it_resumes(tmp_path: Path, expected: Weights) -> None:
    """Status 0, what to do next, no traceback; resumed after each, the study has the undisturbed weights."""
    cohort = cohort_of()
    folder = make_folder(tmp_path / "study", STUDY, cohort.keys)
    for phase in PHASES:
        with ExitStack() as stack, server_of(folder, "--resume") as server:
            phase(cohort, server, stack)
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(LONG) == 0, (phase, said(server))
            told(f"SIGTERM to the server while it {phase.__name__.replace('_', ' ')}, to its end", began)
    with server_of(folder, "--resume") as server, cohort.taking_part(server):
        assert server.process.wait(LONG) == 0
    assert same(final(folder), expected)
    assert said(server).count("stopped; go on with") == len(PHASES)
    assert "Traceback" not in said(server)
    assert "error:" not in said(server)
