"""Where tensors live."""

from __future__ import annotations

import pytest
import torch

from common.device import resolve
from common.errors import DeviceError


@pytest.mark.parametrize(
    ("name", "available", "expected"),
    [
        ("cpu", True, "cpu"),
        ("cpu", False, "cpu"),
        ("auto", True, "cuda"),
        ("auto", False, "cpu"),
        ("cuda", True, "cuda"),
    ],
)
def test_a_device_is_chosen(name: str, available: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cpu` is always the CPU, `auto` takes CUDA where there is one, `cuda` takes it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert resolve(name) == torch.device(expected)


def test_a_missing_device_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cuda` without CUDA raises and says what to write instead; nothing falls back in silence."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="`device: cpu` or `auto`"):
        resolve("cuda")
