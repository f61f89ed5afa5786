"""Exact numbers that a person decided to show: noted in the ledger, charged nothing, and no trap for older programs."""

from __future__ import annotations

from pathlib import Path

import pytest

from client import entry_file
from client.commands.budget import show, summary
from client.entries import Disclosed
from client.ledger_file import accept_restore, read_accounts
from common.errors import LedgerError
from tests.client.ledger_cases import CAP, DELTA, STUDY, one_round, opened, raw, used

FILE = "f" * 64


def version_of(path: Path) -> int:
    with raw(path) as connection:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return used(tmp_path / "ledger.db")


def test_a_disclosure_is_kept_and_costs_nothing(path: Path) -> None:
    """It is there after opening again, in order and once; budget, steps and open attempt stay as they were."""
    before = read_accounts(path)[0]
    with opened(path) as ledger:
        for name in ("patients", "prevalence", "patients"):
            ledger.disclose(name, FILE)
    after = read_accounts(path)[0]
    assert after.disclosed == [Disclosed("patients", FILE), Disclosed("prevalence", FILE)]
    assert (after.studies, after.cohorts) == (before.studies, before.cohorts)
    assert after.count == before.count + 2
    with opened(path) as ledger:
        one_round(ledger, 5, b"a later round")


def test_a_disclosure_moves_the_head(path: Path) -> None:
    """The chain holds it: taking it out again is noticed like any other change."""
    with opened(path) as ledger:
        head = ledger.head()
        ledger.disclose("patients", FILE)
        assert ledger.head() != head
        assert ledger.contains(head)
    with raw(path) as connection:
        connection.execute("UPDATE entries SET content = replace(content, 'patients', 'sequence')")
    with pytest.raises(LedgerError, match="damaged"):
        opened(path)


def test_an_older_program_reads_a_ledger_without_disclosures(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened and written to by this program, a ledger keeps version 1 as long as it holds no newer kind of entry."""
    with opened(path) as ledger:
        one_round(ledger, 5, b"by the newer program")
    assert version_of(path) == 1
    monkeypatch.setattr(entry_file, "VERSION", 1)
    with opened(path) as ledger:
        assert 5 in ledger.accounts.studies[STUDY].released


def test_an_older_program_is_told_to_upgrade(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a disclosure in it, it is of version 2: an older program says so, and not that the file is damaged."""
    with opened(path) as ledger:
        ledger.disclose("patients", FILE)
        one_round(ledger, 5, b"an entry of an old kind after it")
    assert version_of(path) == 2
    monkeypatch.setattr(entry_file, "VERSION", 1)
    for opening in (opened, read_accounts):
        with pytest.raises(LedgerError, match=r"newer version of wardround \(ledger 2, this one knows 1\); upgrade"):
            opening(path)


def test_a_disclosure_that_cannot_be_written_leaves_the_version(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version and entry are one transaction: if the entry is not stored, the file is as old as before."""
    with opened(path) as ledger, monkeypatch.context() as broken:
        broken.setattr(entry_file, "chained", lambda *_: None)  # a hash that the table refuses
        with pytest.raises(LedgerError, match="SQLITE_CONSTRAINT"):
            ledger.disclose("patients", FILE)
    assert version_of(path) == 1
    assert read_accounts(path)[0].disclosed == []


def test_disclosures_survive_an_accepted_restore(path: Path, tmp_path: Path) -> None:
    """What the copy knew of is still shown afterwards; an anchor is kept up as for any other entry."""
    with opened(path, tmp_path / "anchor") as ledger:
        ledger.disclose("patients", FILE)
    accept_restore(path, CAP, DELTA, anchor=tmp_path / "anchor")
    with opened(path, tmp_path / "anchor") as ledger:
        assert ledger.accounts.disclosed == [Disclosed("patients", FILE)]


def test_the_budget_command_shows_it(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Name and file of each, in the JSON and in the lines for people, with the words that say what it means."""
    with opened(path) as ledger:
        ledger.disclose("patients", FILE)
    found = summary(*read_accounts(path), {})
    assert found["disclosed"] == [{"name": "patients", "file": FILE}]
    show(found, str(path))
    assert "disclosed, exact, not covered by epsilon: patients (file sha256 ffffffffffff..)" in capsys.readouterr().out
