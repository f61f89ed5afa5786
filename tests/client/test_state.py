"""The state folder: this user's alone, one process at a time, written whole or not at all."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from client.state import NODE, StateFolder
from common.errors import ConfigurationError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return StateFolder(tmp_path / "state", create=True).path


def test_a_new_folder_is_private_and_has_a_version(folder: Path) -> None:
    """The folder has mode 0700, its files 0600, and it opens again."""
    state = StateFolder(folder)
    state.write_json(NODE, {"node": 1})
    state.split_key()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in folder.iterdir())


def test_a_folder_that_is_not_there_is_made_on_request_only(tmp_path: Path) -> None:
    """Only keygen makes a state folder: a typing error in the site file must not begin an empty ledger."""
    with pytest.raises(ConfigurationError, match="no such state folder; run `wardround client keygen`"):
        StateFolder(tmp_path / "state")
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("name", ["", "key"])
def test_what_others_can_read_is_refused(folder: Path, name: str) -> None:
    """A folder or file with rights for group or others is refused with the command that mends it."""
    if name:
        (folder / name).touch(mode=0o600)
    (folder / name).chmod(0o750 if not name else 0o640)
    with pytest.raises(ConfigurationError, match=r"mode 0[67]\d0 lets others in; run chmod"):
        StateFolder(folder)


@pytest.mark.parametrize("name", ["", "ledger.db"])
def test_symbolic_links_are_refused(folder: Path, tmp_path: Path, name: str) -> None:
    """Neither the folder nor anything in it may be a link."""
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    link = folder / name if name else tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigurationError, match="is a symbolic link"):
        StateFolder(folder if name else link)


def test_another_users_folder_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What belongs to another user is refused, naming both."""
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(ConfigurationError, match=r"belongs to user \d+, this process runs as 4711"):
        StateFolder(folder)


def test_a_folder_with_other_things_in_it_is_refused(tmp_path: Path) -> None:
    """A folder that holds files but no version file is not taken over."""
    tmp_path.chmod(0o700)
    (tmp_path / "thesis.txt").touch(mode=0o600)
    with pytest.raises(ConfigurationError, match="no `version` file of wardround"):
        StateFolder(tmp_path)


def test_another_version_is_refused(folder: Path) -> None:
    """A layout of another version is named, not guessed at."""
    (folder / "version").write_text("2\n")
    with pytest.raises(ConfigurationError, match="state of version 2, this wardround reads 1"):
        StateFolder(folder)


def test_a_version_that_is_none_is_shown_in_words(folder: Path) -> None:
    """Control characters in the file do not reach the terminal; found by the fuzz."""
    (folder / "version").write_bytes(b"\x1b[2J\x00")
    with pytest.raises(ConfigurationError, match="state of version") as refused:
        StateFolder(folder)
    assert str(refused.value).isprintable()


def test_one_process_at_a_time(folder: Path) -> None:
    """A second holder is refused while the first lives, and not after."""
    state = StateFolder(folder)
    with state.lock(), pytest.raises(ConfigurationError, match="in use by another process"):
        state.lock()
    state.lock().close()


def test_a_killed_process_leaves_no_stale_lock(folder: Path) -> None:
    """The lock of a process that was killed is gone with it: nobody has to remove anything by hand."""
    script = (
        "import sys; from pathlib import Path; from client.state import StateFolder\n"
        "lock = StateFolder(Path(sys.argv[1])).lock(); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ConfigurationError, match="in use"):
            StateFolder(folder).lock()
        process.kill()
    StateFolder(folder).lock().close()


def test_json_is_read_back_or_refused(folder: Path) -> None:
    """What was written is read; nothing is None; garbage is one clear error."""
    state = StateFolder(folder)
    assert state.read_json(NODE) is None
    state.write_json(NODE, {"node": 2**63, "server": "x:1"})
    assert state.read_json(NODE) == {"node": 2**63, "server": "x:1"}
    for garbage in ("{", "[1]", "[" * 100_000):
        (folder / NODE).write_text(garbage)
        with pytest.raises(ConfigurationError, match=r"node\.json"):
            state.read_json(NODE)


def test_an_empty_split_key_is_never_left_and_never_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop before the key is on disk leaves none; one of another length is refused."""

    def stop(_descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        StateFolder(folder).split_key()
    monkeypatch.undo()
    assert not (folder / "split.key").exists()
    assert len(StateFolder(folder).split_key()) == 32
    (folder / "split.key").write_bytes(b"")
    with pytest.raises(ConfigurationError, match="holds 0 bytes, not 32; restore it"):
        StateFolder(folder).split_key()


def test_the_split_key_is_made_once(folder: Path) -> None:
    """The same 32 secret bytes every time: another key would train on other patients."""
    first = StateFolder(folder).split_key()
    assert len(first) == 32
    assert StateFolder(folder).split_key() == first
