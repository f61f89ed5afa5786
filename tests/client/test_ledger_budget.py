"""`wardround client budget`: what it says of a ledger, beside a running client and after a restore."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from client.commands import budget
from client.ledger_file import read_accounts
from common.errors import BudgetError, ConfigurationError, LedgerError, RollbackError
from common.privacy.accounting import best_order, epsilon_of, filter_epsilon, rdp_of
from common.study import load_study
from tests.client.ledger_cases import (
    CAP,
    DELTA,
    SMALL,
    STUDY,
    WEIGHTS,
    WHOLE,
    one_round,
    opened,
    same_folder_copy,
    used,
)

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "configs" / "demo.yaml"
app = typer.Typer(pretty_exceptions_enable=False)
app.command()(budget.command)


def run(*arguments: object, answer: str | None = None) -> str:
    """Output of the command; errors of ours are raised."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], input=answer, catch_exceptions=False)
    if done.exit_code:
        raise AssertionError(done.output)
    return done.output if answer else done.stdout


def said(*arguments: object) -> dict[str, Any]:
    """What the command says in JSON."""
    found: dict[str, Any] = json.loads(run(*arguments, "--json"))
    return found


@pytest.fixture
def state(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir(mode=0o700)
    return tmp_path / "state"


def site_file(state: Path, **changes: object) -> Path:
    """A site file whose state folder is `state`, for the demo study."""
    terms = {
        "version": 1,
        "site": "north",
        "study": str(DEMO),
        "records": "records",
        "policy": {"max_epsilon": CAP, "delta": DELTA},
        "server": {"address": "127.0.0.1:9", "plaintext": True},
        "state": str(state),
    }
    path = state.parent / "site.yaml"
    path.write_text(yaml.safe_dump(terms | changes))
    return path


def test_the_numbers_are_the_ledgers(state: Path) -> None:
    """Plan, steps, spares, releases, PLD epsilon, the filter's total, cap and what is left, by study and cohort."""
    with opened(used(state / "ledger.db")) as ledger:
        ledger.admit("6" * 64, SMALL)
        found = said("--state", state)
        assert found["head"] == ledger.head()
        assert found["entries"] == ledger.accounts.count
    first, second = found["studies"]
    assert first == {
        "study": STUDY,
        "part": "training",
        "name": None,
        "cohort": "all",
        "sampling_rate": 0.1,
        "noise_multiplier": 4.0,
        "clip": 2.0,
        "delta": DELTA,
        "steps_taken": 4,
        "steps_priced": 13,
        "spare_steps_left": 3,
        "releases": 3,
        "ended_by_restore": False,
        "epsilon": epsilon_of(SMALL),
    }
    assert (second["study"], second["steps_taken"], second["releases"]) == ("6" * 64, 0, 0)
    order = best_order(CAP, DELTA)
    total = filter_epsilon([rdp_of(SMALL, order)] * 2, order, DELTA)
    assert found["cohorts"] == [
        {
            "cohort": "all",
            "cap": CAP,
            "delta": DELTA,
            "order": order,
            "plans": 2,
            "studies": 2,
            "charged": total,
            "left": CAP - total,
        }
    ]
    assert found["restored"] == 0


def test_an_only_plan_is_stated_by_pld(state: Path) -> None:
    """One plan: what is charged is its PLD epsilon, not the filter's larger one."""
    with opened(state / "ledger.db") as ledger:
        ledger.admit(STUDY, WHOLE)
    (cohort,) = said("--state", state)["cohorts"]
    assert cohort["charged"] == epsilon_of(WHOLE)
    assert "by PLD: one plan" in run("--state", state)


def test_of_several_plans_the_cap_is_named_as_the_bound(state: Path) -> None:
    """Studies may be chosen after a look at earlier ones: beside the filter's value so far stands what holds then."""
    with opened(state / "ledger.db") as ledger:
        ledger.admit(STUDY, SMALL)
        ledger.admit("e" * 64, SMALL)
        order = ledger.order
    (cohort,) = said("--state", state)["cohorts"]
    expected = f"epsilon {cohort['charged']:.3f} so far, at most 3 in the end (by the Renyi filter at order {order:g})"
    assert expected in " ".join(run("--state", state).split())


def test_the_table_shows_every_study_and_cohort(state: Path) -> None:
    """A person sees the study's short digest and name, its steps and epsilon, and a line for each cohort."""
    study = load_study(DEMO)
    with opened(state / "ledger.db") as ledger:
        assert "no study was charged" in run("--state", state)
        ledger.open_cohort("all", [1])
        ledger.admit(study.digest(), study.plan())
        one_round(ledger, 1, b"", study.digest())
        ledger.open_cohort("children", [2])
        text = " ".join(run(site_file(state)).split())
    plan = study.plan()
    for part in (
        f"{study.digest()[:12]} {study.name}",
        f"1/{plan.priced_steps}",
        f"{epsilon_of(plan):.3f}",
        f"cohort all: epsilon {epsilon_of(plan):.3f} charged (by PLD: one plan)",
        f"{CAP - epsilon_of(plan):.3f} left of 3 at delta 1e-05",
        "cohort children: nothing charged, 3.000 left of 3",
    ):
        assert part in text
    assert study.digest()[:13] not in text


def test_a_study_file_that_is_gone_costs_its_name_alone(state: Path) -> None:
    """The ledger can be read without the study file."""
    used(state / "ledger.db")
    assert said(site_file(state, study="gone.yaml"))["studies"][0]["name"] is None


def test_it_reads_beside_a_client_that_writes(state: Path) -> None:
    """While the client holds the ledger, the command shows each new entry and takes nothing away from it."""
    with opened(state / "ledger.db") as ledger:
        ledger.admit(STUDY, SMALL)
        for number in (1, 2, 3):
            one_round(ledger, number, b"update")
            assert said("--state", state)["studies"][0]["releases"] == number


def test_what_is_not_there_is_one_error(state: Path) -> None:
    """No ledger, no place to look for it, and options that do not go together are told apart."""
    with pytest.raises(LedgerError, match="no such file"):
        run("--state", state)
    for arguments in ((), (site_file(state), "--state", state), ("--state", state, "--accept-restore")):
        with pytest.raises(ConfigurationError, match="name a site file, or --state DIR"):
            run(*arguments)
    with pytest.raises(ConfigurationError, match="--lost goes with --accept-restore"):
        run(site_file(state), "--lost", DEMO)


def test_a_restore_is_accepted_by_a_person_alone(state: Path) -> None:
    """Without a yes nothing is written; with it the ledger opens, its plans ended and the lost one charged."""
    anchor = state.parent / "anchor"
    ledger, site = state / "ledger.db", site_file(state, anchor=str(anchor))
    used(ledger, anchor=anchor)
    copy = same_folder_copy(ledger, "copy")
    with opened(ledger, anchor) as newer:
        newer.admit("6" * 64, SMALL)
    ledger.write_bytes(copy.read_bytes())
    with pytest.raises(RollbackError):
        opened(ledger, anchor)
    before = read_accounts(ledger)
    with pytest.raises(AssertionError, match="Is nothing missing"):
        run(site, "--accept-restore", answer="n\n")
    assert read_accounts(ledger) == before
    text = run(site, "--accept-restore", answer="y\n")
    assert "1 plan(s) were charged that this copy did not know" in text
    assert "ended by a restore" in text
    assert "accepted as lost 1 time(s)" in text
    with opened(ledger, anchor) as again, pytest.raises(BudgetError, match="fully spent"):
        again.attempt(STUDY, 4, 1, WEIGHTS)


def test_a_person_names_the_studies_that_nobody_else_remembers(state: Path) -> None:
    """`--lost` charges a study of which neither ledger nor anchor knows; a ledger that is gone is made anew."""
    study = load_study(DEMO)
    found = said(site_file(state), "--accept-restore", "--yes", "--lost", DEMO)
    (charged,) = found["studies"]
    assert (charged["study"], charged["name"], charged["ended_by_restore"]) == (study.digest(), study.name, True)
    assert charged["spare_steps_left"] == 0


def test_it_starts_without_torch(state: Path) -> None:
    """Reading and pricing a ledger loads neither torch, Opacus nor Flower: it runs on a bare machine."""
    used(state / "ledger.db")
    code = (
        "import sys; from client.commands import budget; from pathlib import Path\n"
        "budget.command(site_file=None, state=Path(sys.argv[1]), as_json=True)\n"
        "print([name for name in ('torch', 'opacus', 'flwr') if name in sys.modules], file=sys.stderr)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FLWR_")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(state)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stderr.strip() == "[]"
    assert json.loads(done.stdout)["studies"][0]["study"] == STUDY
