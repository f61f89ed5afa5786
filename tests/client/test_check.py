"""`wardround client check`: what it finds in records, what the shared page holds, and what is disclosed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import Result
from typer.testing import CliRunner

from client.commands import app
from client.inspection.disclosures import DISCLOSED
from client.inspection.requirements import WORDS
from client.ledger_file import read_accounts
from client.state import LEDGER
from common.errors import ConfigurationError, DataError
from tests.client.hospitals import write_site, write_study

ROOT = Path(__file__).resolve().parents[2]
SERVER = {"address": "localhost:1", "plaintext": True}
EVENTS, LABELS, SPLITS = "data/0.parquet", "labels/diagnosis.parquet", "metadata/subject_splits.parquet"
POSITIVES = 20  # of 80: nearer to the study's 14 % than a factor of two


@pytest.fixture
def records(own_process: None, cohort: dict[str, Path], tmp_path: Path) -> Path:
    """North's records with twenty positive training patients."""
    shutil.copytree(cohort["north"], tmp_path / "records")
    chosen = pl.read_parquet(tmp_path / "records" / SPLITS).filter(pl.col("split") == "train")["subject_id"]
    change(tmp_path / "records", LABELS, pl.col("subject_id").is_in(chosen.head(POSITIVES).implode()), "boolean_value")
    write_study(tmp_path)
    return tmp_path / "records"


def change(records: Path, file: str, expression: pl.Expr, column: str) -> None:
    frame = pl.read_parquet(records / file).with_columns(expression.alias(column))
    frame.write_parquet(records / file)


def add_events(records: Path, patients: pl.Expr, code: str, back: timedelta, *, midnight: bool = False) -> None:
    """One event of `code` for each label row that `patients` selects, so long before its prediction."""
    events, rows = pl.read_parquet(records / EVENTS), pl.read_parquet(records / LABELS)
    time = pl.col("prediction_time") - back
    added = rows.filter(patients).select(
        "subject_id",
        (time.dt.truncate("1d") if midnight else time).alias("time"),
        pl.lit(code).alias("code"),
        pl.lit(None, pl.Float32).alias("numeric_value"),
    )
    pl.concat([events, added.select(events.columns)]).write_parquet(records / EVENTS)


def check(records: Path, *arguments: object, answer: str | None = None, **changes: Any) -> Result:
    """Run the command; errors of ours are raised."""
    path = write_site(records.parent, records, SERVER, **changes)
    done = CliRunner().invoke(app, ["check", str(path), *map(str, arguments)], input=answer)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def answers(done: Result) -> dict[str, str]:
    """Requirement -> answer, as printed."""
    found = re.findall(r"^(pass|fail|not reached) +(\S+(?: \S+)?) {1,}", done.output, re.MULTILINE)
    return {next(word for word in WORDS if name.startswith(word)): answer for answer, name in found}


def failed(done: Result) -> list[str]:
    return [name for name, answer in answers(done).items() if answer == "fail"]


def test_sound_records_pass(records: Path) -> None:
    """Every requirement is asked and holds: exit status 0."""
    done = check(records)
    assert answers(done) == dict.fromkeys(WORDS, "pass")
    assert done.exit_code == 0


MANY = pl.col("subject_id") <= 15  # all of them train and are positive


def wrong_unit(records: Path) -> None:
    change(records, EVENTS, pl.when(pl.col("code") == "VITAL//2").then(9e6).otherwise("numeric_value"), "numeric_value")


def own_codes(records: Path) -> None:
    change(records, EVENTS, pl.col("code").str.replace("VITAL//[0-3]", "LOCAL"), "code")


def no_code_at_all(records: Path) -> None:
    change(records, EVENTS, pl.lit("LOCAL"), "code")


def one_class(records: Path) -> None:
    change(records, LABELS, pl.lit(False), "boolean_value")


def too_many_positives(records: Path) -> None:
    change(records, LABELS, pl.col("subject_id") <= 60, "boolean_value")


def two_splits(records: Path) -> None:
    splits = pl.read_parquet(records / SPLITS)
    pl.concat([splits, splits.head(1).with_columns(pl.lit("tuning").alias("split"))]).write_parquet(records / SPLITS)


def outcome_code(records: Path) -> None:
    add_events(records, MANY, "CODE//399", timedelta(hours=1))


def dates_at_midnight(records: Path) -> None:
    add_events(records, pl.col("subject_id") <= 60, "CODE//398", timedelta(), midnight=True)


def no_labels(records: Path) -> None:
    (records / LABELS).unlink()


def no_patient_id(records: Path) -> None:
    change(records, EVENTS, pl.when(pl.int_range(pl.len()) > 0).then("subject_id"), "subject_id")


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (wrong_unit, ["units"]),
        (own_codes, ["codes"]),
        (one_class, ["sequences"]),
        (too_many_positives, ["prevalence"]),
        (two_splits, ["splits"]),
        (outcome_code, ["outcome codes"]),
        (dates_at_midnight, ["dates"]),
        (no_labels, ["labels"]),
        (no_patient_id, ["events"]),
        (no_code_at_all, ["codes", "sequences"]),
    ],
)
def test_a_planted_fault_is_named(records: Path, fault: Callable[[Path], None], expected: list[str]) -> None:
    """The requirement that it breaks fails, no other does; what depends on it is not reached: exit status 1."""
    fault(records)
    done = check(records)
    assert failed(done) == expected
    assert done.exit_code == 1
    if fault is outcome_code:
        assert "CODE//399" in done.output


def test_a_code_after_the_prediction_is_no_leak(records: Path) -> None:
    """A code that only positives have, but after the prediction time, enters nothing and is not suspected."""
    add_events(records, MANY, "CODE//399", timedelta(hours=-1))
    assert check(records).exit_code == 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"policy": {"max_epsilon": 3.0, "delta": 1e-5, "max_clip": 0.1}}, "policy"),
        ({"policy": {"max_epsilon": 3.0, "delta": 1e-5, "min_patients": 81}}, "cohort"),
        ({"exclude": "missing.csv"}, "opt-outs"),
    ],
)
def test_the_sites_own_limits_are_asked(records: Path, changes: dict[str, Any], expected: str) -> None:
    """Policy, smallest cohort and a file of opt-outs that is not there."""
    assert failed(check(records, **changes)) == [expected]


def test_a_study_that_is_too_dear_fails_the_budget(records: Path) -> None:
    """A policy below the study's epsilon fails policy and budget, with the numbers."""
    done = check(records, policy={"max_epsilon": 1.0, "delta": 1e-5})
    assert failed(done) == ["policy", "budget"]


def test_a_ledger_that_is_gone_or_of_others_fails_the_budget(records: Path) -> None:
    """As enrolling would: no fresh budget for a lost ledger, and none for a cohort that the site file does not name."""
    state = records.parent / "state"
    check(records, "--out", records.parent / "out", "--disclose", "events", "--yes", cohort="adults")
    assert failed(check(records)) == ["budget"]
    (state / LEDGER).unlink()
    assert failed(check(records, cohort="adults")) == ["budget"]


def test_who_opted_out_is_in_no_count(records: Path) -> None:
    """Their events and labels are gone from every count but the one of opt-outs."""
    (records.parent / "out.csv").write_text("subject_id\n" + "\n".join(map(str, range(1, 6))) + "\n999999\n")
    output = check(records, exclude="out.csv").output
    assert "6 patients are listed, 5 of them have records here" in output
    assert "235 patients" in output
    assert "75 patients train" in output


def shared(records: Path, name: str, *arguments: object, **changes: Any) -> bytes:
    check(records, "--out", records.parent / name, *arguments, **changes)
    return (records.parent / name / "share.html").read_bytes()


def test_the_shared_page_is_a_function_of_the_answers(records: Path, cohort: dict[str, Path]) -> None:
    """Two hospitals' records, one with a third of the other's patients, both sound: the same bytes."""
    north = shared(records, "one")
    shutil.rmtree(records)
    shutil.copytree(cohort["south"], records)
    (records.parent / "nobody.csv").write_text("subject_id\n")
    assert shared(records, "two", exclude="nobody.csv") == north
    one, two = ((records.parent / name / "local" / "check.json").read_text() for name in ("one", "two"))
    assert one != two


def test_what_was_found_stays_on_the_local_page(records: Path) -> None:
    """With faults, too: the shared page holds names and answers, none of the details, codes or counts."""
    outcome_code(records)
    page = shared(records, "out").decode()
    local = json.loads((records.parent / "out" / "local" / "check.json").read_text())
    found = {row[0]["text"]: row for row in local["sections"][0]["blocks"][0]["rows"]}
    for name, row in found.items():
        assert re.search(rf">{name}<.*?>{row[1]['text']}<", page)
        assert row[2]["text"] not in page or row[2]["text"] == "none"
    assert "CODE//" not in page
    assert 'id="outcome-codes"' in (records.parent / "out" / "local" / "check.html").read_text()


def test_files_are_for_this_user_alone_and_nothing_is_overwritten(records: Path) -> None:
    """Mode 0600 in folders of mode 0700; a folder that holds something is refused before anything is looked at."""
    out = records.parent / "out"
    check(records, "--out", out)
    for path in out.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0
    with pytest.raises(ConfigurationError, match="is not empty; name a new folder"):
        check(records, "--out", out)


def test_codes_of_a_few_patients_are_not_named(records: Path) -> None:
    """Nine patients share a code that the study does not read: counted, not named. Ten: named, on the local page."""
    add_events(records, pl.col("subject_id") <= 9, "RARE", timedelta(hours=5))
    add_events(records, pl.col("subject_id") <= 10, "COMMON", timedelta(hours=5))
    page = shared(records, "out").decode()
    local = (records.parent / "out" / "local" / "check.html").read_text()
    assert "COMMON" in local
    assert "RARE" not in local
    assert "1 of them are held by fewer than 10 patients" in local
    assert "COMMON" not in page


def test_no_id_is_ever_printed(records: Path) -> None:
    """Ids that are unlike any count: they are in no line, page or error, whichever requirement fails."""
    base = 7_654_300_000
    for file in (EVENTS, LABELS, SPLITS):
        change(records, file, pl.col("subject_id") + base, "subject_id")
    done = check(records, "--out", records.parent / "one")
    two_splits(records)
    also = check(records, "--out", records.parent / "two")
    said = done.output + also.output
    said += "".join(path.read_text() for name in ("one", "two") for path in (records.parent / name).rglob("*.*"))
    assert "7654300" not in said.replace(",", "")


def test_a_disclosed_number_is_marked_and_noted(records: Path) -> None:
    """The page says "exact, not covered by epsilon" beside it; the ledger has its name and the page's sha256."""
    page = shared(records, "out", "--disclose", "patients", "--disclose", "prevalence", "--yes")
    text = page.decode()
    assert text.count("exact, not covered by epsilon") >= 3
    assert ">80<" in text
    assert ">25.0%<" in text
    assert "No statistic of patients." not in text
    noted = read_accounts(records.parent / "state" / LEDGER)[0].disclosed
    assert [(entry.name, entry.file) for entry in noted] == [
        ("patients", hashlib.sha256(page).hexdigest()),
        ("prevalence", hashlib.sha256(page).hexdigest()),
    ]


@pytest.mark.parametrize("name", DISCLOSED)
def test_only_what_was_named_is_disclosed(records: Path, name: str) -> None:
    """Each name of the closed list adds its own row and no other."""
    text = shared(records, "out", "--disclose", name, "--yes").decode()
    rows = re.findall(r"<tr>.*?</tr>", text)
    assert len([row for row in rows if "exact, not covered" in row]) == 1


def test_a_no_discloses_nothing(records: Path) -> None:
    """Asked and refused: no page, no ledger."""
    done = check(records, "--out", records.parent / "out", "--disclose", "patients", answer="n\n")
    assert "no epsilon covers them" in done.output
    assert done.exit_code == 1
    assert not (records.parent / "out").exists()
    assert not (records.parent / "state" / LEDGER).exists()


def test_what_cannot_be_disclosed_is_refused(records: Path) -> None:
    """A name outside of the list, a number without a page to stand on, and numbers of a few people."""
    out = records.parent / "out"
    with pytest.raises(ConfigurationError, match="must be one of patients, sequences"):
        check(records, "--out", out, "--disclose", "first-patient")
    with pytest.raises(ConfigurationError, match="--disclose needs --out"):
        check(records, "--disclose", "patients")
    change(records, LABELS, pl.col("subject_id") <= 9, "boolean_value")
    with pytest.raises(DataError, match="fewer than 10 patients"):
        check(records, "--out", out, "--disclose", "patients", "--yes")
    assert not out.exists()
    assert not (records.parent / "state" / LEDGER).exists()


def test_it_runs_without_torch_and_flower(records: Path) -> None:
    """Checking, both pages and the ledger's note load neither torch, Opacus nor Flower."""
    path = write_site(records.parent, records, SERVER)
    code = (
        "import sys; from client.commands import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as end: status = end.code\n"
        "print(status, [name for name in ('torch', 'opacus', 'flwr') if name in sys.modules], file=sys.stderr)"
    )
    arguments = ["check", str(path), "--out", str(records.parent / "out"), "--disclose", "events", "--yes"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("FLWR_")},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stderr.strip() == "0 []"
