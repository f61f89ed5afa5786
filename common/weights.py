"""Weights and updates: float32 arrays by parameter name, and their one form as bytes. No torch, no Flower."""

from __future__ import annotations

import hashlib

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

Weights = dict[str, NDArray[np.float32]]


def to_bytes(weights: Weights) -> bytes:
    """Weights as safetensors bytes, in order of name: equal weights, equal bytes."""
    return safetensors.numpy.save({name: np.ascontiguousarray(weights[name]) for name in sorted(weights)})


def from_bytes(data: bytes) -> Weights:
    """Inverse of `to_bytes`."""
    loaded = safetensors.numpy.load(data)
    return {name: loaded[name] for name in sorted(loaded)}


def digest_of(weights: Weights) -> str:
    """sha256 of `to_bytes`."""
    return hashlib.sha256(to_bytes(weights)).hexdigest()
