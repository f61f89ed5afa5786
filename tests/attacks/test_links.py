"""Symbolic links in the state folder: whoever could put one there would choose which ledger is charged.

The folder is 0700, so that is this user alone; what is tried is a mistake (a folder that was moved to a larger disk
and linked back, file by file) and somebody who had the folder for a moment.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from client.anchor import Anchor
from client.checks import begin_ledger
from client.enrolment import Enrolment
from client.hospital import Hospital, open_ledger
from client.ledger_file import SqliteLedger, read_accounts
from client.service import serve
from client.state import ENROLMENT, KEY, LEDGER, LEDGER_PLACE, LOCK, LOG, NODE, SPLIT_KEY
from common.errors import WardroundError
from tests.client.hospitals import with_key, write_site, write_study

NAMES = (
    *(KEY, "key.pub", SPLIT_KEY, LEDGER, f"{LEDGER}.lock", f"{LEDGER}-wal", f"{LEDGER}-shm", LOG, ENROLMENT, NODE),
    *(LEDGER_PLACE, LOCK, "version", "flower", "torch", f"{ENROLMENT}.new", f"{NODE}.new", "anything"),
)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The site file of a hospital that has enrolled."""
    study = write_study(tmp_path)
    path = write_site(tmp_path, tmp_path, {"address": "localhost:1", "plaintext": True})
    site, state, _ = with_key(path)
    begin_ledger(site, state, np.array([], np.int64))
    Enrolment.of(site, study, "", "2027-01-01T00:00:00+00:00").write(state)
    return path


@pytest.mark.parametrize("there", [True, False], ids=["to a file", "to nothing"])
@pytest.mark.parametrize("name", NAMES)
def test_a_link_in_the_state_folder_is_refused_by_every_way_in(name: str, there: bool, place: Path) -> None:
    """Connection and training process both end with a line; what the link names is neither made nor changed."""
    inside, outside = place.parent / "state" / name, place.parent / "outside"
    if there and inside.exists():
        inside.rename(outside)
    elif there:
        outside.write_bytes(b"as it was")
    else:
        inside.unlink(missing_ok=True)
    inside.symlink_to(outside)
    before = outside.read_bytes() if there else None
    for opens in (serve, Hospital.open):
        with pytest.raises(WardroundError, match="is a symbolic link"):
            opens(place)
    assert (outside.read_bytes() if outside.exists() else None) == before


def test_the_state_folder_is_no_link_itself(place: Path) -> None:
    """Also where the whole folder was moved."""
    state = place.parent / "state"
    state.rename(place.parent / "moved")
    state.symlink_to(place.parent / "moved")
    with pytest.raises(WardroundError, match="is a symbolic link"):
        serve(place)


def test_a_ledger_elsewhere_is_no_link(place: Path, tmp_path: Path) -> None:
    """Nor is the one that the site file names in another state folder, while it is written or read."""
    ledger, link = tmp_path / "state" / LEDGER, tmp_path / "linked.db"
    link.symlink_to(ledger)
    policy = SimpleNamespace(max_epsilon=3.0, delta=1e-5)
    site = SimpleNamespace(policy=policy, ledger=str(link), state="", cohort=None, anchor=None)
    for opens in (lambda: open_ledger(site, create=False), lambda: read_accounts(link)):  # type: ignore[arg-type]  # all it looks at
        with pytest.raises(WardroundError, match="is a symbolic link"):
            opens()


def test_an_anchor_is_no_link(tmp_path: Path) -> None:
    """A link in its place would be followed to an older anchor: refused, and the ledger begins nothing."""
    (tmp_path / "anchor").symlink_to(tmp_path / "other")
    with pytest.raises(WardroundError, match="is a symbolic link"):
        SqliteLedger(tmp_path / "ledger.db", 3.0, 1e-5, anchor=tmp_path / "anchor")
    assert not (tmp_path / "other").exists()


def test_an_anchor_that_became_a_link_is_refused_before_it_is_believed(tmp_path: Path) -> None:
    """Somebody exchanges the anchor by a link to a copy of it: the next opening refuses."""
    anchor = tmp_path / "anchor"
    SqliteLedger(tmp_path / "ledger.db", 3.0, 1e-5, anchor=anchor).close()
    anchor.rename(tmp_path / "copy")
    anchor.symlink_to(tmp_path / "copy")
    with pytest.raises(WardroundError, match="is a symbolic link"):
        Anchor.read(anchor)
    with pytest.raises(WardroundError, match="is a symbolic link"):
        SqliteLedger(tmp_path / "ledger.db", 3.0, 1e-5, anchor=anchor)
