"""What earlier programs left on disk opens; what a later one wrote is refused, with both versions and the remedy.

`v1` holds files of the first commits that had each format; `python -m tests.upgrades.make` wrote them.
"""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import yaml

from client.anchor import Anchor
from client.commands.budget import summary
from client.enrolment import Enrolment
from client.ledger import Attempt
from client.ledger_file import SqliteLedger, read_accounts
from client.site_file import load_site_file
from client.state import ENROLMENT, StateFolder
from common.errors import ConfigurationError, WardroundError
from common.privacy.plan import Plan
from server import progress
from server.checkpoint import load, save
from server.folder import open_folder

V1 = Path(__file__).resolve().parent / "v1"
STUDY, WEIGHTS = "5" * 64, "a" * 64
PLAN = Plan(0.1, 4.0, 2.0, 1e-5, 10, 3)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy, with the modes that git does not keep."""
    shutil.copytree(V1, tmp_path / "v1")
    for path in (tmp_path / "v1").rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    return tmp_path / "v1"


def opened(old: Path) -> SqliteLedger:
    return SqliteLedger(old / "ledger.db", 3.0, 1e-5, anchor=old / "anchor.json")


def test_the_first_ledger_opens_with_all_that_it_holds(old: Path) -> None:
    """Plan, price, steps, releases and patients are those that were written; spent stays spent."""
    found = summary(*read_accounts(old / "ledger.db"), {})
    (study,), (cohort,) = found["studies"], found["cohorts"]
    assert (study["study"], study["steps_taken"], study["releases"], study["steps_priced"]) == (STUDY, 4, 3, 13)
    assert (cohort["cap"], cohort["plans"]) == (3.0, 1)
    assert cohort["charged"] == study["epsilon"] > 0
    with opened(old) as ledger:
        assert ledger.admit(STUDY, PLAN) == study["epsilon"]
        assert ledger.attempt(STUDY, 3, 1, WEIGHTS) == b"update 3"


def test_the_first_ledger_goes_on(old: Path) -> None:
    """An attempt that was open is a spent one; rounds go on after it, its anchor with them, and it opens again."""
    with opened(old) as ledger:
        ledger.open_cohort("all", [1, 2, 3, 4])
        again = ledger.attempt(STUDY, 4, 1, WEIGHTS)
        assert isinstance(again, Attempt)
        assert again.number == 2
        ledger.release(again, b"update 4")
        head = ledger.head()
    anchor = Anchor.read(old / "anchor.json")
    assert anchor is not None
    assert anchor.head == head
    with opened(old) as ledger:
        assert ledger.attempt(STUDY, 4, 1, WEIGHTS) == b"update 4"


def test_the_first_state_folder_opens(old: Path) -> None:
    """Version, node number and the pinned yes are read."""
    state = StateFolder(old / "state")
    assert state.read_json("node.json") == {"node": 7, "server": "localhost:8643"}
    agreed = Enrolment.read(state)
    assert agreed is not None
    assert (agreed.study, agreed.site, agreed.declared_patients) == (STUDY, "north", 80)


def test_a_yes_that_did_not_pin_the_records_is_asked_for_again(old: Path) -> None:
    """The first program did not pin whose records train: nothing is trained under its yes, and enrolling mends it."""
    (old / "site.yaml").write_text(
        yaml.safe_dump(
            {
                "version": 1,
                "site": "north",
                "study": "study.yaml",
                "records": "records",
                "policy": {"max_epsilon": 3.0, "delta": 1e-5},
                "server": {"address": "localhost:1", "plaintext": True},
                "state": "state",
            }
        )
    )
    site, agreed = load_site_file(old / "site.yaml"), Enrolment.read(StateFolder(old / "state"))
    assert agreed is not None
    same = agreed.model_copy(update={"policy": site.policy.digest()})
    with pytest.raises(
        ConfigurationError, match=r"on 2026-11-24T12:00:00\S* it was not pinned; run `wardround client enrol`"
    ):
        same.require_site(site)


def test_the_first_servers_folder_opens(old: Path) -> None:
    """Terms and study as pinned, checkpoint and lines; what is saved from it is the same checkpoint again."""
    folder = open_folder(old / "server")
    study = folder.study()
    found = load(folder.checkpoint, study.digest())
    assert (found.round_number, found.optimizer.step, found.heads) == (2, 2, {"north": "b" * 64})
    assert np.array_equal(found.weights["a"], np.arange(6, dtype=np.float32).reshape(2, 3))
    assert found.optimizer.first["a"].dtype == np.float64
    assert [line["round"] for line in progress.read(folder.metrics, 2)] == [1, 2]
    assert folder.roster() == {}
    save(folder.checkpoint, found, study.digest())
    again = load(folder.checkpoint, study.digest())
    assert (again.round_number, again.heads) == (2, found.heads)
    assert np.array_equal(again.optimizer.second["b"], found.optimizer.second["b"])


def newer_ledger(old: Path) -> None:
    with sqlite3.connect(old / "ledger.db") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()


def newer_json(name: str) -> Callable[[Path], None]:
    def change(old: Path) -> None:
        (old / name).write_text(json.dumps(json.loads((old / name).read_text()) | {"version": 99}))

    return change


def newer_yaml(name: str) -> Callable[[Path], None]:
    def change(old: Path) -> None:
        (old / name).write_text((old / name).read_text().replace("version: 1", "version: 99", 1))

    return change


def newer_state(old: Path) -> None:
    (old / "state" / "version").write_text("99\n")


def newer_checkpoint(old: Path) -> None:
    path = old / "server" / "state" / "checkpoint.safetensors"
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata, arrays = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (its own type)
    path.write_bytes(safetensors.numpy.save(arrays, metadata | {"wardround-checkpoint": "99"}))


def open_server(old: Path) -> None:
    folder = open_folder(old / "server")
    load(folder.checkpoint, folder.study().digest())
    folder.roster()


NEWER: dict[str, tuple[Callable[[Path], None], Callable[[Path], object]]] = {
    "ledger": (newer_ledger, opened),
    "ledger, read": (newer_ledger, lambda old: read_accounts(old / "ledger.db")),
    "anchor": (newer_json("anchor.json"), opened),
    "state folder": (newer_state, lambda old: StateFolder(old / "state")),
    "enrolment": (newer_json(f"state/{ENROLMENT}"), lambda old: Enrolment.read(StateFolder(old / "state"))),
    "checkpoint": (newer_checkpoint, open_server),
    "server.yaml": (newer_yaml("server/server.yaml"), open_server),
    "roster": (newer_yaml("server/roster.yaml"), open_server),
    "study": (newer_yaml("server/study.yaml"), open_server),
}


@pytest.mark.parametrize("name", NEWER)
def test_what_a_newer_program_wrote_is_refused_and_left_alone(name: str, old: Path) -> None:
    """One line: the file, its version, the one that this program reads, and what to do; no byte of it changes."""
    make_newer, open_it = NEWER[name]
    make_newer(old)
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file() and ".lock" not in path.name}
    with pytest.raises(WardroundError) as refused:
        open_it(old)
    line = str(refused.value)
    assert "\n" not in line
    assert str(old) in line
    assert re.search(r"\b99\b", line)
    assert re.search(r"(knows|reads) \d", line)
    assert re.search("upgrade|install the wardround|use the one", line)
    assert {path: path.read_bytes() for path in before} == before
