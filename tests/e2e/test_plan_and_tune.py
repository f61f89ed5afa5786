"""`wardround simulate plan` and `tune` as a person runs them: what they print, and whom they refuse."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

from tests.e2e.test_simulate_run import SITES, small_study, wardround

SMALL_GRID = ("--widths", "3,5", "--cells", "gru,none", "--folds", "2")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two small sites."""
    return small_study(tmp_path_factory.mktemp("plan"), model__hidden=4)


@pytest.mark.full
def test_plan_says_what_it_costs_and_what_to_expect(study: Path) -> None:
    """Price, noise, time and traffic first, then how long the rest will take, the expected AUROC and advice."""
    done = wardround("simulate", "plan", study, "--epsilon", "2", "--seeds", "1")
    assert done.returncode == 0, done.stderr
    said = [
        "the plan of every site, per budget",
        "as measured on this",
        "expected AUROC: 3 trainings on synthetic patients, 1 seed(s), about",
        "expected AUROC, alone -> together",
        "epsilon 2: north with 200 patients",
        "The expected AUROC is that of synthetic patients",
    ]
    places = [done.stdout.index(part) for part in said]
    assert places == sorted(places)


@pytest.mark.full
def test_plan_as_json(study: Path) -> None:
    """`--json` prints nothing but one object with the same facts, for every site and budget."""
    done = wardround("simulate", "plan", study, "--epsilon", "1,8", "--seeds", "1", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert [budget["epsilon"] for budget in facts["cost"]["budgets"]] == [1, 8]
    assert all(budget["price"] <= budget["epsilon"] for budget in facts["cost"]["budgets"])
    assert {site["site"] for site in facts["cost"]["sites"]} == set(SITES)
    assert [(each["epsilon"], each["site"]) for each in facts["expected"]] == [
        (epsilon, site) for epsilon in (1, 8) for site in (*sorted(SITES), "pooled")
    ]
    assert any(note.startswith("--quick: expected AUROC after 1 of 4 rounds") for note in facts["notes"])
    assert facts["advice"]


def test_plan_needs_numbers(study: Path) -> None:
    """A study without noise has no plan to price."""
    done = wardround("simulate", "plan", study, "--epsilon", "1,none")
    assert done.returncode == 2
    assert done.stderr == "error: --epsilon 1,none: a plan is priced at numbers > 0; remove `none`\n"


@pytest.mark.full
def test_tune_prints_the_curve_and_writes_it(study: Path, tmp_path: Path) -> None:
    """A line per candidate, the recommendation, what it was made on, and the table as a file."""
    done = wardround("simulate", "tune", study, *SMALL_GRID, "--out", tmp_path / "curve.csv")
    assert done.returncode == 0, done.stderr
    for part in ("gru 3: AUROC", "gru 5: AUROC", "none: AUROC", "within one standard error", "synthetic patients"):
        assert part in done.stdout
    rows = list(csv.DictReader((tmp_path / "curve.csv").read_text().splitlines()))
    assert [(row["cell"], row["hidden"]) for row in rows] == [("gru", "3"), ("gru", "5"), ("none", "")]


@pytest.mark.parametrize(
    "named_by", [pytest.param("option"), pytest.param("study", marks=pytest.mark.full)], ids=["option", "study"]
)
def test_tune_refuses_patients_who_are_not_public(study: Path, tmp_path: Path, named_by: str) -> None:
    """On records that are not said to be public: what choosing would cost, one error with the remedies, no training."""
    terms = yaml.safe_load(study.read_text())
    terms["simulation"] = {} if named_by == "option" else {"data": str(tmp_path)}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(terms))
    done = wardround("simulate", "tune", file, *SMALL_GRID, *(("--data", tmp_path) if named_by == "option" else ()))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--synthetic" in done.stderr
    assert "--public" in done.stderr
    assert "Papernot and Steinke 2022" in done.stdout
    assert "4 in all" in done.stdout
    assert "AUROC" not in done.stdout


@pytest.mark.full
def test_tune_takes_public_records(study: Path, tmp_path: Path) -> None:
    """With `--public` the records of a folder are cross-validated, and the output says that they were public."""
    wardround("simulate", "cohort", tmp_path / "c", "--scale", "0.05", "--sites", "north,east")
    done = wardround("simulate", "tune", study, *SMALL_GRID, "--data", tmp_path / "c", "--public")
    assert done.returncode == 0, done.stderr
    assert "research mode: the data were treated as public" in done.stdout
    again = wardround("simulate", "tune", study, *SMALL_GRID, "--data", tmp_path / "c", "--synthetic")
    assert "name one of them" in again.stderr
