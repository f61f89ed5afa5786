"""One hospital of three that sends what it likes, in every round something else, to a real server.

The server's process is `wardround server run` over TLS; the hospitals run in the test, each round's update known by
heart. The hostile one has a key on the roster. Each round must count with the two honest sites, the average must be
theirs alone, and the server's memory must not grow with what it is sent.
"""

from __future__ import annotations

import json
import math
import pickle
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from common.models.network import build_network
from common.records import Reply, Request, Status, reply_to_content
from common.training import state_of
from common.weights import Weights, from_bytes
from tests.attacks.test_hostile_server import Program, program
from tests.server.hospitals import Hospital, wait_until
from tests.server.processes import make_folder, new_keys, server_of
from tests.small import small_study

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(sys.platform != "linux", reason="the server's memory is read from /proc"),
]

SITES = {"north": {"declared_patients": 80}, "east": {"declared_patients": 50}, "west": {"declared_patients": 70}}
STEP = 0.01
GROWTH_KB = 64_000  # what the server's largest size may grow by, over all attacks
Attack = Callable[[Request, Path], RecordDict]


def honest(request: Request) -> Reply:
    """The same small update in every round."""
    return Reply(request.header, Status.OK, {name: np.full_like(a, STEP) for name, a in request.weights.items()})


def updated(request: Request, change: Callable[[Weights], Weights]) -> RecordDict:
    update = honest(request).update
    assert update is not None
    return reply_to_content(Reply(request.header, Status.OK, change(update)))


def holding(request: Request, content: bytes) -> RecordDict:
    """An update whose arrays have these bytes in place of numpy's."""
    found = reply_to_content(honest(request))
    record = found["update"]
    assert isinstance(record, ArrayRecord)
    found["update"] = ArrayRecord({n: Array("float32", a.shape, "numpy.ndarray", content) for n, a in record.items()})
    return found


def beside(request: Request, **records: Any) -> RecordDict:
    return RecordDict({**reply_to_content(honest(request)), **records})


# what is sent -> the update, and the word or reason that the server writes down
ATTACKS: dict[str, tuple[Attack, str]] = {
    "not numbers": (lambda r, _: updated(r, lambda u: {n: a * math.nan for n, a in u.items()}), "non-finite"),
    "infinite": (lambda r, _: updated(r, lambda u: {n: a + math.inf for n, a in u.items()}), "non-finite"),
    "another shape": (lambda r, _: updated(r, lambda u: {n: a[None] for n, a in u.items()}), "differs from float32"),
    "an array less": (lambda r, _: updated(r, lambda u: dict(list(u.items())[1:])), "names of arrays differ"),
    "another name": (lambda r, _: updated(r, lambda u: {f"{n}x": a for n, a in u.items()}), "names of arrays differ"),
    "double precision": (
        lambda r, _: updated(r, lambda u: {n: a.astype(np.float64) for n, a in u.items()}),  # type: ignore[misc]  # on purpose
        "must hold float32",
    ),
    "a huge norm": (lambda r, _: updated(r, lambda u: {n: a + 1e30 for n, a in u.items()}), "exceeds"),
    "a norm that is infinite as a sum": (
        lambda r, _: updated(r, lambda u: {n: a + 3e38 for n, a in u.items()}),
        "exceeds",
    ),
    "a program as arrays": (lambda r, p: holding(r, program(p / "owned")), "cannot be read"),
    "a pickle as arrays": (lambda r, p: holding(r, pickle.dumps(Program(p / "owned"))), "cannot be read"),
    "a number of examples": (lambda r, _: beside(r, metrics=MetricRecord({"num-examples": 10**9})), "exactly"),
    "a record of a million numbers": (
        lambda r, _: beside(r, m=MetricRecord({f"{i}": 1 for i in range(1_000_000)})),
        "",
    ),
    "a list of a million numbers": (lambda r, _: beside(r, m=MetricRecord({"m": [1] * 1_000_000})), ""),
    "a million words": (lambda r, _: beside(r, m=ConfigRecord({f"{i}": "" for i in range(200_000)})), ""),
    "fifty thousand records": (
        lambda r, _: beside(r, **{f"{i}": ConfigRecord({"i": i}) for i in range(50_000)}),
        "",
    ),
    "one array under many names": (
        lambda r, _: beside(r, more=ArrayRecord({f"{i}": Array(np.zeros(9, np.float32)) for i in range(50_000)})),
        "",
    ),
    "another round": (
        lambda r, _: reply_to_content(Reply(type(r.header)(r.header.study, r.header.code, 99), Status.OK, r.weights)),
        "differ from what was asked",
    ),
    "a word that is none": (lambda r, _: RecordDict({"reply": ConfigRecord({"status": "GREAT"})}), "exactly"),
    "nothing": (lambda _r, _p: RecordDict(), "exactly"),
}


class Hostile(Hospital):
    """West: answers round N with the N-th attack; what the server does not take stays away."""

    attacks = tuple(ATTACKS)
    place = Path()

    @staticmethod
    def _content(reply: Reply) -> RecordDict:
        weights = reply.update
        assert weights is not None
        name = Hostile.attacks[reply.header.round_number - 1]
        return ATTACKS[name][0](Request(reply.header, weights), Hostile.place)


@dataclass
class Story:
    """The server's lines of all rounds, its largest size after the first and the last (kB), what it made and said."""

    lines: dict[str, dict[str, Any]]
    before_kb: int
    after_kb: int
    weights: Weights
    printed: str
    place: Path


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    place = tmp_path_factory.mktemp("hostile-site")
    study = small_study(
        sites=SITES,
        quorum=2,
        training={"recipe": "fedavg-local", "rounds": len(ATTACKS), "aggregation": "uniform"},
        model={"hidden": 2, "embedding": 2},
    )
    keys = new_keys(study)
    folder = make_folder(place / "study", study, keys, deadline_seconds=60.0)
    Hostile.place = place
    with server_of(folder) as server:

        def same(request: Request) -> Reply:
            return Reply(request.header, Status.OK, request.weights)

        north, east = (Hospital(server.address, keys[site], honest, folder.authority) for site in ("north", "east"))
        with Hostile(server.address, keys["west"], same, folder.authority), north, east:
            wait_until(folder.metrics.exists, 1200)  # the first attack is a small one; all is loaded now
            pause = threading.Event()
            before = after = peak_kb(server.process.pid)
            while server.process.poll() is None:
                after = peak_kb(server.process.pid, after)
                pause.wait(0.2)
        printed = server.finish()
    lines = [line for line in map(json.loads, folder.metrics.read_text().splitlines()) if line["counted"]]
    assert [line["round"] for line in lines] == list(range(1, len(ATTACKS) + 1))
    weights = from_bytes((folder.path / "weights.safetensors").read_bytes())
    return Story(dict(zip(ATTACKS, lines, strict=True)), before, after, weights, printed, place)


def peak_kb(process: int, default: int = 0) -> int:
    """The most memory that a process has had at once."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return default
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("VmHWM")), default)


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_round_counts_without_it(attack: str, story: Story) -> None:
    """Two updates make the quorum, and the third is refused with the reason that fits, or never arrived whole."""
    line, reason = story.lines[attack], ATTACKS[attack][1]
    assert line["counted"]
    assert line["sites"] == ["east", "north"]
    assert reason in line["refused"]["west"]


def test_the_average_is_the_honest_sites_alone(story: Story) -> None:
    """All rounds together moved each weight by the honest step, to rounding: the start is known."""
    study = small_study(sites=SITES, quorum=2, model={"hidden": 2, "embedding": 2})
    start = state_of(build_network(study))
    for name, array in story.weights.items():
        assert np.allclose(array - start[name], STEP * len(ATTACKS), atol=1e-5)


def test_memory_is_bounded(story: Story) -> None:
    """The largest size that the server ever had is little more than it was before the first attack."""
    print(f"server: {story.before_kb} kB before, at most {story.after_kb} kB")
    assert story.after_kb - story.before_kb < GROWTH_KB


def test_nothing_ran(story: Story) -> None:
    """No program in an update was started, and the study ended."""
    assert list(story.place.rglob("owned")) == []
    assert f"finished: {len(ATTACKS)} rounds" in story.printed
