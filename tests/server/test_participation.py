"""Who counts in a round: one bad reply is dropped, never the round; too few good ones stop it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from common.records import Header, Reply, Status, reply_to_content
from common.weights import Weights
from server.participation import QuorumError, Replies, collect
from tests.small import SITE_NODES, message, reply_message

TERMS = Header("s" * 64, "c" * 64, 5)
LIKE: Weights = {"w": np.zeros((2, 2), np.float32), "b": np.zeros(2, np.float32)}
ROSTER = {**SITE_NODES, 4: "south"}
SECRET = "PATIENT-4711"


def update(value: float = 1.0) -> Weights:
    return {name: np.full_like(array, value) for name, array in LIKE.items()}


def good(node: int, value: float = 1.0) -> Message:
    return reply_message(reply_to_content(Reply(TERMS, Status.OK, update(value))), node=node)


def _terms(**changes: Any) -> Message:
    return reply_message(reply_to_content(Reply(dataclasses.replace(TERMS, **changes), Status.OK, update())))


def _update(change: Callable[[Weights], Weights]) -> Message:
    return reply_message(reply_to_content(Reply(TERMS, Status.OK, change(update()))))


def _extra() -> Message:
    content = reply_to_content(Reply(TERMS, Status.OK, update()))
    content["metrics"] = MetricRecord({"num-examples": 10**9})
    return reply_message(content)


def _partly(value: float) -> Callable[[Weights], Weights]:
    def spoil(weights: Weights) -> Weights:
        weights["w"][1, 0] = value
        return weights

    return spoil


BAD: dict[str, Callable[[], Message]] = {
    "NaN": lambda: _update(_partly(math.nan)),
    "infinite": lambda: _update(_partly(-math.inf)),
    "other shape": lambda: _update(lambda w: {**w, "b": np.zeros(3, np.float32)}),
    "other precision": lambda: _update(lambda w: {**w, "b": np.zeros(2, np.float64)}),
    "missing array": lambda: _update(lambda w: {"w": w["w"]}),
    "extra array": lambda: _update(lambda w: {**w, "x": np.zeros(1, np.float32)}),
    "earlier round": lambda: _terms(round_number=4),
    "later round": lambda: _terms(round_number=6),
    "other study": lambda: _terms(study="x" * 64),
    "other code": lambda: _terms(code="x" * 64),
    "other wire": lambda: _terms(wire=2),
    "a weight of its own": _extra,
    "empty": lambda: reply_message(RecordDict()),
    "garbage": lambda: reply_message(RecordDict({SECRET: ConfigRecord({"x": SECRET})})),
    "Flower error": lambda: Message(Error(code=0, reason=SECRET), reply_to=message(RecordDict())),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_reply_is_dropped_and_the_round_goes_on(kind: str) -> None:
    """Whatever one site sends, the others' updates are there, and its reason repeats nothing of what was sent."""
    replies = collect([BAD[kind](), good(3), good(4, 2.0)], ROSTER, TERMS, LIKE)
    assert sorted(replies.updates) == ["east", "south"]
    assert set(replies.refused) == {"north"}
    assert replies.refused["north"]
    assert SECRET not in replies.refused["north"]
    assert replies.updates["south"]["b"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize("status", [status for status in Status if status is not Status.OK])
def test_a_refusal_is_kept_as_its_code(status: Status) -> None:
    """A site that refuses is recorded with the word it sent."""
    replies = collect([reply_message(reply_to_content(Reply(TERMS, status)))], {2: "north"}, TERMS, LIKE)
    assert replies.refused == {"north": status.value}


def test_a_site_that_does_not_answer_is_recorded() -> None:
    """No reply within the round is a reason like any other."""
    assert collect([good(3)], ROSTER, TERMS, LIKE).refused == {"north": "no reply", "south": "no reply"}


def test_nodes_outside_the_roster_have_no_say() -> None:
    """A reply of an unknown node is dropped: names come from the roster, never from a reply."""
    replies = collect([good(99), good(2)], {2: "north"}, TERMS, LIKE)
    assert (sorted(replies.updates), replies.refused) == (["north"], {})


def test_a_second_reply_of_a_site_is_dropped() -> None:
    """One site, one reply a round: what comes after it changes nothing, whether either is good or bad."""
    replies = collect([good(2, 1.0), good(2, 9.0), BAD["NaN"]()], {2: "north"}, TERMS, LIKE)
    assert replies.updates["north"]["b"].tolist() == [1.0, 1.0]
    assert replies.refused == {}
    replies = collect([BAD["NaN"](), good(2, 9.0)], {2: "north"}, TERMS, LIKE)
    assert (replies.updates, list(replies.refused)) == ({}, ["north"])


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from([*BAD, "good 2", "good 3", "good 4", "stranger"]), max_size=8))
def test_updates_and_refusals_share_out_the_roster(kinds: list[str]) -> None:
    """Any mix of replies: every site of the roster has an update or a reason, none both, and nothing is raised."""
    nodes = {"good 2": 2, "good 3": 3, "good 4": 4, "stranger": 7}
    messages = [good(nodes[kind]) if kind in nodes else BAD[kind]() for kind in kinds]
    replies = collect(messages, ROSTER, TERMS, LIKE)
    assert set(replies.updates) | set(replies.refused) == set(ROSTER.values())
    assert set(replies.updates) & set(replies.refused) == set()
    first = {message.metadata.src_node_id: kind for kind, message in reversed(list(zip(kinds, messages, strict=True)))}
    assert set(replies.updates) == {ROSTER[node] for node in ROSTER if first.get(node) == f"good {node}"}


def test_quorum_counts_usable_updates() -> None:
    """Exactly the quorum passes; one fewer raises, naming round, count, quorum and every reason."""
    replies = Replies({"north": update(), "east": update()}, {"south": "LOCAL_FAILURE"})
    replies.require(2, 7)
    with pytest.raises(QuorumError, match=r"round 7: 2 usable updates, the study's quorum is 3 \(south: LOCAL_FAILURE"):
        replies.require(3, 7)


def test_an_update_that_would_own_the_average_is_dropped() -> None:
    """An update above the public bound is refused by its norm; one at the bound is taken."""
    norm = float(np.sqrt(sum(np.square(array).sum() for array in update().values())))
    bounds = {"north": norm * 0.99, "east": norm * 1.01}
    replies = collect([good(2), good(3)], {2: "north", 3: "east"}, TERMS, LIKE, bounds)
    assert list(replies.updates) == ["east"]
    assert "exceeds" in replies.refused["north"]


def test_heads_come_from_replies_whose_ledger_was_looked_at() -> None:
    """A head counts with OK, BUDGET and LOCAL_FAILURE; a ledger that was put back must not replace the newer head."""
    for status in Status:
        reply = Reply(TERMS, status, update() if status is Status.OK else None, "a" * 64)
        found = collect([reply_message(reply_to_content(reply))], ROSTER, TERMS, LIKE)
        vouched = status in (Status.OK, Status.BUDGET, Status.LOCAL_FAILURE)
        assert found.heads == ({"north": "a" * 64} if vouched else {})


def test_a_head_of_another_round_or_an_empty_one_is_not_kept() -> None:
    """A late reply's head is older than what the server has; a site without a ledger's head has none."""
    for header, head in ((dataclasses.replace(TERMS, round_number=4), "a" * 64), (TERMS, "")):
        reply = Reply(header, Status.OK, update(), head)
        assert collect([reply_message(reply_to_content(reply))], ROSTER, TERMS, LIKE).heads == {}


def test_an_update_that_is_refused_still_leaves_its_head() -> None:
    """What the ledger recorded stays recorded, also where the update was of no use."""
    bad = {name: np.full_like(array, np.nan) for name, array in LIKE.items()}
    found = collect([reply_message(reply_to_content(Reply(TERMS, Status.OK, bad, "b" * 64)))], ROSTER, TERMS, LIKE)
    assert (found.updates, found.heads) == ({}, {"north": "b" * 64})
