"""Where tensors live: `cpu`, `cuda`, or `auto` (cuda where there is one)."""

from __future__ import annotations

import torch

from common.errors import DeviceError


def resolve(name: str) -> torch.device:
    """The torch device for `device: cpu|cuda|auto`. Raises DeviceError if CUDA is asked for and absent."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise DeviceError("device: cuda, but torch finds no CUDA device here; write `device: cpu` or `auto`")
    return torch.device("cuda" if name in ("cuda", "auto") and available else "cpu")
