"""A server that wants more than the plan, over thirty rounds, and backups of the ledger that come back meanwhile.

The server asks for rounds out of order, again, from other weights, of other plans; it forgets what it has seen of the
ledger, or makes it up; between its requests the hospital's process ends and starts, and its ledger is put back to an
older copy. What was really drawn is counted beside the ledger: each attempt takes fresh randomness exactly once.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.ledger_file import SqliteLedger
from client.site import Site
from common.batching import Dataset
from common.errors import RollbackError
from common.models.network import build_network
from common.privacy.randomness import Randomness
from common.provenance import code_digest
from common.records import Header, Reply, Request, Status
from common.training import state_of
from common.weights import to_bytes
from tests.client.ledger_cases import UNSYNCED
from tests.small import as_sequences, made_up_patients, small_study

ROUNDS, SPARE = 30, 4
STUDY = small_study(training={"rounds": ROUNDS}, privacy={"spare_rounds": SPARE}, model={"hidden": 2, "embedding": 2})
OTHER = small_study(training={"rounds": ROUNDS + 1}, privacy={"spare_rounds": SPARE})
CAP, DELTA = 1.0, 1e-3  # the plan costs the cap
RECORDS = Dataset(as_sequences(made_up_patients(1, 6)))
STARTS = {name: state_of(build_network(STUDY, seed)) for seed, name in enumerate(("one", "another"), 1)}
Head = Literal["newest", "none", "first", "made up"]
Ask = tuple[int, str, Head, str]


@dataclass
class Hospital:
    """A site with its ledger on disk, and what it really did.

    Attributes:
        drawn: (round, attempt) of each fresh source of randomness.
        updates: round -> the different updates that left.
    """

    folder: Path
    anchored: bool
    drawn: list[tuple[int, int]] = field(default_factory=list)
    updates: dict[int, set[bytes]] = field(default_factory=dict)
    heads: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.path = self.folder / "ledger.db"
        self.backup: bytes | None = None
        self.start()

    def start(self) -> None:
        """Open the site as a new process would. Raises RollbackError."""
        ledger = SqliteLedger(self.path, CAP, DELTA, anchor=self.folder / "anchor" if self.anchored else None)
        self.ledger = ledger
        self.site = Site("north", STUDY, RECORDS, ledger, self._randomness)
        self.heads.append(ledger.head())

    def _randomness(self, number: int, attempt: int) -> Randomness:
        self.drawn.append((number, attempt))
        return Randomness()

    def ask(self, number: int, start: str, head: Head, terms: str) -> Reply:
        """One request; the reply is that of an honest ledger, whatever was asked."""
        study = OTHER.digest() if terms == "other plan" else STUDY.digest()
        code = "0" * 64 if terms == "other program" else code_digest()
        sent = {"newest": self.heads[-1], "none": "", "first": self.heads[0], "made up": "f" * 64}[head]
        before = len(self.drawn)
        reply = self.site.train(Request(Header(study, code, number), STARTS[start], sent))
        if reply.update is not None:
            self.updates.setdefault(number, set()).add(to_bytes(reply.update))
        honest = terms == "agreed" and 1 <= number <= ROUNDS and head != "made up"
        assert reply.status is Status.OK or len(self.drawn) == before, "something was drawn for a refusal"
        assert honest or reply.status not in (Status.OK, Status.LOCAL_FAILURE)
        self.heads.append(reply.head)
        return reply

    def end(self) -> None:
        """As a process that is killed between two requests."""
        self.ledger.close()

    def check(self) -> None:
        """What must hold whatever was asked."""
        account = self.ledger.accounts.studies.get(STUDY.digest())
        spent = 0 if account is None else account.steps_taken
        assert set(self.ledger.accounts.studies) <= {STUDY.digest()}
        assert spent == len(self.drawn), "the ledger shows another number of private steps than were taken"
        assert len(self.drawn) == len(set(self.drawn))
        assert spent <= STUDY.plan().priced_steps == ROUNDS + SPARE
        assert all(len(found) == 1 for found in self.updates.values()), "one round was released twice"
        assert len(self.updates) <= ROUNDS
        assert self.ledger.accounts.cohorts["all"].spent <= CAP


def put_back_older(hospital: Hospital, older: bytes) -> None:
    """The ledger of earlier is put in place, the server asks, nothing is trained; then the newest comes back."""
    hospital.end()
    newest = hospital.path.with_name("newest")
    shutil.copy(hospital.path, newest)
    lost = hospital.path.read_bytes() != older
    hospital.path.write_bytes(older)
    drawn, head = len(hospital.drawn), hospital.heads[-1]
    if hospital.anchored and lost:
        with pytest.raises(RollbackError):
            hospital.start()
    else:
        hospital.start()
        for number in range(1, ROUNDS + 1):
            request = Request(Header(STUDY.digest(), code_digest(), number), STARTS["one"], head)
            status = hospital.site.train(request).status
            assert not lost or status is Status.ROLLBACK
            if not lost:
                break
        hospital.end()
    if lost:
        assert len(hospital.drawn) == drawn
        shutil.copy(newest, hospital.path)
        hospital.heads.append(head)
    hospital.start()


ASK = st.tuples(
    st.integers(0, ROUNDS + 1),
    st.sampled_from(("one", "one", "another")),
    st.sampled_from(("newest", "newest", "none", "first", "made up")),
    st.sampled_from(("agreed", "agreed", "agreed", "other plan", "other program")),
)
STORY = st.lists(st.one_of(ASK, ASK, ASK, st.sampled_from(("restart", "back up", "put back"))), max_size=60)


def told(story: list[Ask | str], hospital: Hospital) -> None:
    for event in story:
        if event == "restart":
            hospital.end()
            hospital.start()
        elif event == "back up":
            hospital.backup = hospital.path.read_bytes()
        elif event == "put back":
            if hospital.backup is not None:
                put_back_older(hospital, hospital.backup)
        else:
            assert not isinstance(event, str)
            hospital.ask(*event)
        hospital.check()


@pytest.fixture
def folder() -> Iterator[Path]:
    with TemporaryDirectory(dir=UNSYNCED) as name:
        yield Path(name)


@pytest.mark.parametrize("anchored", [False, True], ids=["heads alone", "with an anchor"])
def test_thirty_rounds_against_a_server_that_tries_everything(anchored: bool, folder: Path) -> None:
    """Each round is asked early, late, twice, from other weights, with forged heads and other plans, across restarts
    and old ledgers; at the end the whole study is asked again: exactly the plan's steps were taken, each update once.
    """
    hospital = Hospital(folder, anchored)
    story: list[Ask | str] = []
    for number in range(1, ROUNDS + 1):
        ahead = (number * 7) % ROUNDS + 1  # another order than the plan's, all rounds once
        story += [
            (ahead, "one", "none", "other plan"),
            (ahead, "one", "made up", "agreed"),
            (ahead, "one", "none" if number % 2 else "newest", "agreed"),
            (ahead, "another", "newest", "agreed"),
            (ahead, "one", "first", "agreed"),
        ]
        story += ["restart"] if number % 5 == 0 else []
        story += ["back up"] if number % 10 == 3 else []
        story += ["put back"] if number % 10 == 8 else []
    told(story, hospital)
    assert len(hospital.drawn) == len(hospital.updates) == ROUNDS
    for start in STARTS:
        for number in range(-1, ROUNDS + 3):
            hospital.ask(number, start, "none", "agreed")
    hospital.check()
    assert len(hospital.drawn) == ROUNDS
    hospital.end()


@pytest.mark.full
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(story=STORY, anchored=st.booleans())
def test_no_order_of_anything_gets_more_than_the_plan(story: list[Ask | str], anchored: bool) -> None:
    """Whatever is asked in whatever order: no step beyond the plan, no second update of a round, no wrong balance."""
    with TemporaryDirectory(dir=UNSYNCED) as name:
        hospital = Hospital(Path(name), anchored)
        told(story, hospital)
        hospital.end()


def test_a_ledger_and_anchor_that_are_put_back_together_need_the_servers_memory(folder: Path) -> None:
    """The limit of all this: then only an honest server's head says ROLLBACK, and a server that sends none trains."""
    hospital = Hospital(folder, anchored=True)
    hospital.ask(1, "one", "newest", "agreed")
    hospital.end()
    old = {name: (folder / name).read_bytes() for name in ("ledger.db", "anchor")}
    hospital.start()
    hospital.ask(2, "one", "newest", "agreed")
    newest = hospital.heads[-1]
    hospital.end()
    for name, content in old.items():
        (folder / name).write_bytes(content)
    hospital.start()
    header = Header(STUDY.digest(), code_digest(), 2)
    assert hospital.site.train(Request(header, STARTS["one"], newest)).status is Status.ROLLBACK
    assert hospital.site.train(Request(header, STARTS["another"], "")).status is Status.OK
    hospital.end()
