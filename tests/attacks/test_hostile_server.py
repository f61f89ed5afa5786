"""A server that everybody trusted and nobody should: what it may ask of a hospital, and what it gets.

The client runs as it does at a hospital, `wardround client run` in a process of its own, with TLS, a policy and the
durable ledger. The server is the test's. Each attack is one message; what the client answered, what it wrote to its
log and what its ledger says afterwards decide. Before and after, an honest round shows that the site takes part.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MessageType, MetricRecord, RecordDict

from client.ledger_file import read_accounts
from client.state import LEDGER, LOG
from common.models.network import build_network
from common.provenance import code_digest
from common.records import Header, Reply, Request, Status, reply_from_message, request_to_content
from common.study import Study
from common.training import state_of
from common.weights import Weights
from tests.client.coordinator import Authority, Coordinator
from tests.client.hospitals import enrolled_at, write_site, write_study
from tests.server.hospitals import wait_until
from tests.server.processes import ROOT


@dataclass
class Truth:
    """What an honest server of the study would send."""

    study: Study
    weights: Weights

    def content(self, number: int = 1, **header: Any) -> RecordDict:
        """A request's content, with changes of its header."""
        terms = {"study": self.study.digest(), "code": code_digest(), "round_number": number, **header}
        return request_to_content(Request(Header(**terms), self.weights))

    def with_terms(self, **terms: Any) -> RecordDict:
        """The content with these keys added to the record of terms."""
        content = self.content()
        record = content["request"]
        assert isinstance(record, ConfigRecord)
        content["request"] = ConfigRecord({**record, **terms})
        return content

    def without(self, key: str) -> RecordDict:
        content = self.content()
        record = content["request"]
        assert isinstance(record, ConfigRecord)
        content["request"] = ConfigRecord({name: value for name, value in record.items() if name != key})
        return content

    def of_study(self, folder: Path, **changes: Any) -> RecordDict:
        """A request of another study: these terms are changed."""
        return self.content(study=write_study(folder, **changes).digest())

    def with_arrays(self, change: Callable[[str, Array], Array]) -> RecordDict:
        """The content with every array changed."""
        content = self.content()
        record = content["weights"]
        assert isinstance(record, ArrayRecord)
        content["weights"] = ArrayRecord({name: change(name, array) for name, array in record.items()})
        return content


PRIVACY = {"epsilon": 3.0, "delta": 1e-5, "sampling_rate": 0.25, "clip": 3.0}
TRAINING = {"recipe": "fedavg-local", "rounds": 100, "local_steps": 10_000, "learning_rate": 0.02}
BOMBS = {"64 MB": 16_000_000, "20 MB": 4_900_000}
Attack = Callable[[Truth, Path], RecordDict]


def _float64(_name: str, array: Array) -> Array:
    return Array(array.numpy().astype(np.float64))


def _nan(_name: str, array: Array) -> Array:
    return Array(np.full_like(array.numpy(), np.nan))


def _wider(_name: str, array: Array) -> Array:
    return Array(np.zeros((*array.shape, 2), np.float32))


class Program:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def program(path: Path) -> bytes:
    """A numpy file whose reading makes a file, for a reader that allows pickles."""
    held = BytesIO()
    np.save(held, np.array([Program(path)], dtype=object), allow_pickle=True)
    return held.getvalue()


def _holding(content: bytes) -> Callable[[str, Array], Array]:
    return lambda _name, array: Array("float32", array.shape, "numpy.ndarray", content)


def _and(content: RecordDict, name: str, record: Any) -> RecordDict:
    content[name] = record
    return content


# name -> (what is sent, the one word that comes back)
ATTACKS: dict[str, tuple[Attack, Status]] = {
    "no noise, as another study": (lambda t, p: t.of_study(p, privacy={**PRIVACY, "epsilon": None}), Status.STUDY),
    "a clip of 1e9, as another study": (lambda t, p: t.of_study(p, privacy={**PRIVACY, "clip": 1e9}), Status.STUDY),
    "a million steps, as another study": (lambda t, p: t.of_study(p, training=TRAINING), Status.STUDY),
    "another network, as another study": (lambda t, p: t.of_study(p, model={"cell": "lstm"}), Status.STUDY),
    "another task, as another study": (
        lambda t, p: t.of_study(p, task={"name": "hiv", "prevalence": 0.1}),
        Status.STUDY,
    ),
    "a study that is none": (lambda t, _: t.content(study="f" * 64), Status.STUDY),
    "a study's name as long as a book": (lambda t, _: t.content(study="f" * 10_000), Status.STUDY),
    "no noise, as one more term": (lambda t, _: t.with_terms(noise_multiplier=0.0), Status.MALFORMED),
    "a seed, as one more term": (lambda t, _: t.with_terms(seed=1), Status.MALFORMED),
    "a command, as one more term": (lambda t, _: t.with_terms(run="id"), Status.MALFORMED),
    "a term missing": (lambda t, _: t.without("head"), Status.MALFORMED),
    "a term of another type": (lambda t, _: t.with_terms(round="1"), Status.MALFORMED),
    "true as round 1": (lambda t, _: t.with_terms(round=True), Status.MALFORMED),
    "a head that is none": (lambda t, _: t.with_terms(head="../../etc"), Status.MALFORMED),
    "one more record": (lambda t, _: _and(t.content(), "config", ConfigRecord({"lr": 9.0})), Status.MALFORMED),
    "one more record of numbers": (lambda t, _: _and(t.content(), "m", MetricRecord({"n": 1})), Status.MALFORMED),
    "an app bundle beside the request": (
        lambda t, _: _and(t.content(), "fab", ConfigRecord({"content": b"PK\x03\x04"})),
        Status.MALFORMED,
    ),
    "an app bundle instead of it": (lambda _t, _p: RecordDict({"fab": ConfigRecord({"x": b"PK"})}), Status.MALFORMED),
    "nothing at all": (lambda _t, _p: RecordDict(), Status.MALFORMED),
    "weights of double precision": (lambda t, _: t.with_arrays(_float64), Status.MALFORMED),
    "weights that are not numbers": (lambda t, _: t.with_arrays(_nan), Status.MALFORMED),
    "weights of another network": (lambda t, _: t.with_arrays(_wider), Status.MALFORMED),
    "weights that are a program": (lambda t, p: t.with_arrays(_holding(program(p / "owned"))), Status.MALFORMED),
    "weights that are a pickle": (
        lambda t, p: t.with_arrays(_holding(pickle.dumps(Program(p / "owned")))),
        Status.MALFORMED,
    ),
    "round 0": (lambda t, _: t.content(0), Status.MALFORMED),
    "a round before the first": (lambda t, _: t.content(-1), Status.MALFORMED),
    "a round after the last": (lambda t, _: t.content(4), Status.MALFORMED),
    "round 2^62": (lambda t, _: t.content(2**62), Status.MALFORMED),
    "another program": (lambda t, _: t.content(code="0" * 64), Status.VERSION),
    "another wire format": (lambda t, _: t.content(wire=99), Status.VERSION),
    "a ledger that never was": (lambda t, _: t.with_terms(head="a" * 64), Status.ROLLBACK),
}


@dataclass
class Story:
    """What came back: attack -> reply; the log lines of each; the honest rounds; what the client asked for."""

    replies: dict[str, Reply] = field(default_factory=dict)
    lines: dict[str, str] = field(default_factory=dict)
    honest: list[Reply] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    pulled: dict[str, int] = field(default_factory=dict)
    steps_taken: int = 0
    releases: int = 0
    folder: Path = Path()
    status: int = -1


@pytest.fixture(scope="module")
def story(cohort: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("hostile")
    study = write_study(folder, model={"cell": "none", "embedding": 3, "pooling": ["mean_input"]})  # few arrays
    truth = Truth(study, state_of(build_network(study)))
    authority = Authority(folder / "ca")
    told = Story(folder=folder)
    with Coordinator(study, authority.context()) as server:
        path = write_site(folder, cohort["north"], {"address": f"localhost:{server.port}", "ca": str(authority.file)})
        state = enrolled_at(path, server.admit)
        log = state / LOG

        def ask(name: str, content: RecordDict, kind: str = MessageType.TRAIN) -> Reply:
            before = log.stat().st_size
            reply = reply_from_message(server.ask(content, kind))
            wait_until(lambda: log.stat().st_size > before)
            told.replies[name] = reply
            told.lines[name] = log.read_bytes()[before:].decode()
            return reply

        server.online.clear()
        command = [sys.executable, "-m", "wardround", "client", "run", str(path)]
        with (folder / "out").open("wb") as out:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            client = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out)
        try:
            assert server.online.wait(180)
            server.calls.clear()
            told.honest.append(ask("honest 1", truth.content(1)))
            for number, (name, (attack, _)) in enumerate(ATTACKS.items()):
                place = folder / f"attack-{number}"
                place.mkdir()
                ask(name, attack(truth, place))
            for kind in (MessageType.EVALUATE, MessageType.QUERY, "train.evil", "system"):
                ask(kind, truth.content(2), kind)
            for name, floats in BOMBS.items():
                before = server.calls.count("/v1/fleet/pull-object")
                ask(name, _bomb(truth, floats))
                told.pulled[name] = server.calls.count("/v1/fleet/pull-object") - before
            moved = Truth(study, {name: array + 1 for name, array in truth.weights.items()})
            ask("replay", moved.content(1))
            told.honest.append(ask("asked again", truth.content(1)))
            told.honest.append(ask("honest 2", moved.content(2)))
            client.send_signal(signal.SIGTERM)
            told.status = client.wait(60)
        finally:
            if client.poll() is None:
                client.kill()
                client.wait()
        told.calls = list(server.calls)
        accounts, _ = read_accounts(state / LEDGER)
        account = accounts.studies[study.digest()]
        told.steps_taken, told.releases = account.steps_taken, len(account.released)
        yield told


def _bomb(truth: Truth, floats: int) -> RecordDict:
    """Weights of chance, so that all of Flower's pieces of five megabytes differ."""
    content = truth.content(2)
    content["weights"] = ArrayRecord({"bomb": Array(np.random.default_rng(0).random(floats, np.float32))})
    return content


@pytest.mark.parametrize("attack", ATTACKS)
def test_it_gets_one_word_and_the_log_says_which(attack: str, story: Story) -> None:
    """No update, the word that fits, and a line in the hospital's log with the same word or the reason."""
    reply, expected = story.replies[attack], ATTACKS[attack][1]
    assert (reply.status, reply.update) == (expected, None)
    assert f": {expected} after" in story.lines[attack]


@pytest.mark.parametrize("kind", [MessageType.QUERY, "train.evil", "system"])
def test_only_training_is_answered(kind: str, story: Story) -> None:
    """Queries and whatever else Flower could carry are MALFORMED, and logged with the reason."""
    assert (story.replies[kind].status, story.replies[kind].update) == (Status.MALFORMED, None)
    assert "a message was refused: message type is not train or evaluate" in story.lines[kind]


def test_metrics_that_the_study_does_not_have_are_not_told(story: Story) -> None:
    """EVALUATE where the agreed study asks for no metrics is MALFORMED, and costs nothing."""
    reply = story.replies[MessageType.EVALUATE]
    assert (reply.status, reply.update) == (Status.MALFORMED, None)
    assert "metrics after round 2: MALFORMED" in story.lines[MessageType.EVALUATE]


def test_a_bomb_is_left_where_it_is(story: Story) -> None:
    """64 MB for a network of a few kilobytes are not fetched at all, 20 MB in few pieces are left at the first ones."""
    assert {story.replies[name].status for name in BOMBS} == {Status.MALFORMED}
    assert "a message was refused: message of 18 objects, the study's network allows 10" in story.lines["64 MB"]
    assert "a message was refused: message of more than" in story.lines["20 MB"]
    assert story.pulled["64 MB"] == 0
    assert 1 <= story.pulled["20 MB"] <= 6


def test_a_released_round_is_not_trained_from_other_weights(story: Story) -> None:
    """Two updates of one round would cancel their noise; the second is refused, and the first is repeated as it was."""
    assert (story.replies["replay"].status, story.replies["replay"].update) == (Status.BUDGET, None)
    first, again = story.honest[0].update, story.honest[1].update
    assert first is not None
    assert again is not None
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_nothing_of_all_this_cost_a_patient_anything(story: Story) -> None:
    """The ledger holds the two honest rounds and no other attempt."""
    assert [reply.status for reply in story.honest] == [Status.OK] * 3
    assert (story.steps_taken, story.releases) == (2, 2)


def test_no_app_bundle_is_ever_asked_for(story: Story) -> None:
    """All that the client asked a server for, offered a bundle or not: never code, never a run's description."""
    asked = {call.removeprefix("/v1/fleet/") for call in story.calls}
    assert asked <= {
        *("pull-messages", "pull-object", "confirm-message-received", "push-messages", "push-object"),
        *("activate-node", "deactivate-node", "send-node-heartbeat", "/health"),
    }


def test_nothing_ran(story: Story, tmp_path: Path) -> None:
    """The program in the weights was not started, though it would have worked; the client ended when asked to."""
    np.load(BytesIO(program(tmp_path / "owned")), allow_pickle=True)
    assert (tmp_path / "owned").exists()
    assert list(story.folder.rglob("owned")) == []
    assert story.status == 0
