"""What keeps a site from training whatever a server asks: its policy, its ledger's past, a disk that is full."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from client.ledger_file import SqliteLedger
from client.policy import Policy
from client.site import Site
from common.batching import Dataset
from common.errors import LedgerError
from common.privacy.randomness import Randomness
from common.records import Status, reply_to_content
from common.weights import to_bytes
from tests.client.site_cases import STUDY, WEIGHTS, Diary, WatchedRandomness, header, hospital, moved
from tests.small import as_sequences, made_up_patients, request


def durable(
    folder: Path, diary: Diary | None = None, *, policy: Policy | None = None, patients: int = 40
) -> tuple[Site, SqliteLedger]:
    """A site with a ledger on disk."""
    ledger = SqliteLedger(folder / "ledger.db", 1.0, 1e-3)
    records = as_sequences(made_up_patients(1, 40)).select(range(patients))

    def source(number: int, attempt: int) -> Randomness:
        return WatchedRandomness(diary or Diary(), number, attempt)

    return Site("north", STUDY, Dataset(records), ledger, source, policy), ledger


def test_every_reply_carries_the_ledgers_head(tmp_path: Path) -> None:
    """Update, replay and every refusal name the head that the ledger then has, so that a server knows the newest."""
    site, ledger = durable(tmp_path)
    with ledger:
        replies = []
        for change in (header(wire=0), header(study="0" * 64), header(round_number=9), lambda r: r):
            replies.append(site.train(change(request(STUDY, WEIGHTS))))
            assert replies[-1].head == ledger.head()
        assert replies[-1].status is Status.OK
        replies.append(site.train(request(STUDY, WEIGHTS)))
        replies.append(site.train(request(STUDY, moved(WEIGHTS))))
        assert [reply.status for reply in replies[-2:]] == [Status.OK, Status.BUDGET]
        assert {reply.head for reply in replies[-3:]} == {ledger.head()}
        assert replies[0].head != ledger.head()
        assert reply_to_content(replies[-1])["reply"]["head"] == ledger.head()


def test_a_head_that_the_ledger_had_is_accepted(tmp_path: Path) -> None:
    """The server's newest head may be an older one of ours, where a reply was lost; or none at all."""
    site, ledger = durable(tmp_path)
    with ledger:
        first = ledger.head()
        assert site.train(request(STUDY, WEIGHTS)).status is Status.OK
        for number, head in ((1, ledger.head()), (2, first), (3, "")):
            asked = dataclasses.replace(request(STUDY, WEIGHTS, number), head=head)
            assert site.train(asked).status is Status.OK


def test_a_ledger_that_was_put_back_is_refused_by_the_servers_head(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The server has seen a head that this ledger never had: ROLLBACK, no patient touched, nothing spent."""
    site, ledger = durable(tmp_path)
    ledger.close()
    backup = (tmp_path / "ledger.db").read_bytes()
    site, ledger = durable(tmp_path)
    with ledger:
        seen = site.train(request(STUDY, WEIGHTS)).head
    (tmp_path / "ledger.db").write_bytes(backup)
    diary = Diary()
    site, ledger = durable(tmp_path, diary)
    with ledger:
        before = ledger.head()
        for number in (1, 2):
            reply = site.train(dataclasses.replace(request(STUDY, WEIGHTS, number), head=seen))
            assert (reply.status, reply.update, reply.head) == (Status.ROLLBACK, None, before)
        assert diary.lines == []
        assert "older copy; put the newest back" in caplog.text


def test_a_simulated_site_knows_no_head() -> None:
    """A ledger in memory has no head: a server that names one speaks of another ledger."""
    reply = hospital(Diary()).train(dataclasses.replace(request(STUDY, WEIGHTS), head="0" * 64))
    assert (reply.status, reply.head) == (Status.ROLLBACK, "")


def test_a_study_beyond_the_policy_is_refused_whatever_the_server_asks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The site's own limits: POLICY for every round, before ledger and patients; the reason stays in the log."""
    diary = Diary()
    site, ledger = durable(tmp_path, diary, policy=Policy(max_epsilon=1.0, delta=1e-3, max_clip=0.6, cells=("lstm",)))
    with ledger:
        before = ledger.head()
        for number in (1, 2, 3):
            reply = site.train(request(STUDY, WEIGHTS, number))
            assert (reply.status, reply.update, reply.head) == (Status.POLICY, None, before)
        assert diary.lines == []
        assert "max_clip: 0.6" in caplog.text
        assert "cells: lstm" in caplog.text


def test_a_study_within_the_policy_is_trained(tmp_path: Path) -> None:
    """A policy that allows the study changes nothing: neither status nor a number of the update."""
    updates = []
    for name, policy in (("with", Policy(max_epsilon=1.0, delta=1e-3)), ("without", None)):
        (tmp_path / name).mkdir()
        site, ledger = durable(tmp_path / name, policy=policy)
        with ledger:
            reply = site.train(request(STUDY, WEIGHTS))
        assert reply.update is not None
        updates.append(to_bytes(reply.update))
    assert updates[0] == updates[1]


@pytest.mark.parametrize("patients", [0, 1])
def test_an_enrolled_site_with_few_or_no_patients_still_answers(patients: int, tmp_path: Path) -> None:
    """The smallest cohort is asked for before enrolment alone: later a site of none answers every round with noise."""
    diary = Diary()
    policy = Policy(max_epsilon=1.0, delta=1e-3, min_patients=50)
    site, ledger = durable(tmp_path, diary, policy=policy, patients=patients)
    with ledger:
        for number in (1, 2, 3):
            reply = site.train(request(STUDY, WEIGHTS, number))
            assert reply.status is Status.OK
            assert reply.update is not None
            assert all(np.isfinite(part).all() and part.any() for part in reply.update.values())
        assert diary.count("noise") == 3
        assert ledger.steps_taken(STUDY.digest()) == 3


def test_a_ledger_that_cannot_be_written_is_a_local_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk at the mark: LOCAL_FAILURE, no patient touched, the remedy in the log; with space it goes on."""
    diary = Diary()
    site, ledger = durable(tmp_path, diary)

    def full(*_: object) -> None:
        raise LedgerError("ledger.db: full; free some space")

    with ledger:
        with monkeypatch.context() as patched:
            patched.setattr(ledger, "_store", full)
            assert site.train(request(STUDY, WEIGHTS)).status is Status.LOCAL_FAILURE
        assert diary.lines == []
        assert "free some space" in caplog.text
        assert site.train(request(STUDY, WEIGHTS)).status is Status.OK
