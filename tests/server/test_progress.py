"""What people see of a run: lines that survive a crash, a moment that grows old, and numbers that follow from them."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from common.privacy.accounting import epsilon_of
from server.commands import app
from server.folder import ServerFolder, create
from server.grid import Presence
from server.progress import FEW, STALE, Now, append, read, read_now, summarise
from server.rounds import RoundRecord
from tests.small import small_study

STUDY = small_study(training={"rounds": 30}, privacy={"sampling_rate": 1.0})


def record(number: int, *sites: str, seconds: float = 1.0, **refused: str) -> RoundRecord:
    return RoundRecord(number, sites, refused, {}, seconds)


def test_lines_come_back_in_order(tmp_path: Path) -> None:
    """Each round asked for is a line: who answered, why others did not, seconds, and whether it counted."""
    path = tmp_path / "metrics.jsonl"
    append(path, record(1, "east", north="BUDGET", seconds=2.5), counted=False)
    append(path, record(1, "east", "north"), counted=True)
    found = read(path)
    assert [{k: v for k, v in line.items() if k != "time"} for line in found] == [
        {"round": 1, "seconds": 2.5, "counted": False, "sites": ["east"], "refused": {"north": "BUDGET"}},
        {"round": 1, "seconds": 1.0, "counted": True, "sites": ["east", "north"], "refused": {}},
    ]
    assert read(tmp_path / "none") == []


def test_a_crash_between_line_and_checkpoint_leaves_no_round_twice(tmp_path: Path) -> None:
    """A counted round stands once, with its last line; one beyond the checkpoint, or cut off, does not stand at all."""
    path = tmp_path / "metrics.jsonl"
    for number, sites in ((1, ("east",)), (2, ("east",)), (2, ("east", "north")), (3, ("north",))):
        append(path, record(number, *sites), counted=True)
    with path.open("a") as file:
        file.write('{"round": 4, "sec')
    assert [(line["round"], line["sites"]) for line in read(path, 2)] == [(1, ["east"]), (2, ["east", "north"])]
    assert [line["round"] for line in read(path)] == [1, 2, 3]


def test_a_line_that_was_cut_off_takes_no_other_with_it(tmp_path: Path) -> None:
    """What a full disk left of a line is ended before the next: a round that counted is never missing from the file."""
    path = tmp_path / "metrics.jsonl"
    append(path, record(1, "east"), counted=True)
    with path.open("a") as file:
        file.write('{"round": 2, "sec')
    for number in (2, 3):
        append(path, record(number, "east"), counted=True)
    assert [line["round"] for line in read(path)] == [1, 2, 3]


def test_epsilon_follows_from_the_rounds_a_site_answered() -> None:
    """The plan's price for as many rounds as the site answered or failed at; a repeated answer costs nothing."""
    lines = [
        {"round": 1, "counted": False, "sites": ["east"], "refused": {"north": "LOCAL_FAILURE"}, "seconds": 1.0},
        {"round": 1, "counted": True, "sites": ["east", "north"], "refused": {}, "seconds": 1.0},
        {"round": 2, "counted": True, "sites": ["east"], "refused": {"north": "no reply"}, "seconds": 3.0},
    ]
    found = {site.site: site for site in summarise(STUDY, 2, lines, None, frozenset({"east"})).sites}
    plan = STUDY.plan()
    assert found["east"].epsilon == epsilon_of(plan, 2)
    assert found["north"].epsilon == epsilon_of(plan, 2)
    assert (found["east"].rounds, found["north"].rounds) == (2, 1)
    assert (found["east"].last_refusal, found["north"].last_refusal) == (None, "no reply (round 2)")
    assert (found["east"].admitted, found["north"].admitted) == (True, False)
    assert (found["east"].online, found["east"].last_seen) == (None, None)


def test_the_guarantee_is_the_whole_plans_also_at_the_start() -> None:
    """Nothing done costs nothing; what is promised is the plan's price, and no line can bring the sum above it."""
    start = summarise(STUDY, 0, [], None, frozenset())
    assert start.guarantee == epsilon_of(STUDY.plan())
    assert {site.epsilon for site in start.sites} == {0.0}
    failing = [{"round": 1, "counted": False, "sites": [], "refused": {"east": "LOCAL_FAILURE"}, "seconds": 0.0}] * 999
    spent = {site.site: site.epsilon for site in summarise(STUDY, 0, failing, None, frozenset()).sites}
    assert spent == {"east": start.guarantee, "north": 0.0}


def test_the_time_left_is_judged_by_the_latest_rounds() -> None:
    """Mean seconds of the latest counted rounds times the rounds to come; unknown before the first."""
    lines = [{"round": n, "counted": True, "sites": [], "refused": {}, "seconds": 100.0} for n in range(1, 6)]
    lines += [{"round": n, "counted": True, "sites": [], "refused": {}, "seconds": 2.0} for n in range(6, 6 + FEW)]
    lines += [{"round": 16, "counted": False, "sites": [], "refused": {}, "seconds": 900.0}]
    status = summarise(STUDY, 15, lines, None, frozenset())
    assert status.seconds_left == pytest.approx(2.0 * 15)
    assert summarise(STUDY, 0, [], None, frozenset()).seconds_left is None
    assert summarise(STUDY, 30, lines, None, frozenset()).seconds_left is None
    assert summarise(STUDY, 30, lines, None, frozenset()).phase == "finished"


def test_the_moment_is_seen_until_it_is_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Phase and connections are read back; an ended server, or one not heard of, is not running."""
    now = Now(tmp_path / "now.json")
    assert read_now(now.path) is None
    now.show("round", 3)
    now.beat({"north": Presence("north", True, "1", 123.0)})
    found = read_now(now.path)
    assert found is not None
    assert (found["phase"], found["round"]) == ("round", 3)
    assert found["sites"] == {"north": {"online": True, "last_seen": 123.0, "contested": False}}
    written = json.loads(now.path.read_text())["time"]
    monkeypatch.setattr(time, "time", lambda: written + STALE + 1)
    assert read_now(now.path) is None
    monkeypatch.undo()
    now.show("stopped", 3)
    assert read_now(now.path) is None


def test_the_moment_is_written_when_someone_comes_or_goes(tmp_path: Path) -> None:
    """A site's coming is on disk at once; an unchanged moment is not written a hundred times a second."""
    now = Now(tmp_path / "now.json")
    now.show("round", 1)
    here = Presence("north", True, "1", 1.0)
    now.beat({"north": here})
    before = now.path.read_bytes()
    now.beat({"north": dataclasses.replace(here, last_seen=2.0)})
    assert now.path.read_bytes() == before
    now.beat({"north": dataclasses.replace(here, online=False)})
    assert now.path.read_bytes() != before


@pytest.fixture
def folder(tmp_path: Path) -> ServerFolder:
    made = create(tmp_path / "study", STUDY, ("hub",))
    append(made.metrics, record(1, "east", north="BUDGET"), counted=True)
    return made


def shown(folder: ServerFolder, *arguments: str) -> str:
    done = CliRunner().invoke(app, ["status", str(folder.path), *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_status_without_a_server_reads_the_folder(folder: ServerFolder) -> None:
    """No port is needed: rounds, sites and budgets stand in files; whoever is not admitted is named so."""
    said = " ".join(shown(folder).split())
    for part in ("study small", "not running", "quorum 2 of 2", "not admitted", "the guarantee is the whole plan's"):
        assert part in said
    data: dict[str, Any] = json.loads(shown(folder, "--json"))
    assert data["phase"] == "not running"
    assert [site["site"] for site in data["sites"]] == ["east", "north"]
    assert data["digest"] == STUDY.digest()


def test_status_is_for_people_or_for_programs(folder: ServerFolder) -> None:
    """--watch and --json exclude each other."""
    done = CliRunner().invoke(app, ["status", str(folder.path), "--watch", "--json"])
    assert "--watch is for people, --json for programs" in str(done.exception)


def test_a_moment_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    """`now.json` is for people who look: a full disk there ends no study."""
    Now(tmp_path / "nowhere" / "now.json").show("round", 1)


NO_OBJECTS = [b"\x80", b"", b"null", b"[]", b'{"time": 1}', b"[" * 100_000, b'{"round": "1", "counted": true}']


@pytest.mark.parametrize("content", NO_OBJECTS)
def test_what_is_no_moment_is_no_server(content: bytes, tmp_path: Path) -> None:
    """A now.json that a power cut or anybody else spoilt is as one that is not there; found by the fuzz."""
    (tmp_path / "now.json").write_bytes(content)
    assert read_now(tmp_path / "now.json") is None


@pytest.mark.parametrize("content", NO_OBJECTS)
def test_what_is_no_line_is_left_out(content: bytes, tmp_path: Path) -> None:
    """The lines around it count; found by the fuzz."""
    line = {"round": 1, "seconds": 0.5, "counted": True, "sites": ["north"], "refused": {}}
    good = json.dumps(line).encode() + b"\n"
    (tmp_path / "metrics.jsonl").write_bytes(good + content + b"\n" + good.replace(b"1", b"2"))
    assert [found["round"] for found in read(tmp_path / "metrics.jsonl")] == [1, 2]
