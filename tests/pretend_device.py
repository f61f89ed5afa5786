"""A device that is not there: finds tensors on the wrong device on a machine that has only a CPU.

Under `PretendDevice()`, tensors that are asked for on `DEVICE` are kept on the CPU and say that they are not. Every
operation is computed on the CPU, on real numbers, so that code whose path depends on values runs as it is; and an
operation whose tensors are on different devices is refused, as CUDA would refuse it. A CPU scalar passes, as there.
Nothing is said about kernels: what CUDA itself computes is for the tests that skip without it.

FakeTensorMode was rejected: it has no values, and the private step looks at some (how many rows a patient has).
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

DEVICE = torch.device("lazy", 0)  # a kind that torch has a name for, without kernels or a set-up of its own

# Operations that make the host wait for the device, because it must know a number or a size.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "repeat_interleave", "bincount")


class PretendDevice(TorchDispatchMode):
    """See the module.

    Attributes:
        waits: how often the host would have waited for the device, by operation and line of ours.

    Raises:
        AssertionError: an operation with tensors on two devices; names the line of ours.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's typing
        self.waits: Counter[str] = Counter()

    def __enter__(self) -> PretendDevice:
        torch._C._set_only_lift_cpu_tensors(True)  # else `torch.tensor(.., device=..)` would pass this mode by
        super().__enter__()  # type: ignore[no-untyped-call]  # torch's typing
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # torch's typing
        torch._C._set_only_lift_cpu_tensors(False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, wanted = func.overloadpacket.__name__, kwargs.get("device")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        from_away = any(isinstance(t, _Away) for t in tensors)
        to_away = from_away if wanted is None else torch.device(wanted) == DEVICE
        if from_away and name not in ("copy_", "_to_copy"):
            here = any(t.dim() and not isinstance(t, _Away) for t in tensors)
            assert not here, f"{func}: tensors on two devices{_line_of_ours()}"
        leaves = name == "_to_copy" and not to_away
        if from_away and (leaves or (name in WAITS and kwargs.get("output_size") is None)):
            self.waits[f"{name}{_line_of_ours()}"] += 1
        if wanted is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        own_args, own_kwargs = tree_map_only(_Away, lambda t: t.values_here, (args, kwargs))
        results = func(*own_args, **own_kwargs)
        return _sent_away(results, tensors) if to_away else results


class _Away(Tensor):
    """A tensor that says it is on DEVICE."""

    values_here: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> _Away:
        away: _Away = Tensor._make_wrapper_subclass(
            cls, values.shape, values.stride(), values.storage_offset(), dtype=values.dtype, device=DEVICE
        )
        away.values_here = values
        return away

    def tolist(self) -> Any:
        """Torch's own refuses subclasses."""
        return self.cpu().tolist()

    def __repr__(self) -> str:  # type: ignore[override]  # torch's has an argument more
        return f"away({self.values_here!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]  # torch's lacks func
        raise RuntimeError(f"{func}: a tensor on the pretended device, outside `with PretendDevice()`")


def _sent_away(results: Any, given: Iterable[Tensor]) -> Any:
    """Results as tensors away; what was written in place is the tensor that was given."""
    known = {id(t.values_here): t for t in given if isinstance(t, _Away)}
    return tree_map(lambda t: known[id(t)] if id(t) in known else _Away(t) if isinstance(t, Tensor) else t, results)


def _line_of_ours() -> str:
    frames = [frame for frame in traceback.extract_stack() if "/common/" in frame.filename]
    return f" at common/{frames[-1].filename.rsplit('/common/')[-1]}:{frames[-1].lineno}" if frames else ""
