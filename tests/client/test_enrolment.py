"""Enrolment: everything is looked at, the first fault is one line, and a yes is pinned against later changes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from client.checks import CLOCK_SECONDS
from client.enrolment import Enrolment, enrolled
from client.hospital import Hospital
from client.ledger_file import SqliteLedger
from client.site_file import load_site_file, study_of
from client.state import ENROLMENT, KEY, LEDGER, NODE, PUBLIC, StateFolder
from client.wording import best_guess, terms_in_words
from common.errors import ConfigurationError, LedgerError, WardroundError
from common.keys import fingerprint, load_private, load_public
from common.privacy.accounting import epsilon_of
from common.privacy.plan import Plan
from tests.client.coordinator import Authority
from tests.client.enrolling import Place, command


def test_a_yes_is_pinned(place: Place) -> None:
    """Every check is named, the terms are shown, and the answer is in the state folder, private and complete."""
    said = place.enrol()
    for name in (
        *("state folder", "key", "connection", "certificate", "clock", "version"),
        *("study", "roster", "policy", "budget", "records", "network"),
    ):
        assert f"ok  {name} " in said
    assert "Take part as north on these terms?" in said
    found = enrolled(place.state, load_site_file(place.path))
    assert (found.study, found.site, found.declared_patients) == (place.study.digest(), "north", 80)
    assert (place.state / ENROLMENT).stat().st_mode & 0o077 == 0
    assert not place.server.online.is_set()  # the site is not left online


def test_a_no_changes_nothing(place: Place) -> None:
    """Without a yes nothing is pinned, and no ledger exists."""
    said = place.enrol("n\n")
    assert "Nothing was changed." in said
    assert "status 1" in said
    assert not (place.state / ENROLMENT).exists()
    assert not (place.state / LEDGER).exists()


def test_yes_can_be_said_beforehand(place: Place) -> None:
    """With --yes nobody is asked, and the terms are printed all the same."""
    said = command("enrol", str(place.path), "--yes")
    assert "In words:" in said
    assert "Take part as" not in said
    assert (place.state / ENROLMENT).exists()


def no_key(place: Place) -> None:
    (place.state / KEY).unlink()


def open_state(place: Place) -> None:
    place.state.path.chmod(0o755)


def unknown_name(place: Place) -> None:
    place.rewrite(server={"address": "nowhere.invalid:8443", "ca": "ca/ca.crt"})


def other_authority(place: Place) -> None:
    Authority(place.folder / "ca")


def fast_clock(place: Place) -> None:
    place.server.clock_off = CLOCK_SECONDS + 10


def other_wire(place: Place) -> None:
    place.server.health["wire"] = 2


def other_code(place: Place) -> None:
    place.server.health |= {"code": "0" * 64, "wardround": "9.9"}


def other_study(place: Place) -> None:
    place.rewrite_study(quorum=2)


def not_in_study(place: Place) -> None:
    place.rewrite_study(sites={"east": {"declared_patients": 50}})


def not_on_roster(place: Place) -> None:
    place.server.roster.clear()


def strict_policy(place: Place) -> None:
    place.rewrite(policy={"max_epsilon": 1.0, "delta": 1e-5})


def spent(place: Place) -> None:
    with SqliteLedger(place.state / LEDGER, 3.0, 1e-5) as ledger:
        ledger.admit("e" * 64, replace(place.study.plan(), clip=1.0))


def no_records(place: Place) -> None:
    place.rewrite(records="nowhere")


def few_patients(place: Place) -> None:
    place.rewrite(policy={"max_epsilon": 3.0, "delta": 1e-5, "min_patients": 81})


def no_optouts(place: Place) -> None:
    place.rewrite(exclude="optouts.csv")


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (no_key, "key: no such file"),
        (open_state, "mode 0755 lets others in; run chmod 700"),
        (unknown_name, "nowhere.invalid: name look-up failed"),
        (other_authority, "does not come from the authority"),
        (fast_clock, r"clock is 1[23]\d s behind the server's, at most 120 s are allowed; set it by NTP"),
        (other_wire, r"the server runs wardround 0\.1\.0 \(wire 2, .*install the very release"),
        (other_code, r"the server runs wardround 9\.9 \(wire 1, code 000000000000\.\."),
        (other_study, "the server runs .* ask the coordinator for the study file"),
        (not_in_study, "has no site `north`, only east"),
        (not_on_roster, "not on the roster"),
        (strict_policy, r"asks for epsilon 3\.0, this site's policy says max_epsilon: 1\.0"),
        (spent, "exceeds the cohort's cap 3.0; take a smaller epsilon"),
        (no_records, r"nowhere.*: no \*\.parquet file"),
        (few_patients, "80 patients, this site's policy says min_patients: 81"),
        (no_optouts, r"optouts\.csv: no such file; without it nobody knows who opted out"),
    ],
)
def test_whatever_does_not_hold_is_one_line(place: Place, spoil: Callable[[Place], None], expected: str) -> None:
    """Each fault ends enrolment with one line that names it and the remedy, and pins nothing."""
    spoil(place)
    with pytest.raises(WardroundError, match=expected):
        place.enrol()
    assert not (place.state / ENROLMENT).exists()


def test_it_is_refused_while_the_client_runs(place: Place) -> None:
    """Whoever has the state folder has it alone."""
    with place.state.lock(), pytest.raises(ConfigurationError, match="in use by another process"):
        place.enrol()


def changed_study(place: Place) -> None:
    place.rewrite_study(task={"name": "diagnosis", "prevalence": 0.2})


def changed_declaration(place: Place) -> None:
    place.rewrite_study(sites={"north": {"declared_patients": 90}, "east": {"declared_patients": 50}})


def changed_policy(place: Place) -> None:
    place.rewrite(policy={"max_epsilon": 50.0, "delta": 1e-5})


def changed_authority(place: Place) -> None:
    Authority(place.folder / "ca")


def changed_records(place: Place) -> None:
    place.rewrite(records="elsewhere")


def changed_splits(place: Place) -> None:
    place.rewrite(splits=["train", "tuning"])


def new_optouts(place: Place) -> None:
    place.rewrite(exclude="optouts.csv")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (changed_study, r"enrolled on .* were .*; run `wardround client enrol`"),
        (changed_declaration, "declares 90 patients for north, agreed were 80"),
        (changed_policy, "the policy has changed since"),
        (changed_authority, "another certificate authority than the one enrolled with"),
        (changed_records, r"`records` is .*elsewhere, on .* it was .*; run `wardround client enrol`"),
        (changed_splits, "`splits` is .*tuning.*; run `wardround client enrol`"),
        (new_optouts, r"`exclude` is .*optouts\.csv, on .* it was None; run `wardround client enrol`"),
    ],
)
def test_what_changes_after_the_yes_is_refused(place: Place, change: Callable[[Place], None], expected: str) -> None:
    """Other terms, another published size, another policy and another authority need another yes."""
    place.enrol()
    change(place)
    site = load_site_file(place.path)
    with pytest.raises(ConfigurationError, match=expected):
        enrolled(place.state, site).require_study(site, study_of(site))


def test_what_may_change_does(place: Place) -> None:
    """Another hospital that joins, other layout, a renewed certificate and a moved file change nothing."""
    place.enrol()
    place.rewrite_study(sites={name: {"declared_patients": 80} for name in ("north", "south")})
    place.rewrite(device="auto", log_level="debug")
    site = load_site_file(place.path)
    enrolled(place.state, site).require_study(site, study_of(site))


def test_a_second_enrolment_says_what_is_different(place: Place) -> None:
    """Whoever is asked again sees what has changed since the last yes."""
    place.enrol()
    place.rewrite(policy={"max_epsilon": 3.0, "delta": 1e-5, "min_patients": 20})
    assert "Different since then: this site's policy." in place.enrol()
    assert "Different since then: nothing." in place.enrol()


def gone(ledger: Path) -> None:
    ledger.unlink()


def emptied(ledger: Path) -> None:
    gone(ledger)
    ledger.touch(mode=0o600)


@pytest.mark.parametrize("lose", [gone, emptied])
def test_a_ledger_that_is_gone_is_missed(place: Place, lose: Callable[[Path], None]) -> None:
    """Enrolling makes the ledger; without it, or with an empty file, the site does not open until it is accepted."""
    place.enrol()
    Hospital.open(place.path)
    lose(place.state / LEDGER)
    with pytest.raises(LedgerError, match=r"ledger is gone( or empty)?; restore the newest backup, .*--accept-re"):
        Hospital.open(place.path)
    command("budget", str(place.path), "--accept-restore", "--yes")
    Hospital.open(place.path)


def test_a_new_optout_makes_the_site_outdated(place: Place) -> None:
    """A site opened before a line was added to the file of opt-outs says so, and one opened after it does not."""
    place.rewrite(exclude="optouts.csv")
    (place.folder / "optouts.csv").write_text("subject_id\n")
    place.enrol()
    site = Hospital.open(place.path)
    changed = [site.outdated]
    (place.folder / "optouts.csv").write_text("subject_id\n1\n")
    changed.append(site.outdated)
    assert changed == [False, True]
    assert not Hospital.open(place.path).outdated


def test_a_spoilt_enrolment_is_one_line(place: Place) -> None:
    """A file that was edited by hand is refused, not believed."""
    place.enrol()
    data = json.loads((place.state / ENROLMENT).read_text())
    (place.state / ENROLMENT).write_text(json.dumps(data | {"study": "no digest"}))
    with pytest.raises(ConfigurationError, match=r"enrolment\.json: `study`"):
        Enrolment.read(place.state)


def test_the_terms_say_what_an_ethics_board_asks(place: Place) -> None:
    """Task, price, what it means, who takes part, what leaves, what does not, and what the price does not cover."""
    right = math.ceil(100 * best_guess(place.study.plan()))
    words = " ".join(terms_in_words(place.study, place.site, 1527).split())
    for part in (
        "predicts `diagnosis` with a GRU network of 1,527 weights",
        "epsilon 3 at delta 1e-05 for each patient, for the whole study",
        "north, this hospital, which publishes that it has about 80 patients; east (50)",
        f"can guess that rightly in at most {right} of 100 cases; tossing a coin, in 50",
        "3 rounds of 1 step(s)",
        "Never leaves: records, patient ids, exact counts",
        "Not covered by the price: when this hospital answers",
    ):
        assert part in words


@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.6, 50.0])
def test_the_guess_is_an_upper_bound_and_no_worse_than_epsilons(sigma: float) -> None:
    """At q = 1 the true chance is that of one Gaussian; never below it, never above what epsilon and delta allow."""
    plan = Plan(1.0, sigma, 1.0, 1e-5, 8, 0)
    distance = math.sqrt(8) / sigma
    true = 0.5 * (1 + math.erf(distance / 2 / math.sqrt(2)))
    odds = math.exp(min(epsilon_of(plan), 700))
    assert true <= best_guess(plan) <= min((odds + 1e-5) / (odds + 1), true + 1e-3)
    assert best_guess(Plan(1.0, 0.0, 1.0, 1e-5, 8, 0)) == 1.0


def test_keygen_makes_one_key_and_never_another(place: Place) -> None:
    """The key is private, its public line and fingerprint are printed with what to do; a second call is refused."""
    place.rewrite(state="fresh")
    said = command("keygen", str(place.path))
    folder = StateFolder(place.folder / "fresh")
    key = load_private(folder / KEY)
    line = said.splitlines()[0]
    assert load_public(line).public_numbers() == key.public_key().public_numbers()
    assert (folder / PUBLIC).read_text() == f"{line}\n"
    assert fingerprint(key.public_key()) in said
    assert "coordinator" in said
    before = (folder / KEY).read_bytes()
    with pytest.raises(ConfigurationError, match="exists and is not overwritten"):
        command("keygen", str(place.path))
    assert (folder / KEY).read_bytes() == before


def test_leaving_keeps_ledger_and_key(place: Place) -> None:
    """The server is told, the yes is gone, and what was spent stays written down."""
    place.enrol()
    with SqliteLedger(place.state / LEDGER, 3.0, 1e-5):
        pass
    place.server.online.set()
    assert "Nothing was changed" in command("leave", str(place.path), answer="n\n")
    assert (place.state / ENROLMENT).exists()
    said = command("leave", str(place.path), answer="y\n")
    assert "The server was told." in said
    assert place.server.offline.is_set()
    assert not (place.state / ENROLMENT).exists()
    assert not (place.state / NODE).exists()
    assert (place.state / KEY).exists()
    assert (place.state / LEDGER).exists()
    with pytest.raises(ConfigurationError, match="not enrolled, so there is nothing to leave"):
        command("leave", str(place.path))


def test_leaving_works_without_the_server(place: Place) -> None:
    """A server that cannot be reached cannot keep anybody in a study."""
    place.enrol()
    place.server.close()
    assert "could not be told" in command("leave", str(place.path), "--yes")
    assert not (place.state / ENROLMENT).exists()
