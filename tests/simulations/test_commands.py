"""`wardround simulate cohort` and `partition` as a person types them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.e2e.test_simulate_run import small_study, wardround

SITES = ("north", "east", "south", "west")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A small cohort and what the command printed."""
    out = tmp_path_factory.mktemp("command") / "cohort"
    done = wardround("simulate", "cohort", out, "--scale", "0.05", "--seed", "4")
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_cohort_prints_what_is_known(written: tuple[Path, str]) -> None:
    """A line per site and one for all: training patients, patients, events, prevalence, best AUROC, AUPRC, Brier."""
    out, printed = written
    for site, training in (("north", "200"), ("east", "125"), ("south", "75"), ("west", "40"), ("pooled", "440")):
        assert re.search(rf"{site} +{training} +[\d,]+ +[\d,]+ +0\.\d+ +0\.[6-9]\d+ +0\.\d+ +0\.\d+", printed), printed
    assert f"written to {out}" in printed.replace("\n", "")
    assert sorted(path.name for path in out.iterdir()) == sorted(SITES)


def test_cohort_can_be_some_sites_and_another_task(written: tuple[Path, str], tmp_path: Path) -> None:
    """--sites writes these alone, with the same patients; --task shows another label's numbers."""
    done = wardround(
        *("simulate", "cohort", tmp_path / "c", "--scale", "0.05", "--seed", "4"),
        *("--sites", "west,east", "--task", "phenotype_1", "--preset", "medium"),
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["east", "west"]
    assert "phenotype_1" in done.stdout
    for site in ("east", "west"):
        data = tmp_path / "c" / site / "data" / "0.parquet"
        assert data.read_bytes() == (written[0] / site / "data" / "0.parquet").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--preset", "meduim"], "did you mean `medium`"),
        (["--sites", "nort"], "site `nort` is not in preset medium"),
        (["--task", "death"], "--task death: choose one of diagnosis"),
        (["--scale", "0"], "scale=0.0 must be above 0"),
    ],
)
def test_cohort_refuses_in_one_line(arguments: list[str], fault: str, tmp_path: Path) -> None:
    """A wrong preset, site, task or scale is one line of error, and nothing is written."""
    done = wardround("simulate", "cohort", tmp_path / "c", *arguments)
    assert done.returncode != 0
    assert fault in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_refused(written: tuple[Path, str]) -> None:
    """Neither command writes into a folder that is not empty."""
    out, _ = written
    before = sorted(out.rglob("*"))
    for command in (["cohort", out], ["partition", out, out, "--task", "diagnosis", "--by", "iid", "--sites", "2"]):
        done = wardround("simulate", *command)
        assert done.returncode != 0
        assert "exists and is not an empty folder" in done.stderr
    assert sorted(out.rglob("*")) == before


@pytest.mark.full
def test_cohort_and_partition_are_data_of_a_run(written: tuple[Path, str], tmp_path: Path) -> None:
    """`simulate run --data` reads what both commands wrote, and knows the best possible AUROC of both."""
    out, _ = written
    done = wardround("simulate", "run", small_study(tmp_path), "--data", out, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "unknown" not in done.stdout

    dealt = wardround(
        *("simulate", "partition", out, tmp_path / "dealt", "--task", "diagnosis"),
        *("--by", "label", "--alpha", "0.8", "--sites", "3", "--minimum", "20", "--seed", "1"),
    )
    assert dealt.returncode == 0, dealt.stderr
    for site in ("site-1", "site-2", "site-3"):
        assert re.search(rf"{site}\W+\d+\W+[\d,]+\W+[\d,]+\W+0\.\d+\W+0\.\d+\W+0\.\d+", dealt.stdout), dealt.stdout
    assert "research mode: the data were treated as public" in dealt.stdout
    declared = dict(re.findall(r"^  (site-\d): \{declared_patients: (\d+)\}$", dealt.stdout, re.MULTILINE))
    sites = {site: {"declared_patients": int(patients)} for site, patients in declared.items()}
    (tmp_path / "study").mkdir()
    study = small_study(tmp_path / "study", sites=sites, quorum=3)
    done = wardround("simulate", "run", study, "--data", tmp_path / "dealt", "--out", tmp_path / "run2")
    assert done.returncode == 0, done.stderr
    assert "unknown" not in done.stdout


def test_partition_refuses_in_one_line(written: tuple[Path, str], tmp_path: Path) -> None:
    """A missing knob and a folder without records are one line of error each, and nothing is written."""
    out, _ = written
    for data, arguments, fault in (
        (out, ["--by", "label", "--sites", "2"], "needs `alpha`"),
        (tmp_path, ["--by", "iid", "--sites", "2"], "neither a MEDS directory"),
    ):
        done = wardround("simulate", "partition", data, tmp_path / "p", "--task", "diagnosis", *arguments)
        assert done.returncode != 0
        assert fault in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
