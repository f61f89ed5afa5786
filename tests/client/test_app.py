"""The ClientApp: messages in, messages out, and no text of ours through Flower."""

from __future__ import annotations

import logging

import pytest
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict

from client.app import build_app
from client.ledger import MemoryLedger
from client.site import Site
from common.batching import Dataset
from common.models.network import build_network
from common.records import Header, Reply, Status, reply_from_message
from common.training import state_of
from simulations.seeded import SeededRandomness
from tests.small import as_sequences, made_up_patients, message, request, request_message, small_study

STUDY = small_study()
WEIGHTS = state_of(build_network(STUDY, 2))
CONTEXT = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
SECRET = "PATIENT-4711"


def site() -> Site:
    dataset = Dataset(as_sequences(made_up_patients(1, 20)))
    return Site("north", STUDY, dataset, MemoryLedger(1.0, 1e-3), lambda r, a: SeededRandomness(1, "north", r, a))


def answer(sent: Message, one: Site | None = None) -> Message:
    return build_app(lambda _context: one or site())(message=sent, context=CONTEXT)


def test_a_train_message_is_answered_by_the_site() -> None:
    """What the server decodes is what the site replied, addressed as an answer to the message."""
    sent = request_message(STUDY, WEIGHTS)
    got = answer(sent)
    expected = site().train(request(STUDY, WEIGHTS))
    found = reply_from_message(got)
    assert (found.header, found.status) == (expected.header, Status.OK)
    assert found.update is not None
    assert expected.update is not None
    assert all((found.update[name] == expected.update[name]).all() for name in expected.update)
    assert got.metadata.reply_to_message_id == sent.metadata.message_id
    assert (got.metadata.src_node_id, got.metadata.dst_node_id) == (2, 1)


@pytest.mark.parametrize(
    "content",
    [RecordDict(), RecordDict({SECRET: ConfigRecord({"x": SECRET})}), RecordDict({"request": ConfigRecord({})})],
)
def test_a_malformed_message_is_answered_with_a_code(content: RecordDict) -> None:
    """Whatever is not a request gets MALFORMED, with nothing in it from the message or the site."""
    found = reply_from_message(answer(message(content)))
    assert found == Reply(Header("", found.header.code, 0), Status.MALFORMED)


def test_a_site_that_cannot_be_opened_is_answered_with_a_code(caplog: pytest.LogCaptureFixture) -> None:
    """Flower would send an exception's text to the server: a failure while opening records is LOCAL_FAILURE."""
    caplog.set_level(logging.DEBUG)

    def broken(_context: Context) -> Site:
        raise ValueError(f"cannot convert {SECRET}")

    got = build_app(broken)(message=request_message(STUDY, WEIGHTS), context=CONTEXT)
    found = reply_from_message(got)
    assert (found.status, found.update) == (Status.LOCAL_FAILURE, None)
    assert SECRET not in repr(got)
    assert SECRET not in caplog.text


@pytest.mark.parametrize("kind", [MessageType.QUERY, "train.other", "evaluate.other", "nonsense"])
def test_no_other_kind_of_message_reaches_the_site(kind: str) -> None:
    """The app has handlers for TRAIN and EVALUATE alone; Flower refuses the rest before any site is asked for."""

    def untouched(_context: Context) -> Site:
        pytest.fail("the site was asked for")

    with pytest.raises(ValueError, match=r"function registered|Invalid message type"):
        build_app(untouched)(message=message(RecordDict(), kind=kind), context=CONTEXT)


def test_the_site_is_the_one_of_the_context() -> None:
    """One app serves many virtual sites: it asks for the site of the context that came with the message."""
    asked: list[Context] = []

    def of(context: Context) -> Site:
        asked.append(context)
        return site()

    build_app(of)(message=request_message(STUDY, WEIGHTS), context=CONTEXT)
    assert asked == [CONTEXT]
