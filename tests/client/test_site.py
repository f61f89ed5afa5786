"""One round at a hospital: what happens in which order, what is refused, and what can never leave."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable

import numpy as np
import pytest

from client.ledger import MemoryLedger
from client.site import Site
from common.batching import Dataset
from common.errors import ConfigurationError
from common.privacy.randomness import Randomness
from common.records import Reply, Status, reply_to_content
from common.weights import Weights, to_bytes
from simulations.seeded import SeededRandomness
from tests.client.site_cases import (
    SECRET,
    STUDY,
    WEIGHTS,
    Change,
    Diary,
    WatchedLedger,
    WatchedRandomness,
    header,
    hospital,
    moved,
)
from tests.small import Patient, as_sequences, made_up_patients, request, small_study


def content_of(reply: Reply) -> str:
    """Everything that would leave, as text."""
    content = reply_to_content(reply)
    return repr(dict(content["reply"])) + repr(sorted(content)) + repr(reply)


def test_a_round_is_admitted_marked_trained_stored_and_only_then_released() -> None:
    """The ledger admits the plan and marks the attempt before a patient is sampled, and stores what is released."""
    diary = Diary()
    reply = hospital(diary).train(request(STUDY, WEIGHTS))
    assert diary.lines == ["admit", "attempt 1 1", "sample", "noise", "release 1 1"]
    assert reply.status is Status.OK
    assert reply.update is not None
    assert {name: part.shape for name, part in reply.update.items()} == {n: w.shape for n, w in WEIGHTS.items()}


def test_local_steps_are_marked_before_they_are_taken() -> None:
    """With several local steps a round the whole round is marked at once."""
    training = {"recipe": "fedavg-local", "local_steps": 4, "rounds": 1}
    study = small_study(training=training, privacy={"spare_rounds": 0})
    diary = Diary()
    assert hospital(diary, study=study).train(request(study, WEIGHTS)).status is Status.OK
    assert diary.lines == ["admit", "attempt 1 4", *["sample", "noise"] * 4, "release 1 1"]


def test_a_replay_is_answered_with_the_same_bytes_and_trains_nothing() -> None:
    """The same round with the same weights again: the stored bytes, no patient touched, no step charged."""
    diary = Diary()
    site = hospital(diary)
    first = site.train(request(STUDY, WEIGHTS))
    again = site.train(request(STUDY, dict(WEIGHTS)))
    assert first.update is not None
    assert again.update is not None
    assert to_bytes(first.update) == to_bytes(again.update)
    assert (diary.count("sample"), diary.count("release")) == (1, 1)
    assert isinstance(site.ledger, WatchedLedger)
    assert site.ledger.real.steps_taken(STUDY.digest()) == 1


def test_a_released_round_is_not_trained_again_from_other_weights() -> None:
    """One released round, other weights: BUDGET, no patient touched, and the old answer still stands."""
    diary = Diary()
    site = hospital(diary)
    first = site.train(request(STUDY, WEIGHTS))
    assert site.train(request(STUDY, moved(WEIGHTS))).status is Status.BUDGET
    assert diary.count("sample") == 1
    assert site.train(request(STUDY, WEIGHTS)).status is first.status is Status.OK


def test_a_failed_attempt_stays_spent_and_the_next_has_fresh_noise() -> None:
    """A failure after the mark costs a spare step; the retry is attempt 2, and spares gone, the site leaves."""
    diary = Diary()
    site = hospital(diary, failures=1)
    answers = [site.train(request(STUDY, WEIGHTS, number)).status for number in (1, 1, 2, 2, 3)]
    #                  three rounds and one spare: round 1 twice, round 2 twice, nothing left for round 3
    assert answers == [Status.LOCAL_FAILURE, Status.OK, Status.LOCAL_FAILURE, Status.OK, Status.BUDGET]
    assert [line for line in diary.lines if line.startswith("release")] == ["release 1 2", "release 2 2"]


def test_two_attempts_never_share_their_noise() -> None:
    """The retry of a round draws from another source than the attempt that failed."""
    seen: list[tuple[int, int]] = []

    def source(number: int, attempt: int) -> Randomness:
        seen.append((number, attempt))
        return WatchedRandomness(Diary(), number, attempt, failures=1)

    site = Site("north", STUDY, Dataset(as_sequences(made_up_patients(1, 9))), MemoryLedger(1.0, 1e-3), source)
    for _ in range(2):
        site.train(request(STUDY, WEIGHTS))
    assert seen == [(1, 1), (1, 2)]


def test_without_a_given_source_no_two_updates_are_alike() -> None:
    """By default sampling and noise come from the operating system: equal sites give different updates."""
    dataset = Dataset(as_sequences(made_up_patients(1, 9)))
    sites = [Site("north", STUDY, dataset, MemoryLedger(1.0, 1e-3)) for _ in range(2)]
    one, other = (site.train(request(STUDY, WEIGHTS)).update for site in sites)
    assert one is not None
    assert other is not None
    assert all((one[name] != other[name]).all() for name in one)


def _weights(change: Callable[[Weights], Weights]) -> Change:
    return lambda r: dataclasses.replace(r, weights=dict(sorted(change(r.weights).items())))


def _spoilt(weights: Weights) -> Weights:
    spoilt = {name: array.copy() for name, array in weights.items()}
    spoilt["head.weight"][0, 0] = math.nan
    return spoilt


@pytest.mark.parametrize(
    ("change", "status"),
    [
        (header(wire=0), Status.VERSION),
        (header(wire=2), Status.VERSION),
        (header(code="0" * 64), Status.VERSION),
        (header(study="0" * 64), Status.STUDY),
        (header(study=small_study(privacy={"clip": 7.0}).digest()), Status.STUDY),
        (header(round_number=0), Status.MALFORMED),
        (header(round_number=-1), Status.MALFORMED),
        (header(round_number=4), Status.MALFORMED),
        (_weights(_spoilt), Status.MALFORMED),
        (_weights(lambda w: {**w, "more": np.zeros(1, np.float32)}), Status.MALFORMED),
        (_weights(lambda w: {n: a for n, a in w.items() if n != "head.bias"}), Status.MALFORMED),
        (_weights(lambda w: {**w, "head.bias": np.zeros((1, 1), np.float32)}), Status.MALFORMED),
    ],
)
def test_what_was_not_agreed_is_refused_before_anything_is_spent(change: Change, status: Status) -> None:
    """Another wire version, code, study, round or network: a refusal, and ledger and patients stay untouched."""
    diary = Diary()
    reply = hospital(diary).train(change(request(STUDY, WEIGHTS)))
    assert (reply.status, reply.update) == (status, None)
    assert diary.lines == []


def test_a_cohort_that_has_spent_its_budget_refuses() -> None:
    """A cap below the plan's price: BUDGET before any patient is touched; the reason stays in the site's log."""
    diary = Diary()
    site = hospital(diary)
    assert isinstance(site.ledger, WatchedLedger)
    site.ledger.real = MemoryLedger(0.5, 1e-3)
    assert site.train(request(STUDY, WEIGHTS)).status is Status.BUDGET
    assert diary.count("sample") == 0


def test_a_site_with_a_cap_never_trains_without_noise() -> None:
    """A study without noise has infinite epsilon: any finite cap refuses it before a patient is touched."""
    study = small_study(privacy={"epsilon": None})
    diary = Diary()
    assert hospital(diary, study=study).train(request(study, WEIGHTS)).status is Status.BUDGET
    assert diary.count("sample") == 0


@pytest.mark.parametrize("breaks", ["admit", "attempt", "release", "training"])
def test_text_of_a_failure_reaches_neither_reply_nor_log(breaks: str, caplog: pytest.LogCaptureFixture) -> None:
    """An exception that quotes a patient: LOCAL_FAILURE, no update, and only the exception's class in the log."""
    caplog.set_level(logging.DEBUG)
    site = hospital(Diary(), breaks=breaks, failures=int(breaks == "training"))
    reply = site.train(request(STUDY, WEIGHTS))
    assert (reply.status, reply.update) == (Status.LOCAL_FAILURE, None)
    assert SECRET not in content_of(reply)
    assert SECRET not in caplog.text
    assert all(SECRET not in repr(vars(record)) for record in caplog.records)
    assert ("ValueError" if breaks == "training" else "OSError") in caplog.text


def test_what_could_not_be_stored_does_not_leave() -> None:
    """A ledger that fails to store the update: it was trained and stays charged, but it is not sent."""
    diary = Diary()
    site = hospital(diary, breaks="release")
    assert site.train(request(STUDY, WEIGHTS)).update is None
    assert diary.lines == ["admit", "attempt 1 1", "sample", "noise"]
    assert isinstance(site.ledger, WatchedLedger)
    assert site.ledger.real.steps_taken(STUDY.digest()) == 1


def _broken_patients() -> list[Patient]:
    patients = made_up_patients(3, 12)
    for stay in (stay for patient in patients for stay in patient):
        stay.visits[0].values = [math.nan] * len(stay.visits[0].values)
    return patients


def _one_class() -> list[Patient]:
    patients = made_up_patients(4, 7)
    for stay in (stay for patient in patients for stay in patient):
        stay.label = 1
    return patients


def test_nothing_but_the_update_depends_on_the_records() -> None:
    """Sites with other, more, no, unusable or one-sided records answer alike in all but the update's numbers."""
    cohorts = [
        made_up_patients(1, 40),
        made_up_patients(2, 300),
        made_up_patients(1, 1),
        _broken_patients(),
        _one_class(),
    ]
    replies = [hospital(Diary(), patients).train(request(STUDY, WEIGHTS)) for patients in cohorts]
    empty = Dataset(as_sequences(cohorts[0]).select([]))
    replies.append(Site("north", STUDY, empty, MemoryLedger(1.0, 1e-3)).train(request(STUDY, WEIGHTS)))
    seen = set()
    for reply in replies:
        content = reply_to_content(reply)
        assert reply.update is not None
        assert all(np.isfinite(part).all() for part in reply.update.values())
        shapes = [(name, part.dtype, part.shape) for name, part in reply.update.items()]
        sizes = [len(content["update"][name].data) for name in reply.update]  # type: ignore[union-attr]  # an ArrayRecord
        seen.add(repr((sorted(content), dict(content["reply"]), shapes, sizes, len(to_bytes(reply.update)))))
    assert len(seen) == 1


def test_a_name_that_the_study_does_not_have_is_refused_before_anything_is_spent() -> None:
    """A site takes its declared patients from the study by its name: without it there is no site."""
    with pytest.raises(ConfigurationError, match="`nowhere` is not in study small, which has east, north"):
        Site("nowhere", STUDY, Dataset(as_sequences(made_up_patients(1, 9))), MemoryLedger(1.0, 1e-3))


def test_the_divisor_is_what_the_site_declared() -> None:
    """Two sites of one study with equal records and sources move by the inverse ratio of their declared patients."""
    records = as_sequences(made_up_patients(1, 30))
    updates = []
    for name in ("north", "east"):
        source = lambda _round, _attempt: SeededRandomness(1, "any", 1, 1)  # noqa: E731 (one line says it)
        reply = Site(name, STUDY, Dataset(records), MemoryLedger(1.0, 1e-3), source).train(request(STUDY, WEIGHTS))
        assert reply.update is not None
        updates.append(reply.update)
    north, east = updates
    assert all(np.allclose(east[name] * (50 / 80), north[name], rtol=0, atol=1e-6) for name in north)
