"""The checkpoint: everything comes back bit by bit, and a crash leaves the old one or the new one, never half."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.errors import ConfigurationError, WardroundError
from common.weights import Weights
from server.checkpoint import Checkpoint, load, save
from server.files import append_line, held, write_atomically
from server.optimizer import AdamState, adam
from server.progress import round_of

STUDY = "5" * 64
WEIGHTS: Weights = {"a.b": np.arange(6, dtype=np.float32).reshape(2, 3), "c/d": np.ones(1, np.float32)}
FULL = Checkpoint(
    7,
    WEIGHTS,
    adam(AdamState(), WEIGHTS, {name: array.astype(np.float64) / 3 for name, array in WEIGHTS.items()}, 0.1)[0],
    {"north": "a" * 64, "east": ""},
)


def equal(one: Checkpoint, other: Checkpoint) -> bool:
    parts: list[tuple[Mapping[str, NDArray[Any]], Mapping[str, NDArray[Any]]]] = [
        (one.weights, other.weights),
        (one.optimizer.first, other.optimizer.first),
        (one.optimizer.second, other.optimizer.second),
    ]
    arrays = all(
        a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)
        for a, b in parts
    )
    return arrays and (one.round_number, one.optimizer.step, one.heads) == (
        other.round_number,
        other.optimizer.step,
        other.heads,
    )


@pytest.mark.parametrize("checkpoint", [FULL, Checkpoint(0, WEIGHTS)], ids=["after rounds", "before the first"])
def test_what_was_saved_is_loaded(tmp_path: Path, checkpoint: Checkpoint) -> None:
    """Weights, moments, round, step and heads, to the last bit; the round can be read alone."""
    path = tmp_path / "checkpoint.safetensors"
    save(path, checkpoint, STUDY)
    assert equal(load(path, STUDY), checkpoint)
    assert round_of(path) == checkpoint.round_number


def test_another_studys_checkpoint_is_refused(tmp_path: Path) -> None:
    """It names both digests."""
    path = tmp_path / "checkpoint.safetensors"
    save(path, FULL, STUDY)
    with pytest.raises(ConfigurationError, match=r"belongs to study 555555555555, study.yaml is 666666666666"):
        load(path, "6" * 64)


def _rewritten(path: Path, **changes: str) -> None:
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    path.write_bytes(safetensors.numpy.save(arrays, metadata | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"wardround-checkpoint": "2"}, "version 2, this wardround reads 1"),
        ({"round": "many"}, "is damaged"),
        ({"heads": "{"}, "is damaged"),
        ({"heads": '{"north": "no head"}'}, "is damaged"),
    ],
)
def test_a_checkpoint_that_makes_no_sense_is_refused(tmp_path: Path, changes: dict[str, str], said: str) -> None:
    """Another version or damaged metadata: one line, nothing guessed."""
    path = tmp_path / "checkpoint.safetensors"
    save(path, FULL, STUDY)
    _rewritten(path, **changes)
    with pytest.raises(ConfigurationError, match=said):
        load(path, STUDY)


def test_values_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    """Not finite, or moments of another network."""
    path = tmp_path / "checkpoint.safetensors"
    for bad in (
        Checkpoint(1, {"a": np.array([np.nan], np.float32)}),
        Checkpoint(1, {}),
        Checkpoint(1, WEIGHTS, AdamState(1, {"x": np.zeros(1)}, {"x": np.zeros(1)})),
    ):
        save(path, bad, STUDY)
        with pytest.raises(ConfigurationError, match="is damaged"):
            load(path, STUDY)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 3000), st.booleans())
def test_a_damaged_file_is_one_line(position: int, cut: bool) -> None:
    """Cut anywhere or with a byte changed anywhere: a clear error, or a checkpoint of the right form; never a crash."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.safetensors"
        save(path, FULL, STUDY)
        content = bytearray(path.read_bytes())
        position %= len(content)
        if cut:
            del content[position:]
        else:
            content[position] ^= 0x41
        path.write_bytes(content)
        with contextlib.suppress(ConfigurationError):
            assert load(path, STUDY).weights


def test_no_file_says_who_writes_it(tmp_path: Path) -> None:
    """The first checkpoint is made by `init`."""
    with pytest.raises(ConfigurationError, match="`wardround server init` writes the first one"):
        load(tmp_path / "none", STUDY)
    assert round_of(tmp_path / "none") == 0


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_crash_at_any_step_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """Interrupted before the rename, readers find the checkpoint before, whole, and no temporary file stays."""
    path = tmp_path / "checkpoint.safetensors"
    save(path, FULL, STUDY)

    def crash(*_arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr({"fsync": os, "replace": Path}[step], step, crash)
        with pytest.raises(KeyboardInterrupt):
            save(path, Checkpoint(8, WEIGHTS), STUDY)
    assert equal(load(path, STUDY), FULL)
    assert os.listdir(tmp_path) == [path.name]


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it cannot be written, the error names the file and what to do, and the old checkpoint stays."""
    path = tmp_path / "checkpoint.safetensors"
    save(path, FULL, STUDY)

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(WardroundError, match=r"safetensors: cannot be written \(No space left on device\); free"):
            save(path, Checkpoint(8, WEIGHTS), STUDY)
        with pytest.raises(WardroundError, match=r"jsonl: cannot be written \(No space left on device\); free space"):
            append_line(tmp_path / "metrics.jsonl", "x")
    assert equal(load(path, STUDY), FULL)


def test_the_new_content_is_on_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Order: file synced, renamed, folder synced."""
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        done.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    write_atomically(tmp_path / "x", b"content")
    assert done == ["file", "rename", "folder"]


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    """Within the block a second holder is refused; after it the next may."""
    with held(tmp_path / "lock", "the folder"):
        second = held(tmp_path / "lock", "the folder")
        with pytest.raises(ConfigurationError, match="the folder is in use by another process"):
            second.__enter__()
    with held(tmp_path / "lock", "the folder"):
        pass
