"""The final weights of a study, from a file that anybody may have written.

The file is safetensors, as `wardround server run` and `wardround simulate run` write it: names, shapes and float32
numbers, and no code. A pickle (`.pt`, `.pkl`) is told apart by how it begins, and is never opened.

Decisions a reader would question:

- The file does not say of which study it is, and a field that says so would prove nothing. What is checked is that it
  fits the network of the study that the site file names; the sha256 that is printed is what two people can compare.
- Numbers must be finite. Weights that are finite and absurd give absurd predictions, which the evaluation shows.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.errors import ConfigurationError
from common.weights import Weights, from_bytes

if TYPE_CHECKING:
    from common.study import Study

HEADER_BYTES = 1_000_000  # names and shapes of a network take a few kilobytes
PICKLES = (b"PK\x03\x04", b"\x80")  # torch.save writes a zip file with a pickle in it; older ones and pickle itself
REMEDY = "take weights.safetensors of the finished study from the coordinator"


@dataclass(frozen=True)
class FinalWeights:
    """Weights that fit the study, and the sha256 of the file that they were in."""

    arrays: Weights
    sha256: str


def weights_for(study: Study, path: Path) -> FinalWeights:
    """Read a file of weights for the study's network. Raises ConfigurationError, see `read_weights`."""
    from common.models.network import build_network
    from common.training import state_of

    return read_weights(path, state_of(build_network(study)))


def read_weights(path: Path, expected: Weights) -> FinalWeights:
    """Read a file of weights for the network whose parameters are like `expected` (name -> array of its shape).

    Raises:
        ConfigurationError: no such file, no safetensors, or names, shapes, types or numbers that cannot be.
    """
    data = _read(path, HEADER_BYTES + sum(array.nbytes for array in expected.values()))
    if data.startswith(PICKLES):
        raise ConfigurationError(f"{path}: is a pickle, which can run code and is never opened; {REMEDY}")
    try:
        found = from_bytes(data)
    except Exception as error:  # safetensors has an exception of its own; numpy raises others for types it lacks
        raise ConfigurationError(f"{path}: cannot be read as safetensors ({type(error).__name__}); {REMEDY}") from None
    if any(name.startswith("weights/") for name in found):
        raise ConfigurationError(f"{path}: is a server's checkpoint, of a study that may still run; {REMEDY}")
    missing, unknown = expected.keys() - found.keys(), found.keys() - expected.keys()
    if missing or unknown:
        lacks = f", without `{min(missing)}`" if missing else ""
        raise ConfigurationError(
            f"{path}: is of another network than the study's: {len(missing)} parameters missing, {len(unknown)} "
            f"unknown{lacks}; compare the study file with the coordinator's, or {REMEDY}"
        )
    for name, array in sorted(found.items()):
        like = expected[name]
        if (array.shape, array.dtype) != (like.shape, like.dtype):
            raise ConfigurationError(
                f"{path}: `{name}` is {array.dtype} of shape {array.shape}, the study's network has {like.dtype} of "
                f"shape {like.shape}; compare the study file with the coordinator's"
            )
        if not np.isfinite(array).all():
            raise ConfigurationError(f"{path}: `{name}` holds numbers that are not finite; {REMEDY}")
    return FinalWeights(found, hashlib.sha256(data).hexdigest())


def _read(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except FileNotFoundError:
        raise ConfigurationError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read ({error.strerror}); name the file of weights") from None
    if len(data) > most:
        raise ConfigurationError(f"{path}: is larger than the study's network can be ({most:,} bytes); {REMEDY}")
    return data
