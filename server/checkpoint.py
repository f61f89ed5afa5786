"""What the server must not lose: after each round the weights, the optimizer's moments and the ledgers' heads.

One safetensors file: `weights/NAME` (float32), `first/NAME` and `second/NAME` (float64, Adam's moments), and as its
metadata version, study digest, round, Adam's step and the heads. It replaces the one before atomically, and a round
counts only then: a server that is killed earlier asks for the round again with the same weights, which sites answer
with the same bytes. So a run that was killed and resumed has the weights of one that was not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from common.errors import ConfigurationError, WireError
from common.records import HEAD, check_like
from common.weights import Weights
from server.files import write_atomically
from server.optimizer import AdamState

VERSION = "1"


@dataclass(frozen=True)
class Checkpoint:
    """The state after round `round_number` (0: before the first)."""

    round_number: int
    weights: Weights
    optimizer: AdamState = field(default_factory=AdamState)
    heads: dict[str, str] = field(default_factory=dict)


def save(path: Path, checkpoint: Checkpoint, study: str) -> None:
    """Replace the checkpoint at `path`. `study`: the digest of the study that it belongs to."""
    groups: dict[str, Mapping[str, NDArray[Any]]] = {
        "weights": checkpoint.weights,
        "first": checkpoint.optimizer.first,
        "second": checkpoint.optimizer.second,
    }
    arrays = {
        f"{group}/{name}": np.ascontiguousarray(array) for group, part in groups.items() for name, array in part.items()
    }
    metadata = {
        "wardround-checkpoint": VERSION,
        "study": study,
        "round": str(checkpoint.round_number),
        "step": str(checkpoint.optimizer.step),
        "heads": json.dumps(checkpoint.heads, sort_keys=True),
    }
    write_atomically(path, safetensors.numpy.save(arrays, metadata))


def load(path: Path, study: str) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        ConfigurationError: unreadable, of another version, or of another study than the one with digest `study`.
    """
    try:
        metadata, arrays = _read(path)
        version, of = metadata["wardround-checkpoint"], metadata["study"]
    except FileNotFoundError:
        raise ConfigurationError(f"{path}: no such file; `wardround server init` writes the first one") from None
    except Exception as error:  # safetensors has an exception of its own; the rest is what a damaged file may raise
        raise ConfigurationError(f"{path}: cannot be read ({type(error).__name__}); put a copy of it back") from None
    if version != VERSION:
        raise ConfigurationError(
            f"{path}: version {version[:20]}, this wardround reads {VERSION}; use the one it is of"
        )
    if of != study:
        raise ConfigurationError(
            f"{path}: belongs to study {of[:12]}, study.yaml is {study[:12]}; put that study back, or make a new folder"
        )
    try:
        return _checkpoint(metadata, arrays)
    except Exception as error:
        raise ConfigurationError(f"{path}: is damaged ({type(error).__name__}); put a copy of it back") from None


def _read(path: Path) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    if not path.exists():
        raise FileNotFoundError
    with safetensors.safe_open(path, framework="numpy") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in sorted(file.keys())}


def _checkpoint(metadata: Mapping[str, str], arrays: dict[str, NDArray[Any]]) -> Checkpoint:
    parts: dict[str, dict[str, NDArray[Any]]] = {"weights": {}, "first": {}, "second": {}}
    for key, array in arrays.items():
        group, name = key.split("/", 1)
        parts[group][name] = array
    weights, first, second = parts["weights"], parts["first"], parts["second"]
    check_like(weights, {name: array.astype(np.float32) for name, array in weights.items()}, "weights")
    for moments in (first, second):
        if moments and {n: a.shape for n, a in moments.items()} != {n: a.shape for n, a in weights.items()}:
            raise WireError("moments of another network")
    heads: dict[str, str] = json.loads(metadata["heads"])
    if not weights or not all(HEAD.fullmatch(head) for head in heads.values()):
        raise WireError("no weights, or a head that is none")
    state = AdamState(int(metadata["step"]), first, second)
    return Checkpoint(int(metadata["round"]), weights, state, heads)
