"""A hospital is asked for metrics: what happens in which order, what is refused, and how often it answers."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, MessageType, RecordDict

from client.accounts import metrics_of
from client.app import build_app
from client.ledger import MemoryLedger
from client.policy import Policy
from client.site import Site
from common.batching import Dataset
from common.privacy.accounting import Steps, epsilon_of_history
from common.records import Request, Status, reply_from_message, request_to_content
from common.score_histogram import HISTOGRAM
from common.terms import parse
from common.weights import to_bytes
from tests.client.site_cases import (
    SECRET,
    WEIGHTS,
    Change,
    Diary,
    WatchedLedger,
    WatchedRandomness,
    header,
    moved,
)
from tests.small import as_sequences, made_up_patients, message, request, small_study

ROUNDS, NOISE = 3, 4.0
STUDY = small_study(metrics={"noise_multiplier": NOISE, "bins": 8})
TELLING: dict[str, Any] = {"max_epsilon": 2.0, "delta": 1e-3, "min_metrics_noise": NOISE}
ASKED = request(STUDY, WEIGHTS, ROUNDS)


def policy(**limits: Any) -> Policy:
    return parse({**TELLING, **limits}, Policy, "policy")


def hospital(
    diary: Diary,
    limits: Policy | None = None,
    *,
    study: Any = STUDY,
    held_out: int = 12,
    cap: float = 2.0,
    breaks: str = "",
    failures: int = 0,
) -> Site:
    ledger = WatchedLedger(diary, breaks)
    ledger.real = MemoryLedger(cap, 1e-3)
    return Site(
        "north",
        study,
        Dataset(as_sequences(made_up_patients(1, 20))),
        ledger,
        lambda number, attempt: WatchedRandomness(diary, number, attempt, failures),
        limits or policy(),
        Dataset(as_sequences(made_up_patients(2, held_out))) if held_out else None,
    )


def real(site: Site) -> MemoryLedger:
    assert isinstance(site.ledger, WatchedLedger)
    return site.ledger.real


def test_metrics_are_admitted_marked_noised_stored_and_only_then_released() -> None:
    """The order of a round: the plan is charged and the attempt marked before a score exists, stored before it goes."""
    diary = Diary()
    reply = hospital(diary).tell_metrics(ASKED)
    assert diary.lines == ["admit", "attempt 3 1", "noise", "release 3 1"]
    assert reply.status is Status.OK
    assert reply.update is not None
    assert {name: array.shape for name, array in reply.update.items()} == {HISTOGRAM: (2, 8)}


def test_they_are_charged_beside_training_and_priced_with_it() -> None:
    """Two plans of one study: the cohort's price is the PLD epsilon of both, more than training alone."""
    site = hospital(Diary())
    site.train(request(STUDY, WEIGHTS, 1))
    training = real(site).accounts.cohorts["all"].spent
    site.tell_metrics(ASKED)
    plan, spent = STUDY.plan(), real(site).accounts.cohorts["all"].spent
    steps = [Steps(plan.sampling_rate, plan.noise_multiplier, plan.priced_steps), Steps(1.0, NOISE, 1)]
    assert spent == epsilon_of_history(steps, 1e-3) == STUDY.epsilon(with_metrics=True)
    assert spent > training == STUDY.epsilon(with_metrics=False)
    assert real(site).accounts.studies[metrics_of(STUDY.digest())].plan == STUDY.metrics_plan()


def test_asked_again_it_repeats_the_stored_bytes_and_pays_nothing() -> None:
    """The same question: the same bytes, nothing computed, nothing charged; however often."""
    diary = Diary()
    site = hospital(diary)
    first = site.tell_metrics(ASKED)
    spent = real(site).accounts.cohorts["all"].spent
    for _ in range(3):
        again = site.tell_metrics(ASKED)
        assert first.update is not None
        assert again.update is not None
        assert to_bytes(again.update) == to_bytes(first.update)
    assert (diary.count("noise"), diary.count("release")) == (1, 1)
    assert real(site).accounts.cohorts["all"].spent == spent


def test_there_is_one_answer_for_one_set_of_weights() -> None:
    """Weights of the server's choosing: whichever come first are answered, all others refused without a look."""
    diary = Diary()
    site = hospital(diary)
    assert site.tell_metrics(dataclasses.replace(ASKED, weights=moved(WEIGHTS))).status is Status.OK
    for by in (0.0, 0.25, 1.0):
        assert site.tell_metrics(dataclasses.replace(ASKED, weights=moved(WEIGHTS, by))).status is Status.BUDGET
    assert diary.count("noise") == 1


def test_what_failed_after_the_mark_is_spent_and_not_tried_again() -> None:
    """No spare: an answer whose noise may have been drawn, but was not stored, was the only one."""
    diary = Diary()
    site = hospital(diary, breaks="release")
    assert [site.tell_metrics(ASKED).status for _ in range(2)] == [Status.LOCAL_FAILURE, Status.BUDGET]
    assert diary.lines.count("noise") == 1
    assert real(site).accounts.studies[metrics_of(STUDY.digest())].steps_left == 0


def test_what_could_not_be_marked_is_not_scored() -> None:
    """A ledger that cannot write grants nothing: no score, no noise, no answer."""
    diary = Diary()
    assert hospital(diary, breaks="attempt").tell_metrics(ASKED).status is Status.LOCAL_FAILURE
    assert diary.count("noise") == 0


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"min_metrics_noise": None}, "min_metrics_noise: none leave"),
        ({"min_metrics_noise": 4.5}, "min_metrics_noise: 4.5"),
        ({"max_clip": 0.1}, "max_clip: 0.1"),
    ],
)
def test_the_policy_decides(limits: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture) -> None:
    """Not allowed, with too little noise, or of a study that is refused anyway: POLICY, and nothing is charged."""
    diary = Diary()
    with caplog.at_level(logging.WARNING):
        reply = hospital(diary, policy(**limits)).tell_metrics(ASKED)
    assert (reply.status, reply.update, diary.lines) == (Status.POLICY, None, [])
    assert said in caplog.text


def test_without_a_policy_no_metric_leaves() -> None:
    """A site of a simulation, which has no policy, tells none; the default of a policy is the same."""
    diary = Diary()
    dataset = Dataset(as_sequences(made_up_patients(1, 9)))
    site = Site("north", STUDY, dataset, WatchedLedger(diary), held_out=dataset)
    assert site.tell_metrics(ASKED).status is Status.POLICY
    assert parse({"max_epsilon": 2.0, "delta": 1e-3}, Policy, "policy").min_metrics_noise is None
    assert diary.lines == []


def test_a_hospital_that_tells_no_metrics_trains_all_the_same() -> None:
    """Metrics are an offer: to refuse them refuses no round, and leaves the round's price as it is."""
    site = hospital(Diary(), policy(min_metrics_noise=None))
    assert site.train(request(STUDY, WEIGHTS, 1)).status is Status.OK
    assert real(site).accounts.cohorts["all"].spent == STUDY.epsilon(with_metrics=False)


def test_what_does_not_fit_the_budget_is_refused() -> None:
    """Training has taken the cohort's whole cap: BUDGET, and no score is computed."""
    diary = Diary()
    site = hospital(diary, cap=1.0)
    assert site.train(request(STUDY, WEIGHTS, 1)).status is Status.OK
    assert site.tell_metrics(ASKED).status is Status.BUDGET
    assert diary.count("noise") == 1


@pytest.mark.parametrize(
    ("change", "status"),
    [
        (header(wire=2), Status.VERSION),
        (header(code="0" * 64), Status.VERSION),
        (header(study=small_study().digest()), Status.STUDY),
        (header(study=small_study(metrics={"noise_multiplier": NOISE, "bins": 9}).digest()), Status.STUDY),
        (header(round_number=ROUNDS - 1), Status.MALFORMED),
        (header(round_number=ROUNDS + 1), Status.MALFORMED),
        (lambda r: dataclasses.replace(r, weights={"head.bias": r.weights["head.bias"]}), Status.MALFORMED),
    ],
)
def test_what_was_not_agreed_is_refused_before_anything_is_spent(change: Change, status: Status) -> None:
    """Other terms, also other bins, another round or network: a word, and ledger and patients stay untouched."""
    diary = Diary()
    reply = hospital(diary).tell_metrics(change(ASKED))
    assert (reply.status, reply.update, diary.lines) == (status, None, [])


def test_a_study_without_metrics_is_asked_for_none() -> None:
    """The pinned terms have no metrics: MALFORMED, whatever the policy would allow."""
    diary = Diary()
    study = small_study()
    assert hospital(diary, study=study).tell_metrics(request(study, WEIGHTS, ROUNDS)).status is Status.MALFORMED
    assert diary.lines == []


def test_text_of_a_failure_reaches_neither_reply_nor_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scoring fails with a patient's value in its text: LOCAL_FAILURE, and the class of the error alone is logged."""

    def broken(*_: Any) -> Any:
        raise ValueError(f"cannot convert {SECRET}")

    monkeypatch.setattr("client.scoring.scores_one_by_one", broken)
    with caplog.at_level(logging.DEBUG):
        reply = hospital(Diary()).tell_metrics(ASKED)
    assert reply.status is Status.LOCAL_FAILURE
    assert "failed with ValueError" in caplog.text
    assert SECRET not in caplog.text + repr(reply)


@pytest.mark.parametrize("held_out", [0, 1, 12])
def test_the_reply_has_one_form_for_any_number_of_patients(held_out: int) -> None:
    """Nobody, one, some: the same keys, shapes and sizes; the number stands nowhere but under the noise."""
    reply = hospital(Diary(), held_out=held_out).tell_metrics(ASKED)
    assert reply.update is not None
    assert len(to_bytes(reply.update)) == len(to_bytes({HISTOGRAM: np.zeros((2, 8), np.float32)}))
    assert dataclasses.replace(reply, update=None) == dataclasses.replace(
        hospital(Diary(), held_out=5).tell_metrics(ASKED), update=None
    )


def test_an_evaluate_message_is_answered_with_metrics() -> None:
    """Over Flower's own messages: EVALUATE in, `reply` and `metrics` out, and nothing else."""
    site = hospital(Diary())
    context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
    sent = message(request_to_content(Request(ASKED.header, WEIGHTS)), kind=MessageType.EVALUATE)
    got = build_app(lambda _context: site)(message=sent, context=context)
    assert set(got.content) == {"reply", "metrics"}
    found = reply_from_message(got)
    assert found.status is Status.OK
    assert found.update is not None
    assert found.update.keys() == {HISTOGRAM}
