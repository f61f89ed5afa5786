"""One hospital in two studies at the same time: two clients, two state folders, one ledger, one budget."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.ledger_file import read_accounts
from client.state import LEDGER
from common.privacy.accounting import filter_epsilon, rdp_of
from common.study import load_study
from tests.e2e.deployment import Hospital, Server, deployed, enrol, write_study

pytestmark = pytest.mark.full  # seven processes that load torch

ROUNDS = 4


def test_two_studies_at_once_are_charged_to_one_budget(cohort: dict[str, Path], tmp_path: Path) -> None:
    """Both studies finish with all rounds, from processes that run side by side, and the one ledger has both plans."""
    with deployed(tmp_path / "d") as deployment:
        servers = {
            name: Server(
                deployment,
                write_study(
                    tmp_path / name / "study.yaml",
                    {"north": 80},
                    name=name,
                    quorum=1,
                    model={"hidden": 4, "embedding": 3},
                    privacy={"epsilon": 1.0, "sampling_rate": 1.0},
                    training={"rounds": ROUNDS},
                ),
                name,
            )
            for name in ("first", "second")
        }
        one = Hospital(deployment, "north", cohort["north"], servers["first"])
        two = Hospital(
            deployment,
            "north",
            cohort["north"],
            servers["second"],
            folder="north-second",
            ledger=str(one.state / LEDGER),
        )
        for hospital, server in zip((one, two), servers.values(), strict=True):
            hospital.keygen()
            server.admit(hospital)
        serving = [server.run() for server in servers.values()]
        for hospital in (one, two):
            enrol([hospital])
        taking_part = [one.run(), two.run()]
        for running in serving:
            assert f"finished: {ROUNDS} rounds" in running.finish()
        for running in taking_part:
            assert running.end() == 0

        assert not (two.state / LEDGER).exists()
        accounts, _ = read_accounts(one.state / LEDGER)
        studies = {load_study(server.study).digest() for server in servers.values()}
        assert set(accounts.studies) == studies
        for account in accounts.studies.values():
            assert sorted(account.released) == list(range(1, ROUNDS + 1))
            assert account.steps_taken == ROUNDS
        (cohort_account,) = accounts.cohorts.values()
        plans = [account.plan for account in accounts.studies.values()]
        order = cohort_account.order
        assert cohort_account.spent == filter_epsilon([rdp_of(plan, order) for plan in plans], order, 1e-5)
        assert one.budget().finish() != ""
        assert two.budget().finish().count(str(one.state / LEDGER)) == 1
