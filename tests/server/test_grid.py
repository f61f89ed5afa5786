"""Who is asked, how often and until when, over a scripted connection and a clock that only waiting moves."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import pytest
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from server.grid import ASK_AGAIN, LOOK, SLACK, FleetGrid, Presence, StoppedError
from tests.small import identify

DEADLINE = 100.0


@dataclass
class Script:
    """A connection to which things happen at given times: `events` are (time, what to do)."""

    events: list[tuple[float, Callable[[], None]]] = field(default_factory=list)
    now: float = 0.0
    sites: dict[int, Presence] = field(default_factory=dict)
    pushed: list[tuple[float, int, str, float]] = field(default_factory=list)
    arrived: dict[str, Message | None] = field(default_factory=dict)
    cleared: int = 0
    messages: dict[str, Message] = field(default_factory=dict)

    def at(self, time: float, event: Callable[[], None]) -> None:
        self.events.append((time, event))

    def connect(self, node: int, activated: str = "1") -> None:
        self.sites[node] = Presence(f"site{node}", True, activated, None)

    def leave(self, node: int) -> None:
        self.sites[node] = replace(self.sites[node], online=False)

    def answer(self, node: int) -> None:
        """The node answers the newest copy that it was sent."""
        name = next(name for _, to, name, _ in reversed(self.pushed) if to == node)
        self.arrived[name] = Message(RecordDict({"x": ConfigRecord({"of": node})}), reply_to=self.messages[name])

    def lose(self, node: int) -> None:
        self.arrived[next(name for _, to, name, _ in reversed(self.pushed) if to == node)] = None

    # server.grid.Link

    def presence(self) -> dict[int, Presence]:
        return dict(self.sites)

    def push(self, message: Message, ttl: float) -> str:
        name = f"copy{len(self.pushed)}"
        node = message.metadata.dst_node_id
        copy = Message(message.content, dst_node_id=node, message_type=message.metadata.message_type)
        copy.metadata.__dict__["_message_id"] = name
        self.messages[name] = copy
        self.pushed.append((self.now, node, name, ttl))
        return name

    def replies(self, copies: Collection[str]) -> dict[str, Message | None]:
        return {name: self.arrived.pop(name) for name in list(copies) if name in self.arrived}

    def clear(self) -> None:
        self.cleared += 1

    def wait(self, seconds: float) -> None:
        """Until the next event, or `seconds`."""
        due = sorted((time for time, _ in self.events if time <= self.now + seconds))
        self.now = due[0] if due else self.now + seconds
        for time, event in [pair for pair in self.events if pair[0] <= self.now]:
            self.events.remove((time, event))
            event()

    def asked(self, node: int) -> list[float]:
        """When the node was sent a copy."""
        return [time for time, to, _, _ in self.pushed if to == node]


def script(*nodes: int) -> Script:
    made = Script()
    for node in nodes:
        made.connect(node)
    return made


def grid_of(link: Script) -> FleetGrid:
    return FleetGrid(link, clock=lambda: link.now)


def messages(*nodes: int) -> list[Message]:
    identify()
    content = RecordDict({"x": ConfigRecord({"say": "hello"})})
    return [Message(content, dst_node_id=node, message_type=MessageType.TRAIN) for node in nodes]


def nodes_of(replies: list[Message]) -> list[int]:
    return [reply.metadata.src_node_id for reply in replies]


def test_a_round_ends_when_every_site_has_answered() -> None:
    """Each online site is asked once, at once; the last reply ends the round, and its messages are withdrawn."""
    link = script(2, 3)
    link.at(5.0, lambda: link.answer(3))
    link.at(7.0, lambda: link.answer(2))
    replies = grid_of(link).send_and_receive(messages(2, 3), timeout=DEADLINE)
    assert nodes_of(replies) == [3, 2]
    assert (link.asked(2), link.asked(3), link.now, link.cleared) == ([0.0], [0.0], 7.0, 1)


def test_the_deadline_ends_a_round_with_what_has_come() -> None:
    """A site that does not answer costs the round its deadline, no more, and the others' replies are kept."""
    link = script(2, 3)
    link.at(5.0, lambda: link.answer(3))
    assert nodes_of(grid_of(link).send_and_receive(messages(2, 3), timeout=DEADLINE)) == [3]
    assert link.now == DEADLINE
    assert link.cleared == 1


def test_a_contested_site_is_not_waited_for() -> None:
    """The round ends with the others' replies, not at the deadline, and the site is not asked."""
    link = script(2)
    link.sites[3] = Presence("site3", False, "1", None, contested=True)
    link.at(5.0, lambda: link.answer(2))
    assert nodes_of(grid_of(link).send_and_receive(messages(2, 3), timeout=DEADLINE)) == [2]
    assert (link.asked(3), link.now) == ([], 5.0)


def test_a_message_outlives_its_round_by_the_slack_only() -> None:
    """A copy's time to live is what is left of the deadline, and the slack for a site's clock."""
    link = script(2)
    link.at(10.0, lambda: link.connect(3))
    grid_of(link).send_and_receive(messages(2, 3), timeout=DEADLINE)
    first = {node: ttl for _, node, _, ttl in reversed(link.pushed)}
    assert first == {2: DEADLINE + SLACK, 3: DEADLINE - 10 + SLACK}


def test_a_site_is_asked_as_soon_as_it_connects() -> None:
    """A site that was away when the round began takes part if it comes before the deadline."""
    link = script(2)
    link.at(1.0, lambda: link.answer(2))
    link.at(40.0, lambda: link.connect(3))
    link.at(41.0, lambda: link.answer(3))
    assert nodes_of(grid_of(link).send_and_receive(messages(2, 3), timeout=DEADLINE)) == [2, 3]
    assert (link.asked(3), link.now) == ([40.0], 41.0)


def test_a_site_that_connects_anew_is_asked_again() -> None:
    """A process that died has lost the message it had claimed; the one after it gets it again."""
    link = script(2)
    link.at(3.0, lambda: link.leave(2))
    link.at(6.0, lambda: link.connect(2, "2"))
    link.at(8.0, lambda: link.answer(2))
    assert nodes_of(grid_of(link).send_and_receive(messages(2), timeout=DEADLINE)) == [2]
    assert link.asked(2) == [0.0, 6.0]


def test_a_reply_to_any_copy_counts_once() -> None:
    """A site that was asked twice and answers both copies is one reply."""
    link = script(2, 3)

    def both() -> None:
        for name in ("copy0", "copy2"):
            link.arrived[name] = Message(RecordDict(), reply_to=link.messages[name])

    link.at(6.0, lambda: link.connect(2, "2"))
    link.at(8.0, both)
    link.at(9.0, lambda: link.answer(3))
    assert nodes_of(grid_of(link).send_and_receive(messages(2, 3), timeout=DEADLINE)) == [2, 3]
    assert [name for _, node, name, _ in link.pushed if node == 2] == ["copy0", "copy2"]


def test_a_lost_copy_is_sent_again_at_once() -> None:
    """Where Flower lost the message, or a reply broke off, the site gets another copy."""
    link = script(2)
    link.at(4.0, lambda: link.lose(2))
    link.at(5.0, lambda: link.answer(2))
    assert nodes_of(grid_of(link).send_and_receive(messages(2), timeout=DEADLINE)) == [2]
    assert link.asked(2) == [0.0, 4.0]


def test_a_silent_site_is_asked_again_each_quarter() -> None:
    """A message can be delivered into a connection that breaks; an online site without answer is asked again."""
    link = script(2)
    grid_of(link).send_and_receive(messages(2), timeout=DEADLINE)
    assert link.asked(2) == [0.0, *(DEADLINE * ASK_AGAIN * k for k in (1, 2, 3))]


def test_a_site_that_missed_a_whole_round_is_not_waited_for_until_it_returns() -> None:
    """A hospital that is down costs one deadline, not one for each round; back again, it takes part."""
    link = script(2)
    grid = grid_of(link)
    link.at(1.0, lambda: link.answer(2))
    grid.send_and_receive(messages(2, 3), timeout=DEADLINE)
    assert link.now == DEADLINE
    link.at(DEADLINE + 1, lambda: link.answer(2))
    assert nodes_of(grid.send_and_receive(messages(2, 3), timeout=DEADLINE)) == [2]
    assert link.now == DEADLINE + 1
    link.connect(3)
    link.at(DEADLINE + 3, lambda: link.answer(2))
    link.at(DEADLINE + 9, lambda: link.answer(3))
    assert nodes_of(grid.send_and_receive(messages(2, 3), timeout=DEADLINE)) == [2, 3]
    link.leave(3)
    link.at(DEADLINE + 11, lambda: link.answer(2))
    began = link.now
    grid.send_and_receive(messages(2, 3), timeout=DEADLINE)
    assert link.now == began + DEADLINE


def test_without_deadline_it_waits_for_all() -> None:
    """No timeout: the round lasts until the last site has answered, however long that is."""
    link = script(2)
    link.at(90_000.0, lambda: link.connect(3))
    link.at(90_001.0, lambda: link.answer(2))
    link.at(99_000.0, lambda: link.answer(3))
    assert nodes_of(grid_of(link).send_and_receive(messages(2, 3))) == [2, 3]
    assert link.asked(2) == [0.0]


def test_no_message_no_wait() -> None:
    """An empty round ends at once."""
    link = script(2)
    assert grid_of(link).send_and_receive([], timeout=DEADLINE) == []
    assert link.now == 0.0


def test_stopping_ends_the_round_and_withdraws_its_messages() -> None:
    """After `stop` nothing is waited for any more, the messages are withdrawn, and the next round does not begin."""
    link = script(2)
    grid = grid_of(link)
    link.at(30.5, grid.stop)
    with pytest.raises(StoppedError):
        grid.send_and_receive(messages(2), timeout=DEADLINE)
    assert link.now <= 30.5 + LOOK
    assert link.cleared == 1
    with pytest.raises(StoppedError):
        grid.wait(1.0)


def test_presence_is_shown_at_least_every_look() -> None:
    """Whoever writes the status hears of it all through a round."""
    link = script(2)
    seen: list[float] = []

    def saw(presence: Mapping[int, Presence]) -> None:
        assert set(presence) == {2}
        seen.append(link.now)

    FleetGrid(link, saw=saw, clock=lambda: link.now).send_and_receive(messages(2), timeout=DEADLINE)
    assert seen == sorted(seen)
    assert max(b - a for a, b in itertools.pairwise(seen)) <= LOOK


def test_only_whole_rounds() -> None:
    """The parts of Flower's Grid that Flower's own loop uses are not there."""
    grid = grid_of(script(2))
    assert grid.get_node_ids() == [2]
    for unused in (grid.push_messages, grid.pull_messages, grid.create_message, grid.set_run):
        with pytest.raises(NotImplementedError):
            unused()
    with pytest.raises(NotImplementedError):
        _ = grid.run


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(1, 99), st.sampled_from(["answer", "leave", "anew", "lose"]), st.sampled_from([2, 3, 4])),
        max_size=12,
    )
)
def test_whatever_sites_do_a_round_ends_by_its_deadline_with_one_reply_each(events: list[tuple[int, str, int]]) -> None:
    """Comings, goings, losses and answers in any order: at most one reply per site, no wait beyond the deadline."""
    link = script(2, 3, 4)

    def event(kind: str, node: int, number: int) -> None:
        if kind == "leave":
            link.leave(node)
        elif kind == "anew":
            link.connect(node, str(number + 2))
        elif link.asked(node):
            (link.answer if kind == "answer" else link.lose)(node)

    for number, (time, kind, node) in enumerate(events):
        link.at(float(time), lambda k=kind, n=node, i=number: event(k, n, i))  # type: ignore[misc]  # late binding
    replies = grid_of(link).send_and_receive(messages(2, 3, 4), timeout=DEADLINE)
    assert len(set(nodes_of(replies))) == len(replies)
    assert link.now <= DEADLINE
    assert link.cleared == 1
