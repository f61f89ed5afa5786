"""A study's metrics in the ledger: priced with its training, granted once, never forgotten, and no trap for others."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client import entry_file
from client.accounts import Accounts, Attempt, metrics_of
from client.commands.budget import show, summary
from client.entries import CohortOpened
from client.ledger_file import SqliteLedger, accept_restore, read_accounts
from client.policy import Policy
from client.site import Site
from common.batching import Dataset
from common.errors import BudgetError
from common.privacy.accounting import Steps, epsilon_of, epsilon_of_history, filter_epsilon, rdp_of
from common.privacy.plan import Plan
from common.records import Status
from common.terms import parse
from tests.client.ledger_cases import CAP, DELTA, SMALL, STUDY, UNSYNCED, WEIGHTS, WHOLE, opened, raw, used
from tests.client.site_cases import WEIGHTS as STARTING
from tests.client.site_cases import moved
from tests.client.test_ledger_crash import Say, Tick, in_child, ticking
from tests.small import as_sequences, made_up_patients, request, small_study

TOLD = Plan(1.0, 5.0, 1.0, DELTA, 1)
METRICS, OTHER = metrics_of(STUDY), "6" * 64
POINTS = 30


def told(ledger: SqliteLedger, histogram: bytes = b"noised", study: str = METRICS) -> None:
    """Mark the one attempt, and release it."""
    ledger.admit(study, TOLD)
    attempt = ledger.attempt(study, 3, 1, WEIGHTS)
    assert isinstance(attempt, Attempt)
    ledger.release(attempt, histogram)


def steps_of(plan: Plan) -> Steps:
    return Steps(plan.sampling_rate, plan.noise_multiplier, plan.priced_steps)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return used(tmp_path / "ledger.db")


def test_one_study_is_priced_by_pld_with_its_metrics(path: Path) -> None:
    """Both plans of an only study: the PLD epsilon of both, which is less than their epsilons' sum or the filter's."""
    with opened(path) as ledger:
        told(ledger)
        cohort = ledger.accounts.cohorts["all"]
        assert cohort.spent == epsilon_of_history([steps_of(SMALL), steps_of(TOLD)], DELTA)
        assert epsilon_of(SMALL) < cohort.spent < epsilon_of(SMALL) + epsilon_of(TOLD)
        assert cohort.spent < filter_epsilon(
            [rdp_of(SMALL, cohort.order), rdp_of(TOLD, cohort.order)], cohort.order, DELTA
        )


def test_several_studies_are_priced_by_the_filter_metrics_included(path: Path) -> None:
    """As soon as there is another study, every plan of each goes through the filter."""
    with opened(path) as ledger:
        told(ledger)
        ledger.admit(OTHER, SMALL)
        cohort = ledger.accounts.cohorts["all"]
        divergences = [rdp_of(plan, cohort.order) for plan in (SMALL, TOLD, SMALL)]
        assert cohort.spent == filter_epsilon(divergences, cohort.order, DELTA)


def test_metrics_of_another_study_are_no_part_of_this_one(path: Path) -> None:
    """Training of one and metrics of another are two studies: the filter, not PLD."""
    with opened(path) as ledger:
        told(ledger, study=metrics_of(OTHER))
        cohort = ledger.accounts.cohorts["all"]
        assert cohort.spent == filter_epsilon(
            [rdp_of(SMALL, cohort.order), rdp_of(TOLD, cohort.order)], cohort.order, DELTA
        )


def test_metrics_beyond_the_cap_are_refused(tmp_path: Path) -> None:
    """Training has taken the cap to the last digit: no metrics are admitted, and none are marked."""
    with opened(tmp_path / "ledger.db") as ledger:
        ledger.admit(STUDY, WHOLE)
        with pytest.raises(BudgetError, match=r"exceeds the cohort's cap 3.0"):
            ledger.admit(METRICS, TOLD)
        with pytest.raises(BudgetError, match="was not admitted"):
            ledger.attempt(METRICS, 3, 1, WEIGHTS)
        assert ledger.accounts.cohorts["all"].spent <= CAP


def test_a_study_with_metrics_is_admitted_or_refused_as_a_whole_beforehand() -> None:
    """What enrolling asks: training alone fits, with metrics it does not, and nothing of it is stored."""
    study = small_study(metrics={"noise_multiplier": 1.0})
    for with_metrics in (False, True):
        accounts = Accounts()
        accounts.apply(CohortOpened("all", 1.0, 1e-3, 8.0))
        if with_metrics:
            with pytest.raises(BudgetError, match="exceeds the cohort's cap"):
                accounts.admit_all("all", study, 1.0, with_metrics=True)
        else:
            accounts.admit_all("all", study, 1.0, with_metrics=False)


def test_an_older_program_reads_the_ledger(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No new kind of entry: the file keeps version 1, and what was charged counts for every program that opens it."""
    with opened(path) as ledger:
        told(ledger)
    with raw(path) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)
    monkeypatch.setattr(entry_file, "VERSION", 1)
    assert read_accounts(path)[0].cohorts["all"].plans == [SMALL, TOLD]


def test_metrics_do_not_move_the_rounds(path: Path) -> None:
    """Steps, spares and open attempt of the training stay as they were, and its rounds go on."""
    before = read_accounts(path)[0].studies[STUDY]
    with opened(path) as ledger:
        told(ledger)
        assert ledger.accounts.studies[STUDY] == before
        assert isinstance(ledger.attempt(STUDY, 4, 1, WEIGHTS), Attempt)


def test_after_an_accepted_restore_no_metrics_are_told(path: Path, tmp_path: Path) -> None:
    """A copy from before the question was put back: the anchor charges the metrics, and they are spent."""
    anchor = tmp_path / "anchor"
    ledger_path = tmp_path / "other.db"
    used(ledger_path, anchor=anchor)
    copy = ledger_path.read_bytes()
    with opened(ledger_path, anchor) as ledger:
        told(ledger)
    ledger_path.write_bytes(copy)
    written = accept_restore(ledger_path, CAP, DELTA, anchor=anchor)
    assert [plan.study for plan in written.plans] == [METRICS]
    with opened(ledger_path, anchor) as ledger:
        assert ledger.accounts.cohorts["all"].plans == [SMALL, TOLD]
        with pytest.raises(BudgetError, match="counts as fully spent"):
            ledger.attempt(METRICS, 3, 1, WEIGHTS)


def test_the_budget_command_shows_both_parts(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row each under one name, the metrics called so; one price for both, by PLD."""
    with opened(path) as ledger:
        told(ledger)
    found = summary(*read_accounts(path), {STUDY: "small"})
    assert [(row["study"], row["part"], row["name"]) for row in found["studies"]] == [
        (STUDY, "training", "small"),
        (STUDY, "metrics", "small"),
    ]
    show(found, str(path))
    said = capsys.readouterr().out
    assert f"{STUDY[:12]} small metrics" in said
    assert "by PLD: one study" in said


class KilledError(BaseException):
    """Nothing catches it: what the process would have done next is not done."""


def site_on(ledger: SqliteLedger, study: Any) -> Site:
    records = [Dataset(as_sequences(made_up_patients(seed, 10))) for seed in (1, 2)]
    limits = parse({"max_epsilon": 2.0, "delta": 1e-3, "min_metrics_noise": 2.0}, Policy, "policy")
    return Site("north", study, records[0], ledger, policy=limits, held_out=records[1])


@pytest.mark.parametrize("dies_in", ["scores_one_by_one", "add_noise", "release"])
def test_a_site_that_dies_before_its_answer_is_stored_never_answers(
    dies_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between mark and store, wherever: the charge stays, and no second noise is drawn for it after a restart."""
    study = small_study(metrics={"noise_multiplier": 2.0})
    asked, path = request(study, STARTING, 3), tmp_path / "ledger.db"
    where = {
        "scores_one_by_one": "client.scoring.scores_one_by_one",
        "add_noise": "common.privacy.randomness.Randomness.add_noise",
        "release": "client.ledger_file.SqliteLedger.release",
    }[dies_in]

    def dies(*_: Any, **__: Any) -> Any:
        raise KilledError

    with monkeypatch.context() as dying, SqliteLedger(path, 2.0, 1e-3) as ledger:
        dying.setattr(where, dies)
        with pytest.raises(KilledError):
            site_on(ledger, study).tell_metrics(asked)
    with SqliteLedger(path, 2.0, 1e-3) as ledger:
        assert ledger.accounts.cohorts["all"].plans == [study.metrics_plan()]
        assert site_on(ledger, study).tell_metrics(asked).status is Status.BUDGET


def test_a_site_that_dies_before_its_answer_is_sent_repeats_it(tmp_path: Path) -> None:
    """Stored, then killed: after a restart the same question is answered with the same bytes, any other is refused."""
    study = small_study(metrics={"noise_multiplier": 2.0})
    asked, path = request(study, STARTING, 3), tmp_path / "ledger.db"
    with SqliteLedger(path, 2.0, 1e-3) as ledger:
        first = site_on(ledger, study).tell_metrics(asked)
    with SqliteLedger(path, 2.0, 1e-3) as ledger:
        again = site_on(ledger, study).tell_metrics(asked)
        other = site_on(ledger, study).tell_metrics(request(study, moved(STARTING), 3))
    assert first.update is not None
    assert again.update is not None
    assert (first.update["histogram"] == again.update["histogram"]).all()
    assert other.status is Status.BUDGET


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=UNSYNCED) as made:
        yield Path(made)


def step_by_step(path: Path, say: Say, tick: Tick) -> None:
    """Tell metrics under a ledger that is there, with `tick` before each instruction of SQLite."""
    with SqliteLedger(path, CAP, DELTA, connect=ticking(tick)) as ledger:
        ledger.admit(METRICS, TOLD)
        say({"admitted": 1})
        attempt = ledger.attempt(METRICS, 3, 1, WEIGHTS)
        assert isinstance(attempt, Attempt)
        say({"marked": 1})
        ledger.release(attempt, b"noised")
        say({"released": 1})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that share what was imported")
def test_a_process_that_ends_at_any_instruction_forgets_no_metrics(folder: Path) -> None:
    """Stopped at points spread over the call: what was said is there, and a marked question is never noised again."""
    path, ended = folder / "ledger.db", set()
    used(path)
    before = path.read_bytes()
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1

    def whole(say: Say) -> None:
        step_by_step(path, say, count)
        say({"steps": steps})

    total = int(in_child(whole)[-1]["steps"])
    assert total > 5 * POINTS
    for point in range(POINTS):
        path.write_bytes(before)
        left = total * (2 * point + 1) // (2 * POINTS)

        def tick() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                os._exit(9)

        said = {word for line in in_child(lambda say, tick=tick: step_by_step(path, say, tick)) for word in line}
        ended.add(len(said))
        with opened(path) as ledger:
            account = ledger.accounts.studies.get(METRICS)
            assert account is not None or "admitted" not in said
            ledger.admit(METRICS, TOLD)
            assert ledger.accounts.cohorts["all"].plans == [SMALL, TOLD]  # charged once
            if account is None or account.steps_left:
                assert "marked" not in said
            elif account.released:
                assert ledger.attempt(METRICS, 3, 1, WEIGHTS) == b"noised"
            else:
                assert "released" not in said
                with pytest.raises(BudgetError, match="0 are left of the plan's 1"):
                    ledger.attempt(METRICS, 3, 1, WEIGHTS)
    assert len(ended) >= 3  # the points fell before, between and after the calls
