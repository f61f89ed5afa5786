"""The strategy and the loop around it: what is sent, how updates become weights, and what a bad round may change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from common.models.network import build_network
from common.provenance import code_digest
from common.records import Header, Reply, Request, Status, reply_to_content, request_from_message
from common.study import Study
from common.training import state_of
from common.weights import Weights
from server.participation import QuorumError
from server.rounds import RoundRecord, run
from server.strategy import FederatedAveraging
from tests.small import SITE_NODES, identify, small_study
from tests.small import message as message_of

STUDY = small_study()
TELLING = small_study(metrics={"noise_multiplier": 2.0})
START = state_of(build_network(STUDY, 1))
Answer = Callable[[str, Request], RecordDict | None]


class ScriptedGrid(Grid):
    """A grid whose sites answer as the test says; None is no answer. Replies come back in reversed order."""

    def __init__(self, answer: Answer) -> None:
        identify()
        self.answer = answer
        self.sent: list[list[Message]] = []
        self.timeouts: list[float | None] = []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """The round's replies."""
        self.sent.append(list(messages))
        self.timeouts.append(timeout)
        replies = []
        for message in reversed(self.sent[-1]):
            content = self.answer(SITE_NODES[message.metadata.dst_node_id], request_from_message(message))
            if content is not None:
                replies.append(Message(content, reply_to=message))
        return replies

    def get_node_ids(self) -> list[int]:
        """Not asked for."""
        raise NotImplementedError

    def _unused(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise NotImplementedError

    set_run = create_message = push_messages = pull_messages = _unused
    run = property(_unused)


def update_of(site: str, round_number: int) -> Weights:
    """A site's made-up update of a round."""
    random = np.random.default_rng([len(site), round_number])
    return {name: random.normal(0, 0.1, array.shape).astype(np.float32) for name, array in START.items()}


def honest(site: str, request: Request) -> RecordDict:
    """What a site without faults answers."""
    return reply_to_content(Reply(request.header, Status.OK, update_of(site, request.header.round_number)))


def strategy_of(study: Study = STUDY, start: Weights = START) -> FederatedAveraging:
    return FederatedAveraging(study, start, lambda: SITE_NODES)


def one_round(strategy: FederatedAveraging, answer: Answer = honest, number: int = 1) -> Weights:
    return run(ScriptedGrid(answer), strategy, rounds=number, first_round=number)


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def adam_by_torch(averages: Iterable[Mapping[str, Any]], rates: Iterable[float]) -> dict[str, Any]:
    """torch.optim.Adam from the starting weights along minus the averages."""
    parameters = {name: torch.nn.Parameter(torch.from_numpy(array).double()) for name, array in START.items()}
    optimizer = torch.optim.Adam(parameters.values(), betas=(0.9, 0.99), eps=1e-8)
    for average, rate in zip(averages, rates, strict=True):
        for name, parameter in parameters.items():
            parameter.grad = -torch.as_tensor(average[name], dtype=torch.float64)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return {name: parameter.detach().numpy() for name, parameter in parameters.items()}


def close(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(np.allclose(one[n], other[n], rtol=0, atol=1e-6) for n in one)


def weighted(shares: dict[str, float], number: int = 1) -> dict[str, Any]:
    updates = {site: update_of(site, number) for site in shares}
    return {name: sum(share * updates[site][name] for site, share in shares.items()) for name in START}


def test_every_site_is_sent_the_weights_and_the_terms_and_nothing_else() -> None:
    """One TRAIN message per site, in order of name: the global weights, wire version, study, code and round."""
    grid = ScriptedGrid(honest)
    run(grid, strategy_of(), rounds=1)
    (sent,) = grid.sent
    assert [SITE_NODES[message.metadata.dst_node_id] for message in sent] == ["east", "north"]
    for message in sent:
        assert message.metadata.message_type == MessageType.TRAIN
        assert set(message.content) == {"weights", "request"}
        request = request_from_message(message)
        assert request.header == Header(STUDY.digest(), code_digest(), 1)
        assert same(request.weights, {name: START[name] for name in sorted(START)})


@pytest.mark.parametrize(
    ("aggregation", "north"), [("precision", 80**2 / (80**2 + 50**2)), ("declared", 80 / 130), ("uniform", 0.5)]
)
def test_one_step_rounds_are_adam_on_the_publicly_weighted_average(aggregation: str, north: float) -> None:
    """Three rounds equal torch's Adam, rate decaying linearly, on the average with weights from declared patients."""
    study = small_study(training={"aggregation": aggregation})
    found = run(ScriptedGrid(honest), strategy_of(study), rounds=3)
    averages = [weighted({"north": north, "east": 1 - north}, number) for number in (1, 2, 3)]
    assert close(found, adam_by_torch(averages, [0.05, 0.05 * 2 / 3, 0.05 / 3]))


def test_local_rounds_add_the_average() -> None:
    """`fedavg-local`: new weights are the old ones plus the average update, whatever the learning rate."""
    study = small_study(training={"recipe": "fedavg-local", "local_steps": 2, "aggregation": "declared"})
    average = weighted({"north": 80 / 130, "east": 50 / 130})
    assert close(one_round(strategy_of(study)), {name: START[name] + average[name] for name in START})


def test_a_missing_sites_weight_goes_to_the_others() -> None:
    """With one of two sites the average is that site's update, not a fraction of it."""
    study = small_study(quorum=1, training={"recipe": "fedavg-local", "local_steps": 2})
    strategy = strategy_of(study)
    found = one_round(strategy, lambda site, request: honest(site, request) if site == "east" else None)
    assert close(found, {name: START[name] + update_of("east", 1)[name] for name in START})
    assert strategy.replies.refused == {"north": "no reply"}


def _nan(site: str, request: Request) -> RecordDict:
    spoilt = update_of(site, 1)
    spoilt["head.bias"][0] = np.nan
    return reply_to_content(Reply(request.header, Status.OK, spoilt))


def _shape(site: str, request: Request) -> RecordDict:
    return reply_to_content(
        Reply(request.header, Status.OK, {**update_of(site, 1), "head.bias": np.zeros(2, np.float32)})
    )


def _old(site: str, request: Request) -> RecordDict:
    terms = Header(request.header.study, request.header.code, request.header.round_number - 1)
    return reply_to_content(Reply(terms, Status.OK, update_of(site, 1)))


def _heavy(site: str, request: Request) -> RecordDict:
    content = honest(site, request)
    content["metrics"] = MetricRecord({"num-examples": 10**9})
    return content


def _heavy_terms(site: str, request: Request) -> RecordDict:
    content = honest(site, request)
    record = content["reply"]
    assert isinstance(record, ConfigRecord)
    record["weight"] = 1e9
    return content


def _refusal(site: str, request: Request) -> RecordDict:
    return reply_to_content(Reply(request.header, Status.LOCAL_FAILURE))


FAULTS: list[Answer] = [_nan, _shape, _old, _heavy, _heavy_terms, _refusal, lambda _site, _request: RecordDict()]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_site_that_answers_wrongly_counts_as_missing(fault: Answer) -> None:
    """A bad reply, one that asks for a weight of its own included, gives the bits of a round without that site."""
    study = small_study(quorum=1)
    strategy = strategy_of(study)
    found = one_round(strategy, lambda site, request: (honest if site == "east" else fault)(site, request))
    without = one_round(strategy_of(study), lambda site, request: honest(site, request) if site == "east" else None)
    assert same(found, without)
    assert set(strategy.replies.refused) == {"north"}


@pytest.mark.parametrize("fault", FAULTS)
def test_without_quorum_the_round_never_was(fault: Answer) -> None:
    """Too few usable updates raise; weights and moments stay, and the round can be tried again as the first time."""
    strategy = strategy_of()
    one_round(strategy)
    before, moments = strategy.weights, strategy.optimizer
    with pytest.raises(QuorumError, match="round 2: 1 usable updates, the study's quorum is 2"):
        one_round(strategy, lambda site, request: (honest if site == "east" else fault)(site, request), 2)
    assert strategy.weights is before
    assert strategy.optimizer is moments
    assert same(one_round(strategy, number=2), run(ScriptedGrid(honest), strategy_of(), rounds=2))


def test_the_order_of_replies_does_not_matter() -> None:
    """Replies in another order give the same bits."""

    class Turned(ScriptedGrid):
        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
            return super().send_and_receive(messages, timeout=timeout)[::-1]

    assert same(run(Turned(honest), strategy_of(), rounds=3), run(ScriptedGrid(honest), strategy_of(), rounds=3))


def test_a_run_can_go_on_where_another_stopped() -> None:
    """Weights and moments are all the state there is: rounds 1 and 2, then 3 elsewhere, give the bits of 1 to 3."""
    first = strategy_of()
    run(ScriptedGrid(honest), first, rounds=2)
    second = strategy_of(start=first.weights)
    second.optimizer = first.optimizer
    found = run(ScriptedGrid(honest), second, rounds=3, first_round=3)
    assert same(found, run(ScriptedGrid(honest), strategy_of(), rounds=3))


def test_every_round_is_recorded_with_who_took_part() -> None:
    """`on_round` sees number, sites, reasons and the new weights after each aggregate; a round that failed is none."""

    def answer(site: str, request: Request) -> RecordDict | None:
        late = request.header.round_number >= 2 and site == "north"
        return (
            (_refusal(site, request) if request.header.round_number == 2 else None) if late else honest(site, request)
        )

    study = small_study(quorum=1)
    records: list[RoundRecord] = []
    strategy = strategy_of(study)
    run(ScriptedGrid(answer), strategy, rounds=3, on_round=records.append)
    assert [(r.round_number, r.sites, r.refused) for r in records] == [
        (1, ("east", "north"), {}),
        (2, ("east",), {"north": "LOCAL_FAILURE"}),
        (3, ("east",), {"north": "no reply"}),
    ]
    assert all(r.seconds >= 0 for r in records)
    assert not same(records[0].weights, records[1].weights)
    assert same(records[-1].weights, strategy.weights)
    records.clear()
    with pytest.raises(QuorumError):
        run(ScriptedGrid(answer), strategy_of(), rounds=3, on_round=records.append)
    assert [r.round_number for r in records] == [1]


def test_the_deadline_reaches_the_grid() -> None:
    """The grid is told how long to wait, each round; by default it waits for all."""
    grid = ScriptedGrid(honest)
    run(grid, strategy_of(), rounds=2, deadline=12.5)
    run(grid, strategy_of(), rounds=1)
    assert grid.timeouts == [12.5, 12.5, None]


def test_the_roster_is_asked_for_once_a_round() -> None:
    """Sites may join between rounds; within one the roster does not change under the replies."""
    rosters = iter([{2: "north", 3: "east"}, {3: "north", 2: "east"}])
    strategy = FederatedAveraging(STUDY, START, lambda: next(rosters))
    grid = ScriptedGrid(honest)
    run(grid, strategy, rounds=2)
    assert [[m.metadata.dst_node_id for m in sent] for sent in grid.sent] == [[3, 2], [2, 3]]


def test_nothing_is_evaluated_at_a_site() -> None:
    """A study without metrics: no message asks for any, and replies to such a message are not looked at."""
    strategy = strategy_of()
    assert list(strategy.configure_evaluate(1, ArrayRecord(), ConfigRecord(), ScriptedGrid(honest))) == []
    assert strategy.aggregate_evaluate(1, []) is None
    strategy.summary()


def test_metrics_are_asked_for_after_the_last_round_alone() -> None:
    """With metrics in the study: no question after any other round, one EVALUATE a site after the last."""
    strategy = strategy_of(TELLING)
    rounds = TELLING.training.rounds
    for number in range(1, rounds):
        assert list(strategy.configure_evaluate(number, ArrayRecord(), ConfigRecord(), ScriptedGrid(honest))) == []
    asked = list(strategy.configure_evaluate(rounds, ArrayRecord(), ConfigRecord(), ScriptedGrid(honest)))
    assert [(one.metadata.message_type, one.metadata.dst_node_id) for one in asked] == [
        ("evaluate", 3),
        ("evaluate", 2),
    ]
    found = request_from_message(asked[0])
    assert found.header.round_number == rounds
    assert all((found.weights[name] == START[name]).all() for name in START)


def histogram_reply(node: int, cells: NDArray[np.float32], status: Status = Status.OK) -> Message:
    """What a site answers to the question for metrics."""
    header = Header(TELLING.digest(), code_digest(), TELLING.training.rounds)
    update = {"histogram": cells} if status is Status.OK else None
    asked = message_of(RecordDict({"any": ConfigRecord({})}), node=node, kind=MessageType.EVALUATE)
    return Message(reply_to_content(Reply(header, status, update, "b" * 64), MessageType.EVALUATE), reply_to=asked)


def test_histograms_of_another_form_or_size_count_as_refused() -> None:
    """Another shape, NaN, or more than ten times the declared patients: a word, and the other site counts."""
    good = np.ones((2, 10), np.float32)
    for bad in (np.ones((2, 9), np.float32), np.full((2, 10), np.nan, np.float32), good * 1e4):
        strategy = strategy_of(TELLING)
        rounds = TELLING.training.rounds
        list(strategy.configure_evaluate(rounds, ArrayRecord(), ConfigRecord(), ScriptedGrid(honest)))
        strategy.aggregate_evaluate(rounds, [histogram_reply(2, good), histogram_reply(3, bad)])
        assert strategy.replies.updates.keys() == {"north"}
        assert strategy.replies.refused.keys() == {"east"}
        assert strategy.heads == {"north": "b" * 64, "east": "b" * 64}


def test_a_site_that_tells_no_metrics_is_named_with_its_word() -> None:
    """POLICY is a reason like any other; weights and optimizer are as they were."""
    strategy = strategy_of(TELLING)
    rounds = TELLING.training.rounds
    list(strategy.configure_evaluate(rounds, ArrayRecord(), ConfigRecord(), ScriptedGrid(honest)))
    strategy.aggregate_evaluate(rounds, [histogram_reply(2, np.zeros((2, 10), np.float32), Status.POLICY)])
    assert strategy.replies.refused == {"north": "POLICY", "east": "no reply"}
    assert strategy.weights is START


def test_a_head_goes_back_to_its_site_with_the_next_request() -> None:
    """Each site gets the newest head of its own ledger, kept over a round without one and over a failed round."""
    heads: dict[str, list[str]] = {"north": [], "east": []}

    def answer(site: str, request: Request) -> RecordDict:
        heads[site].append(request.head)
        number = request.header.round_number
        if site == "east" and number == 2:
            return reply_to_content(Reply(request.header, Status.POLICY, None, "f" * 64))
        mine = f"{number}" * 63 + site[0].replace("n", "a")
        return reply_to_content(Reply(request.header, Status.OK, update_of(site, number), mine))

    strategy = strategy_of(small_study(quorum=1))
    run(ScriptedGrid(answer), strategy, rounds=3)
    assert heads == {"north": ["", "1" * 63 + "a", "2" * 63 + "a"], "east": ["", "1" * 63 + "e", "1" * 63 + "e"]}
    assert strategy.heads == {"north": "3" * 63 + "a", "east": "3" * 63 + "e"}


def test_a_round_without_quorum_can_be_asked_again() -> None:
    """With `on_no_quorum` the round is repeated with the same weights until it counts; only then is it recorded."""
    paused: list[tuple[int, tuple[str, ...], str]] = []
    done: list[int] = []
    failures = iter([True, True])

    def answer(site: str, request: Request) -> RecordDict:
        fails = site == "east" and request.header.round_number == 2 and next(failures, False)
        return (_refusal if fails else honest)(site, request)

    grid = ScriptedGrid(answer)
    found = run(
        grid,
        strategy_of(),
        rounds=3,
        on_round=lambda record: done.append(record.round_number),
        on_no_quorum=lambda record, error: paused.append((record.round_number, record.sites, str(error))),
    )
    assert same(found, run(ScriptedGrid(honest), strategy_of(), rounds=3))
    assert done == [1, 2, 3]
    assert [(number, sites) for number, sites, _ in paused] == [(2, ("north",)), (2, ("north",))]
    assert "1 usable updates, the study's quorum is 2 (east: LOCAL_FAILURE)" in paused[0][2]
    assert len(grid.sent) == 5
