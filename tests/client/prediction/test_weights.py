"""A file of weights is foreign input."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from client.prediction.weights import HEADER_BYTES, read_weights
from common.errors import ConfigurationError
from common.models.network import build_network
from common.training import state_of
from common.weights import Weights, to_bytes
from server.checkpoint import Checkpoint, save
from tests.client.prediction.predicting import random_weights
from tests.small import small_study

STUDY = small_study()
LIKE = state_of(build_network(STUDY))
GOOD = random_weights(STUDY)
FIRST = min(GOOD)


def save_bytes(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def raw(weights: dict[str, np.ndarray]) -> Callable[[Path], object]:  # type: ignore[type-arg]  # any type of number
    return save_bytes(safetensors.numpy.save(weights))


def nothing(path: Path) -> None:
    pass


def with_nan() -> Weights:
    broken = GOOD[FIRST].copy()
    broken.flat[0] = np.nan
    return GOOD | {FIRST: broken}


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no file": (nothing, "no such file"),
    "a folder": (lambda path: path.mkdir(), "cannot be read"),
    "empty": (save_bytes(b""), "cannot be read as safetensors"),
    "text": (save_bytes(b"weights"), "cannot be read as safetensors"),
    "cut off": (save_bytes(to_bytes(GOOD)[:-1]), "cannot be read as safetensors"),
    "header of another size": (save_bytes(b"\xff" * 8 + to_bytes(GOOD)[8:]), "cannot be read as safetensors"),
    "pickle": (save_bytes(pickle.dumps(GOOD)), "is a pickle, which can run code and is never opened"),
    "torch.save": (lambda path: torch.save({n: torch.tensor(a) for n, a in GOOD.items()}, path), "is a pickle"),
    "checkpoint": (lambda path: save(path, Checkpoint(3, GOOD), STUDY.digest()), "is a server's checkpoint"),
    "one missing": (raw({n: a for n, a in GOOD.items() if n != FIRST}), f"1 parameters missing, 0 unknown.*{FIRST}"),
    "one more": (raw(GOOD | {"evil": GOOD[FIRST]}), "0 parameters missing, 1 unknown"),
    "shape": (raw(GOOD | {FIRST: GOOD[FIRST].T.copy()}), f"`{FIRST}` is float32 of shape"),
    "float64": (raw(GOOD | {FIRST: GOOD[FIRST].astype(np.float64)}), f"`{FIRST}` is float64"),
    "int32": (raw(GOOD | {FIRST: GOOD[FIRST].astype(np.int32)}), f"`{FIRST}` is int32"),
    "not finite": (raw(with_nan()), f"`{FIRST}` holds numbers that are not finite"),
    "too large": (save_bytes(to_bytes(GOOD) + bytes(HEADER_BYTES)), "is larger than the study's network can be"),
}


def test_a_file_as_a_study_writes_it_is_read(tmp_path: Path) -> None:
    """Equal arrays come back, with the sha256 that `sha256sum` prints of the file."""
    path = tmp_path / "weights.safetensors"
    path.write_bytes(to_bytes(GOOD))
    found = read_weights(path, LIKE)
    assert found.arrays.keys() == GOOD.keys()
    assert all(np.array_equal(found.arrays[name], GOOD[name]) for name in GOOD)
    import hashlib

    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_no_final_weights_is_refused(tmp_path: Path, name: str) -> None:
    """One error of one line that names the file, whatever is in it."""
    write, message = BAD[name]
    path = tmp_path / "weights"
    write(path)
    with pytest.raises(ConfigurationError, match=message) as error:
        read_weights(path, LIKE)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    """What a pickle would do when it is opened is not done."""

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (str(tmp_path / "done"),)  # never called

    path = tmp_path / "weights"
    for protocol in (0, 2, pickle.HIGHEST_PROTOCOL):
        path.write_bytes(pickle.dumps(Evil(), protocol))
        with pytest.raises(ConfigurationError):
            read_weights(path, LIKE)
    assert not (tmp_path / "done").exists()
