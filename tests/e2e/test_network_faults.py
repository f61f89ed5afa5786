"""One study over TLS, its server and three hospitals as processes, whose network and clocks fail one after the other.

A story that is told once, in the order of the tests; quorum 2 of 3. Hospitals can be held within a round
(directed_client.py), so that who answers a round, and when, is decided here and not by the machine's load.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from client.checks import begin_ledger, check
from client.ledger_file import read_accounts
from client.network import NetworkError
from client.state import LEDGER, LOG
from common.study import Study, load_study
from server.folder import ServerFolder
from tests.client.hospitals import with_key, write_site
from tests.e2e.deployment import ROOT, wait_until, write_study
from tests.e2e.failing import Clock, told
from tests.server.processes import Server, make_folder

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(sys.platform != "linux", reason="puts a process's clock off"),
]

DECLARED = {"north": 80, "east": 50, "south": 30}
ROUNDS, DEADLINE, AWAY = 300, 45.0, 30.0
AHEAD = 5  # rounds: all that are to be held are told before the first of them gets there
LONG = 600.0
DIRECTED = str(ROOT / "tests" / "e2e" / "directed_client.py")


@dataclass
class Hospital:
    """A hospital's folder and its client; `hold` in the folder stops its rounds."""

    folder: Path
    file: Path
    environment: dict[str, str]
    process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **self.environment}
        with (self.folder / "said.txt").open("a") as said:
            command = [sys.executable, DIRECTED, str(self.file), str(self.folder)]
            self.process = subprocess.Popen(command, env=environment, stdout=said, stderr=said, text=True)

    def end(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(LONG)

    def hold(self, number: int) -> None:
        """From this round on, stop before patients are drawn."""
        fresh = self.folder / "hold.new"
        fresh.write_text(str(number))
        fresh.replace(self.folder / "hold")

    def go(self) -> None:
        (self.folder / "hold").unlink()

    def attempts(self, number: int) -> int:
        """How many attempts at a round it has begun."""
        return len(list(self.folder.glob(f"training-{number}-?")))

    @property
    def log(self) -> str:
        return (self.folder / "state" / LOG).read_text()


@dataclass
class Story:
    """The study, its server's process and its hospitals."""

    study: Study
    folder: ServerFolder
    server: Server
    clock: Clock
    hospitals: dict[str, Hospital] = field(default_factory=dict)

    def lines(self) -> list[dict[str, Any]]:
        """Whole lines of metrics.jsonl so far."""
        text = self.folder.metrics.read_text() if self.folder.metrics.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    @property
    def done(self) -> int:
        return max((line["round"] for line in self.lines() if line["counted"]), default=0)

    def line(self, number: int, *, counted: bool = True) -> dict[str, Any]:
        """The line of a round, once it is there."""

        def found() -> list[dict[str, Any]]:
            return [one for one in self.lines() if one["round"] == number and one["counted"] is counted]

        wait_until(lambda: bool(found()), f"round {number}", LONG)
        return found()[-1]

    def hold(self, *sites: str) -> int:
        """Hold these sites; the round that they are held in, once each of them is."""
        number = self.done + AHEAD
        for site in sites:
            self.hospitals[site].hold(number)
        wait_until(lambda: all(self.hospitals[site].attempts(number) for site in sites), f"{sites} held", LONG)
        return number

    def whole(self, after: int) -> dict[str, Any]:
        """The first round after `after` that all sites were in."""

        def found() -> list[dict[str, Any]]:
            return [one for one in self.lines() if one["round"] > after and len(one["sites"]) == len(DECLARED)]

        wait_until(lambda: bool(found()), f"a round of all sites after {after}", LONG)
        return found()[0]


@pytest.fixture(scope="module")
def story(cohort: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    root = tmp_path_factory.mktemp("network")
    clock = Clock(root)
    study = load_study(
        write_study(
            root / "terms.yaml",
            DECLARED,
            quorum=2,
            model={"hidden": 4, "embedding": 3},
            training={"rounds": ROUNDS},
            privacy={"spare_rounds": 40},
        )
    )
    folder = make_folder(root / "study", study, {}, deadline_seconds=DEADLINE)
    told_story = Story(study, folder, Server(folder), clock)
    try:
        told_story.server.up()
        for site in DECLARED:
            place = root / site
            place.mkdir()
            terms = {"address": told_story.server.address, "ca": str(folder.authority)}
            path = write_site(place, cohort[site], terms, site=site, study=str(folder.path / "study.yaml"))
            opened, state, key = with_key(path)
            folder.admit(site, key.public_key())

            def enrol(opened: Any = opened, state: Any = state) -> bool:
                try:
                    with state.lock():
                        found = check(opened, state, lambda _name, _detail: None)
                        begin_ledger(opened, state, found.patients)
                        found.enrolment.write(state)
                except NetworkError:  # the running server looks at its roster once a second
                    return False
                return True

            wait_until(enrol, f"{site} enrols", LONG)
            hospital = Hospital(place, path, clock.environment if site == "south" else {})
            told_story.hospitals[site] = hospital
            hospital.start()
        told_story.whole(0)
        yield told_story
    finally:
        for process in (told_story.server.process, *(one.process for one in told_story.hospitals.values())):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()


def test_nobody_waits_for_a_site_that_only_enrols(story: Story) -> None:
    """While sites enrolled one by one, no round was begun that only the deadline could end."""
    assert all(line["counted"] for line in story.lines())
    assert all(line["seconds"] < DEADLINE for line in story.lines())


def test_a_slow_site_is_waited_for_until_the_deadline(story: Story) -> None:
    """A site that answers late, but within the deadline, is in the round; it was asked again and trained once."""
    number = story.hold("south")
    time.sleep(DEADLINE / 3)  # what is slow is slow by the server's clock
    story.hospitals["south"].go()
    line = story.line(number)
    assert line["sites"] == sorted(DECLARED)
    assert line["seconds"] >= DEADLINE / 3
    assert story.hospitals["south"].attempts(number) == 1


def test_k_of_n_replies_make_a_round_and_the_late_one_is_dropped(story: Story) -> None:
    """At the deadline 2 of 3 are there: the round counts. The third's reply, too late, is dropped and moves nothing."""
    number = story.hold("south")
    line = story.line(number)
    assert (line["sites"], line["refused"]) == (["east", "north"], {"south": "no reply"})
    assert line["seconds"] >= DEADLINE
    began = time.monotonic()
    story.hospitals["south"].go()
    again = story.whole(number)
    told("site held beyond the deadline; let go, to its next round", began)
    assert story.line(number) == line
    assert again["round"] > number


@pytest.mark.parametrize("held", [("east", "south"), ("east", "north", "south")], ids=["K-1 replies", "no reply"])
def test_too_few_replies_pause_the_study_and_cost_nothing(held: tuple[str, ...], story: Story) -> None:
    """At the deadline fewer than the quorum are there: the round is asked for again, and nobody trains it twice."""
    number = story.hold(*held)
    line = story.line(number, counted=False)
    assert len(line["sites"]) == len(DECLARED) - len(held)
    assert set(line["refused"].values()) == {"no reply"}
    began = time.monotonic()
    for site in held:
        story.hospitals[site].go()
    again = story.line(number)
    told(f"{len(line['sites'])} of 3 replies at the deadline, quorum 2; sites let go, to the round", began)
    assert len(again["sites"]) >= 2
    assert all(story.hospitals[site].attempts(number) == 1 for site in DECLARED)


def test_a_site_that_is_away_for_rounds_comes_back(story: Story) -> None:
    """Ended for several rounds: after one deadline nobody waits for it; started again, it is in the rounds again."""
    south = story.hospitals["south"]
    assert south.end() == 0
    left = story.done
    wait_until(lambda: story.done >= left + 5, "five rounds without it", LONG)
    missed = [line for line in story.lines() if line["round"] > left + 1][1:4]
    assert all(line["sites"] == ["east", "north"] and line["seconds"] < DEADLINE for line in missed)
    began = time.monotonic()
    south.start()
    story.whole(left + 1)
    told("site away for five rounds and more; from the start of its client to its first round", began)


def test_a_server_that_was_away_finds_its_hospitals_again(story: Story) -> None:
    """Ended, away for 30 s, started with `--resume`: every hospital is back by itself; no round is trained twice."""
    assert story.server.end() == 0
    number = story.done + 1
    time.sleep(AWAY)
    began = time.monotonic()
    story.server = Server(story.folder, ("--resume",))
    story.whole(number)
    told("server away for 30 s; from its start to a round of all three", began)
    assert all(one.process is not None and one.process.poll() is None for one in story.hospitals.values())
    assert all("refuses connections" in one.log for one in story.hospitals.values())
    assert story.line(number)["counted"]


@pytest.mark.parametrize("off", [3600, -3600], ids=["ahead", "behind"])
def test_a_hospital_whose_clock_is_off_is_turned_away_and_told(off: int, story: Story) -> None:
    """An hour: the others go on, the site says that its clock may be the reason; set right, it is back by itself."""
    south, known = story.hospitals["south"], len(story.hospitals["south"].log)
    story.clock.set(off)
    wait_until(lambda: "this machine's clock" in south.log[known:], "a line about the clock", LONG)
    number = story.done
    wait_until(lambda: story.done >= number + 3, "rounds without it", LONG)
    began = time.monotonic()
    story.clock.set(0)
    story.whole(story.done)
    told(f"site's clock {off:+d} s; once right, to its next round", began)


def test_a_clock_beyond_the_certificate_is_told(story: Story) -> None:
    """Years ahead, a new connection finds the certificate expired, and says to look at the clock."""
    south, known = story.hospitals["south"], len(story.hospitals["south"].log)
    story.clock.set(20 * 365 * 86400)
    wait_until(lambda: "its certificate has expired; check this machine's clock" in south.log[known:], "a line", LONG)
    began = time.monotonic()
    story.clock.set(0)
    story.whole(story.done)
    told("site's clock years ahead; once right, to its next round", began)


def test_nothing_was_lost_or_charged_twice(story: Story) -> None:
    """Each ledger shows a step for each attempt and no more, no round twice, and what the server took is in it."""
    for hospital in story.hospitals.values():
        assert hospital.end() == 0
        assert "Traceback" not in (hospital.folder / "said.txt").read_text()
    assert story.server.end() == 0
    assert "Traceback" not in story.server.output.read_text()
    for site, hospital in story.hospitals.items():
        accounts, _ = read_accounts(hospital.folder / "state" / LEDGER)
        account = accounts.studies[story.study.digest()]
        begun = len(list(hospital.folder.glob("training-*-?")))
        taken = {line["round"] for line in story.lines() if site in line["sites"]}
        assert account.steps_taken == begun
        assert len(account.released) <= begun
        assert taken <= set(account.released)
