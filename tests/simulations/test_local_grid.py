"""Virtual hospitals in this process and in others: the same bits, the same errors, nothing left behind.

A process takes seconds to import torch and Flower, so that the tests share one grid with processes where they can.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from numpy.typing import NDArray

from client.site import Site
from common.errors import DataError, WardroundError
from common.models.network import build_network
from common.privacy.accounting import epsilon_of
from common.provenance import code_digest
from common.records import Header, Request, reply_from_message, request_to_content
from common.training import state_of
from common.weights import Weights
from server.participation import QuorumError
from server.rounds import RoundRecord, run
from server.strategy import FederatedAveraging
from simulations.experiment import one_thread, simulate
from simulations.hospitals import Hospitals
from simulations.local_grid import LocalGrid
from simulations.seeded import SeededRandomness, Silent
from tests.small import small_study

DECLARED = {"north": 80, "east": 50, "south": 30}
RUNS = ("loud", "quiet", "failing", "spare")  # runs over the same three sites, told apart by the name
SITES = [f"{site}-{kind}" for kind in RUNS for site in DECLARED]
STUDY = small_study(sites={name: {"declared_patients": DECLARED[name.split("-")[0]]} for name in SITES})
SECRET = "PATIENT-4711"


class Failing(SeededRandomness):
    """East fails in its second round, with a patient's value in the text."""

    def __init__(self, seed: int, site: str, round_number: int, attempt: int) -> None:
        super().__init__(seed, site, round_number, attempt)
        self.fails = site.startswith("east") and round_number == 2

    def bits(self, count: int) -> NDArray[np.uint64]:
        """Random words."""
        if self.fails:
            raise ValueError(f"cannot convert {SECRET}")
        return super().bits(count)


KINDS = {"loud": SeededRandomness, "quiet": Silent, "failing": Failing, "spare": SeededRandomness}


def open_site(directories: dict[str, Path], seed: int, name: str) -> Site:
    """The site of the run that its name says."""
    site, kind = name.split("-")
    return Hospitals(STUDY, {name: directories[site]}, seed, KINDS[kind]).open(name)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def here(cohort: dict[str, Path]) -> LocalGrid:
    """All sites in this process."""
    return LocalGrid(partial(open_site, cohort, 7), SITES)


@pytest.fixture(scope="module")
def there(cohort: dict[str, Path]) -> Iterator[LocalGrid]:
    """All sites in this process and two others, which must be gone afterwards."""
    before = set(multiprocessing.active_children())
    with LocalGrid(partial(open_site, cohort, 7), SITES, workers=3) as grid:
        children = [child.pid for child in set(multiprocessing.active_children()) - before]
        assert len(children) == 2
        yield grid
    assert all(gone(pid) for pid in children)


def gone(pid: int | None) -> bool:
    """Ended and collected: a process that nobody waited for is still there."""
    assert pid is not None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def train(grid: LocalGrid, kind: str) -> list[RoundRecord]:
    """A run over the sites of one kind."""
    roster = {node: name for node, name in grid.roster.items() if name.endswith(kind)}
    strategy = FederatedAveraging(STUDY, state_of(build_network(STUDY, 1)), lambda: roster)
    records: list[RoundRecord] = []
    run(grid, strategy, rounds=STUDY.training.rounds, on_round=records.append)
    return records


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def ask(node: int, round_number: int = 1) -> Message:
    weights = state_of(build_network(STUDY, 1))
    content = request_to_content(Request(Header(STUDY.digest(), code_digest(), round_number), weights))
    return Message(content, dst_node_id=node, message_type=MessageType.TRAIN)


@pytest.mark.parametrize("kind", ["loud", "quiet"])
def test_more_processes_give_the_bits_of_one(kind: str, here: LocalGrid, there: LocalGrid) -> None:
    """A seeded run, with noise or without, has the same weights after every round in one process and in three."""
    for one, other in zip(train(here, kind), train(there, kind), strict=True):
        assert same(one.weights, other.weights)
        assert (one.sites, one.refused) == (other.sites, other.refused)
        assert one.sites == (f"east-{kind}", f"north-{kind}", f"south-{kind}")


def test_a_failing_site_misses_its_round_only(here: LocalGrid, there: LocalGrid) -> None:
    """A failure at one site is its code for that round, in any process; it takes part in the next."""
    for grid in (here, there):
        everyone = ("east-failing", "north-failing", "south-failing")
        assert [(record.sites, record.refused) for record in train(grid, "failing")] == [
            (everyone, {}),
            (everyone[1:], {"east-failing": "LOCAL_FAILURE"}),
            (everyone, {}),
        ]


def test_replies_come_in_the_order_of_the_messages(here: LocalGrid, there: LocalGrid) -> None:
    """Each reply is from the node that its message went to and answers that message; other nodes do nothing."""
    for grid in (here, there):
        assert dict(grid.roster) == dict(enumerate(SITES, start=2))
        assert list(grid.get_node_ids()) == list(range(2, 14))
        sent = [ask(node) for node in (13, 11, 2, 12)]
        got = grid.send_and_receive(sent, timeout=0.0)
        assert [reply.metadata.src_node_id for reply in got] == [13, 11, 2, 12]
        assert [r.metadata.reply_to_message_id for r in got] == [m.metadata.message_id for m in sent]
        assert len({m.metadata.message_id for m in sent}) == 4
        assert grid.send_and_receive([]) == []


def test_a_site_lasts_from_round_to_round(here: LocalGrid, there: LocalGrid) -> None:
    """The same request again is answered with the stored bytes: the site and its ledger were not opened anew."""
    for grid in (here, there):
        one, other = (reply_from_message(grid.send_and_receive([ask(11, 2)])[0]) for _ in range(2))
        assert one.status.value == other.status.value
        assert one.update is not None
        assert other.update is not None
        assert same(one.update, other.update)


def test_content_travels_unchanged_between_processes(here: LocalGrid, there: LocalGrid) -> None:
    """A message that is no request is answered with MALFORMED from a worker as from here."""
    for grid in (here, there):
        content = RecordDict({"request": ConfigRecord({"x": SECRET})})
        message = Message(content, dst_node_id=2, message_type=MessageType.TRAIN)
        assert reply_from_message(grid.send_and_receive([message])[0]).status.value == "MALFORMED"


def test_a_seeded_run_can_be_repeated_and_another_seed_is_another_run(cohort: dict[str, Path]) -> None:
    """Equal seeds give equal bits; another seed, or no noise, does not."""
    runs = [
        train(LocalGrid(partial(open_site, cohort, seed), SITES), kind)[-1].weights
        for seed, kind in ((7, "loud"), (7, "loud"), (8, "loud"), (7, "quiet"))
    ]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])
    assert not same(runs[0], runs[3])


@pytest.mark.parametrize("workers", [1, 2])
def test_unusable_records_are_one_line(workers: int, cohort: dict[str, Path], tmp_path: Path) -> None:
    """A site's DataError arrives as DataError with its one line, and no process stays."""
    before = set(multiprocessing.active_children())
    with pytest.raises(DataError) as caught:
        LocalGrid(
            partial(open_site, {**cohort, "east": tmp_path / "nothing"}, 7),
            ["east-loud", "north-loud"],
            workers=workers,
        )
    assert set(multiprocessing.active_children()) == before
    assert str(tmp_path / "nothing") in str(caught.value)
    assert "\n" not in str(caught.value)


_tries: list[str] = []  # of a worker process


def _troubled(directories: dict[str, Path], name: str) -> Site:
    """East's process is killed, as the system does when memory runs out; north's records are unusable at first."""
    if name == "east-loud":
        os.kill(os.getpid(), signal.SIGKILL)
    _tries.append(name)
    if name == "north-loud" and len(_tries) == 1:
        raise DataError("north/data: no *.parquet file")
    return open_site(directories, 7, name)


def test_what_stops_a_worker_is_one_line_and_no_process_stays(cohort: dict[str, Path]) -> None:
    """A worker's DataError arrives as it is, a killed worker as an error with a remedy, and both are collected."""
    before = set(multiprocessing.active_children())
    with LocalGrid(partial(_troubled, cohort), ["south-loud", "north-loud", "east-loud"], workers=3) as grid:
        children = [child.pid for child in set(multiprocessing.active_children()) - before]
        assert len(children) == 2
        with pytest.raises(DataError, match=r"^north/data: no \*\.parquet file$"):
            grid.send_and_receive([ask(node) for node in (2, 3, 4)])
        for _ in range(2):
            with pytest.raises(WardroundError, match=r"^a worker process ended.*use fewer workers$"):
                grid.send_and_receive([ask(node) for node in (2, 3, 4)])
    assert all(gone(pid) for pid in children)
    grid.close()  # again: nothing to do


def test_without_quorum_the_run_stops_with_the_reasons(cohort: dict[str, Path]) -> None:
    """QuorumError passes through the grid and names every site's reason."""
    study = STUDY.model_copy(update={"quorum": 3})
    grid = LocalGrid(partial(open_site, cohort, 7), SITES)
    roster = {node: name for node, name in grid.roster.items() if name.endswith("failing")}
    strategy = FederatedAveraging(study, state_of(build_network(study, 1)), lambda: roster)
    with pytest.raises(QuorumError, match="quorum is 3"):
        run(grid, strategy, rounds=3)


def test_a_failed_attempt_is_in_the_price_so_far(cohort: dict[str, Path]) -> None:
    """A simulation's epsilon by round counts the steps of a round that failed at a site: they stay spent."""
    study = small_study(quorum=1)
    directories = {name: cohort[name] for name in study.sites}
    result = simulate(Hospitals(study, directories, 7, Failing), resamples=5)
    assert [progress.refused for progress in result.history] == [{}, {"east": "LOCAL_FAILURE"}, {}]
    for taken, progress in enumerate(result.history, start=1):
        if progress.auroc is not None:
            assert progress.epsilon == dict.fromkeys(study.sites, epsilon_of(study.plan(), taken))


def test_the_grid_delivers_whole_rounds_only(here: LocalGrid) -> None:
    """The rest of Flower's Grid says what to use instead of pretending."""
    for unused in (here.push_messages, here.pull_messages):
        with pytest.raises(NotImplementedError, match="send_and_receive"):
            unused([])
    with pytest.raises(NotImplementedError, match="send_and_receive"):
        _ = here.run


def test_one_thread_is_for_the_time_of_the_run() -> None:
    """Afterwards torch has the threads it had."""
    torch.set_num_threads(2)
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
