"""A study in which one site's client is killed at a chosen write of its ledger: all of them, one after the other.

    python -m tests.e2e.faults.every_write [--rounds 4] [--every 1]

Two hospitals, each a process of its own with the durable ledger (SQLite in a file, its anchor in another), real
randomness and a real round (`client.hospital`), and the server's loop (`server.rounds`, `server.strategy`) over a grid
that asks a site again when it has come back, as the deployed one does. What is left out is the network, which is why a
study takes a second: the same deaths over TLS, fewer of them, are in kill_everywhere.py.

A write is a statement that changes the ledger's file, or a step of putting its anchor in place (sync, rename); the
client dies once before and once after each. The hook that does it stands here: SQLite is opened by the constructor's
`connect`, and the calls of the operating system are exchanged in the client's process, after the fork.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import signal
import sqlite3
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray

from client.accounts import Account
from client.entries import Released
from client.entry_file import EntryFile, read_entries
from client.hospital import Hospital
from client.ledger_file import SqliteLedger, read_accounts
from client.site import Site
from common.batching import Dataset
from common.models.network import build_network
from common.privacy.accounting import best_order, epsilon_of
from common.privacy.randomness import Randomness
from common.provenance import code_digest
from common.records import Reply, Status, reply_from_message
from common.study import Study
from common.training import local_optimizer, state_of
from common.weights import digest_of, to_bytes
from server.participation import QuorumError
from server.rounds import run
from server.strategy import FederatedAveraging
from simulations.local_grid import LocalGrid
from tests.client.ledger_cases import UNSYNCED
from tests.small import SITE_NODES, as_sequences, made_up_patients, small_study

ROUNDS = 4
KILLED, OTHER = "north", "east"
CAP, DELTA = 1.0, 1e-3  # small_study's plan fits exactly
WRITING = ("journal_mode", "user_version =", "wal_checkpoint")  # the PRAGMAs that change a file; others ask, or set up
Tick = Callable[[str], None]
_FORK = multiprocessing.get_context("fork")  # a spawned process would import torch for three seconds at every point


def study_of(rounds: int, spares: int) -> Study:
    """The small study with so many rounds and spare steps; what a fork can take over is done here, once."""
    study = small_study(training={"rounds": rounds}, privacy={"spare_rounds": spares})
    epsilon_of(study.plan())
    best_order(CAP, DELTA)
    code_digest()
    local_optimizer(study.training.recipe, build_network(study), 0.0)  # torch imports its compiler for it
    return study


# The client's process.


class Noted(Randomness):
    """Real randomness that writes down, before a patient is drawn, of which attempt: what was really trained."""

    def __init__(self, notes: Path, round_number: int, attempt: int) -> None:
        super().__init__()
        self._notes, self._what = notes, [round_number, attempt]

    def poisson_sample(self, patients: int, sampling_rate: float) -> NDArray[np.int64]:
        """Who joins."""
        with self._notes.open("a") as file:
            file.write(json.dumps(self._what) + "\n")
        return super().poisson_sample(patients, sampling_rate)


def watched(tick: Tick) -> Callable[..., sqlite3.Connection]:
    """`sqlite3.connect`, with `tick` before and after each statement that may change the file."""

    class Watched(sqlite3.Connection):
        def execute(self, statement: str, *arguments: Any) -> sqlite3.Cursor:
            word = statement.strip().partition(" VALUES")[0].partition(" WHERE")[0].partition("(")[0]
            if word.startswith(("SELECT", "PRAGMA")) and not any(pragma in word for pragma in WRITING):
                return super().execute(statement, *arguments)
            tick(f"before {word}")
            done = super().execute(statement, *arguments)
            tick(f"after {word}")
            return done

        def executescript(self, script: str) -> sqlite3.Cursor:
            tick("before the tables")
            done = super().executescript(script)
            tick("after the tables")
            return done

    return partial(sqlite3.connect, factory=Watched)


def watch_files(tick: Tick) -> None:
    """Exchange, in this process, what `client/durable.py` calls: `tick` before and after."""
    sync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        tick("before fsync")
        sync(descriptor)
        tick("after fsync")

    def replaced(self: Path, target: Path) -> Path:
        tick("before rename")
        found = replace(self, target)
        tick("after rename")
        return found

    os.fsync, Path.replace = synced, replaced  # type: ignore[method-assign,assignment]  # the process ends with it


def name_entries(tick: Tick) -> Tick:
    """`tick` with the kind of the entry that is being written; "opening" before the first."""
    kind, append = "opening", EntryFile.append

    def appended(self: EntryFile, entry: Any, *arguments: Any) -> None:
        nonlocal kind
        kind = type(entry).__name__
        append(self, entry, *arguments)

    EntryFile.append = appended  # type: ignore[method-assign]  # the process ends with it
    return lambda what: tick(f"{kind}: {what}")


def take_part(pipe: Connection, folder: Path, site: str, study: Study, tick: Tick) -> None:
    """What `wardround client run`'s training process does: open, then answer messages until it is killed."""
    torch.set_num_threads(1)
    TaskIdentity.run_id, TaskIdentity.task_id = 1, 0
    tick = name_entries(tick)
    watch_files(tick)
    records = as_sequences(made_up_patients(len(site), 30))
    with SqliteLedger(folder / "ledger.db", CAP, DELTA, anchor=folder / "anchor", connect=watched(tick)) as ledger:
        ledger.open_cohort("all", records.patient_id)
    hospital = Hospital(Site(site, study, Dataset(records), ledger, partial(Noted, folder / "trained")))
    while True:
        message, node = pipe.recv()
        TaskIdentity.node_id = node
        pipe.send(hospital.answer(message, node))


def killing(at: int) -> Tick:
    """Kill this process, with signal 9, at the tick with this number."""
    left = at

    def tick(_what: str) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
            threading.Event().wait()  # kernels differ in how soon a process with threads is gone

    return tick


class Client:
    """A site's process, started again whenever it has ended. `first`: the tick of its first life; later ones live."""

    def __init__(self, folder: Path, site: str, study: Study, first: Tick = lambda _what: None) -> None:
        self.folder, self._site, self._study, self._tick = folder, site, study, first
        self.deaths: list[int] = []
        folder.mkdir()
        self.start()

    def start(self) -> None:
        """A new process."""
        self._pipe, theirs = _FORK.Pipe()
        arguments = (theirs, self.folder, self._site, self._study, self._tick)
        self._process = _FORK.Process(target=take_part, args=arguments, daemon=True)
        self._process.start()
        self._tick = lambda _what: None
        theirs.close()

    def ask(self, message: Message, node: int) -> Message | None:
        """Its reply; None if it died first."""
        try:
            self._pipe.send((message, node))
            if self._pipe in wait([self._pipe, self._process.sentinel]):
                answer: Message = self._pipe.recv()
                return answer
        except (EOFError, OSError):
            pass
        self._process.join()
        self.deaths.append(self._process.exitcode or 0)
        return None

    def close(self) -> None:
        """End the process, as every one here ends."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


# The coordinator.


@dataclass
class Seen:
    """What the coordinator knows of a finished or stopped study."""

    stopped: str | None = None  # why, if it was
    asked: dict[int, str] = field(default_factory=dict)  # round -> digest of the weights sent; the last: the final ones
    got: dict[str, dict[int, str]] = field(default_factory=dict)  # site -> round -> sha256 of each update
    codes: Counter[Status] = field(default_factory=Counter)
    deaths: list[int] = field(default_factory=list)
    at_death: Account | None = None  # the killed site's account, before it was started again


class Grid(LocalGrid):
    """Flower's grid over these processes."""

    def __init__(self, clients: dict[str, Client], study: Study, seen: Seen) -> None:
        super().__init__(_never, ())
        self.roster, self._clients, self._study, self._seen = SITE_NODES, clients, study, seen

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Ask every site; one that died is started again, and asked again."""
        del timeout
        replies = []
        for number, message in enumerate(messages):
            message.metadata.__dict__["_message_id"] = f"{number}"
            node = message.metadata.dst_node_id
            client = self._clients[SITE_NODES[node]]
            while (answer := client.ask(message, node)) is None:
                assert len(client.deaths) < 3, "a client that dies again and again"
                self._seen.at_death = account_of(client.folder, self._study)
                client.start()
            replies.append(answer)
            self._note(SITE_NODES[node], reply_from_message(answer))
        return replies

    def _note(self, site: str, reply: Reply) -> None:
        self._seen.codes[reply.status] += 1
        if reply.update is not None:
            update = hashlib.sha256(to_bytes(reply.update)).hexdigest()
            got = self._seen.got.setdefault(site, {})
            assert got.setdefault(reply.header.round_number, update) == update, "one round, two updates"


def _never(_site: str) -> Site:
    raise AssertionError("every site has a process of its own")


def account_of(folder: Path, study: Study) -> Account | None:
    """The study's account in a ledger that nobody holds; None if the file does not say anything of it yet."""
    path = folder / "ledger.db"
    if not path.exists() or path.stat().st_size == 0:
        return None
    return read_accounts(path)[0].studies.get(study.digest())


@contextmanager
def folder_for_a_study() -> Iterator[Path]:
    """In memory: what dies is a process, not the machine, and a sync of a disk would take most of the time."""
    with tempfile.TemporaryDirectory(dir=UNSYNCED) as made:
        yield Path(made)


def carry_out(folder: Path, study: Study, first: Tick) -> Seen:
    """The whole study, with `first` called at every write of the first life of the site that is to die."""
    seen = Seen()
    clients = {site: Client(folder / site, site, study, first if site == KILLED else _quiet) for site in study.sites}
    strategy = FederatedAveraging(study, state_of(build_network(study, 9)), lambda: SITE_NODES)
    try:
        with Grid(clients, study, seen) as grid:

            def noted(number: int) -> None:
                seen.asked[number] = digest_of(strategy.weights)

            noted(1)
            run(
                grid,
                strategy,
                rounds=study.training.rounds,
                on_round=lambda record: noted(record.round_number + 1),
            )
    except QuorumError as error:
        seen.stopped = str(error)
    finally:
        for client in clients.values():
            client.close()
    seen.deaths = clients[KILLED].deaths
    return seen


def _quiet(_what: str) -> None:
    """Live on."""


def writes(study: Study) -> list[str]:
    """The killed site's writes in an undisturbed study: kind of entry, then before or after which statement."""
    with folder_for_a_study() as folder:
        notes = folder / "writes"

        def tick(what: str) -> None:
            with notes.open("a") as file:
                file.write(what + "\n")

        seen = carry_out(folder, study, tick)
        assert (seen.stopped, seen.deaths) == (None, [])
        return notes.read_text().splitlines()


def costs(labels: list[str]) -> list[int]:
    """Spare steps that a death at each write must cost: 1 from the commit of a mark to the commit of its release."""
    found, under_way = [], 0
    for label in labels:
        if label == "Attempted: after COMMIT":
            under_way = 1
        elif label == "Released: after COMMIT":
            under_way = 0
        found.append(under_way)
    return found


def die_at(point: int, study: Study, cost: int) -> Seen:
    """One study with a death at one write; raises AssertionError where an invariant does not hold."""
    with folder_for_a_study() as folder:
        seen = carry_out(folder, study, killing(point))
        check(folder, study, seen, cost)
        return seen


def check(folder: Path, study: Study, seen: Seen, cost: int) -> None:
    """What must hold after a study in which one client was killed once.

    Raises AssertionError.
    """
    rounds, spares = study.training.rounds, study.privacy.spare_rounds
    assert seen.deaths == [-signal.SIGKILL]
    assert set(seen.codes) <= {Status.OK, Status.BUDGET}
    accounts = {site: account_of(folder / site, study) for site in study.sites}
    if cost > spares:  # it stops with a code, and one round is missing
        assert seen.stopped is not None
        assert f"{KILLED}: {Status.BUDGET}" in seen.stopped
        assert len(seen.asked) == rounds
    else:
        assert seen.stopped is None
        assert seen.codes == {Status.OK: 2 * rounds}
        assert sorted(seen.got[KILLED]) == sorted(seen.got[OTHER]) == list(range(1, rounds + 1))
    for site, account in accounts.items():
        assert account is not None
        # No ledger shows less than was released, and all say the same of each round's weights as the server.
        assert account.released.keys() >= seen.got[site].keys()
        assert all(release.weights_digest == seen.asked[r] for r, release in account.released.items())
        assert seen.got[site].items() <= bytes_released(folder / site).items()
        # What was trained was marked, each attempt once: fresh noise, and no step that the ledger does not count.
        trained = trained_by(folder / site)
        assert len(trained) == len(set(trained))
        assert all(attempt <= account.attempts[number] for number, attempt in trained)
        assert sum(account.attempts.values()) == account.steps_taken
        # Spare steps as stated; without one, the last round has no step left.
        died = site == KILLED and cost == 1
        assert account.steps_taken == min(rounds + died, rounds + spares)
        assert account.spares_left == spares - min(died, spares)
    before = seen.at_death
    if before is not None:  # a round that was stored when the client died was not marked again
        now = accounts[KILLED]
        assert now is not None
        assert all(now.attempts[number] == before.attempts[number] for number in before.released)
        assert all(now.released[number] == release for number, release in before.released.items())


def bytes_released(folder: Path) -> dict[int, str]:
    """Round -> sha256 of the update that the ledger says was released."""
    entries = read_entries(folder / "ledger.db").entries
    return {entry.round_number: entry.attachment for entry in entries if isinstance(entry, Released)}


def trained_by(folder: Path) -> list[tuple[int, int]]:
    """(round, attempt) of every training that began."""
    notes = folder / "trained"
    return [tuple(json.loads(line)) for line in notes.read_text().splitlines()] if notes.exists() else []


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--every", type=int, default=1, help="only each so-many-th write")
    arguments = parser.parse_args()
    began, labels = time.monotonic(), writes(study_of(arguments.rounds, 1))
    points = list(enumerate(zip(labels, costs(labels), strict=True)))[:: arguments.every]
    studies = {spares: study_of(arguments.rounds, spares) for spares in (0, 1)}
    stopped = 0
    for done, (point, (label, cost)) in enumerate(points, start=1):
        try:
            assert die_at(point, studies[cost], cost).stopped is None
            if cost:
                stopped += die_at(point, studies[0], cost).stopped is not None
        except AssertionError as error:
            raise AssertionError(f"killed {label} (write {point} of {len(labels)})") from error
        if done % 20 == 0 or done == len(points):
            print(
                f"{done} of {len(points)} writes, studies of {arguments.rounds} rounds: {done} completed with exactly "
                f"the spare steps that the death must cost, {stopped} without them stopped with a code; "
                f"{time.monotonic() - began:.0f} s; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
                flush=True,
            )
    kinds = Counter(label.partition(":")[0] for _, (label, _) in points)
    print("deaths while writing:", ", ".join(f"{kind} {count}" for kind, count in kinds.items()))


if __name__ == "__main__":
    main()
