"""Every kind of layer, used in every way it can be used, against the autograd loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from common.models import recurrent
from common.privacy.rows import Rows
from tests.oracles import FLOAT32, FLOAT64, Tolerance, book_keeping_sum, check_private_sum, patient_gradients

CODES, PER_ROW, STEPS, WIDTH = 6, 5, 3, 4
ROWS_OF = (2, 1, 3, 1, 2)  # of each patient

# (module, values [n, STEPS, WIDTH], codes [n, PER_ROW]) -> output [n, ..]
Call = Callable[[Any, Tensor, Tensor], Any]


class Scale(nn.Module):
    """A module that neither we nor Opacus know, with a part of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, power: float = 1.0) -> Tensor:
        return torch.tanh(self.scale * self.inner(x)) ** power


def _offsets(codes: Tensor, last: bool = False) -> Tensor:
    return torch.arange(len(codes) + last) * PER_ROW


def _frozen(module: nn.Module, name: str) -> nn.Module:
    module.get_parameter(name).requires_grad_(False)
    return module


def _twice(module: Any, x: Tensor, codes: Tensor) -> Any:
    return module(torch.tanh(module(x)))


def _bag_with_weights(module: Any, x: Tensor, codes: Tensor) -> Any:
    weights = x.flatten(1)[:, :PER_ROW].flatten()
    return module(codes.flatten(), per_sample_weights=weights, offsets=_offsets(codes))


def _embedded_twice(module: Any, x: Tensor, codes: Tensor) -> Any:
    return module(codes) + module(codes[:, 0])[:, None]


def _plain(module: Any, x: Tensor, codes: Tensor) -> Any:
    return module(x)


def _coded(module: Any, x: Tensor, codes: Tensor) -> Any:
    return module(codes)


def _bagged(module: Any, x: Tensor, codes: Tensor) -> Any:
    return module(codes.flatten(), _offsets(codes, getattr(module, "include_last_offset", False)))


def _bag(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.EmbeddingBag(CODES, WIDTH, **options)


CASES: dict[str, tuple[Callable[[], nn.Module], Call]] = {
    "linear": (lambda: nn.Linear(WIDTH, 2), _plain),
    "linear, named input": (lambda: nn.Linear(WIDTH, 2), lambda m, x, _: m(input=x)),
    "linear, one row": (lambda: nn.Linear(WIDTH, 2), lambda m, x, _: m(x[:, 0])),
    "linear, wide": (lambda: nn.Linear(STEPS * WIDTH, 40), lambda m, x, _: m(x.flatten(1))),
    "linear, no bias": (lambda: nn.Linear(WIDTH, 2, bias=False), _plain),
    "linear, weight frozen": (lambda: _frozen(nn.Linear(WIDTH, 2), "weight"), _plain),
    "linear, bias frozen": (lambda: _frozen(nn.Linear(WIDTH, 2), "bias"), _plain),
    "linear, used twice": (lambda: nn.Linear(WIDTH, WIDTH), _twice),
    "layer norm": (lambda: nn.LayerNorm(WIDTH), _plain),
    "layer norm, two dimensions": (lambda: nn.LayerNorm((STEPS, WIDTH)), _plain),
    "layer norm, no bias": (lambda: nn.LayerNorm(WIDTH, bias=False), _plain),
    "layer norm, used twice": (lambda: nn.LayerNorm(WIDTH), _twice),
    "embedding": (lambda: nn.Embedding(CODES, WIDTH), _coded),
    "embedding, padded": (lambda: nn.Embedding(CODES, WIDTH, padding_idx=0), _coded),
    "embedding, used twice": (lambda: nn.Embedding(CODES, WIDTH), _embedded_twice),
    "bag": (_bag(mode="sum"), _bagged),
    "bag, two-dimensional": (_bag(mode="sum"), _coded),
    "bag, mean": (_bag(mode="mean"), _bagged),
    "bag, mean, padded": (_bag(mode="mean", padding_idx=1), _bagged),
    "bag, last offset": (_bag(mode="sum", include_last_offset=True), _bagged),
    "bag, weights": (_bag(mode="sum"), _bag_with_weights),
    "convolution (Opacus)": (lambda: nn.Conv1d(STEPS, 2, 2), _plain),
    "group norm (Opacus)": (lambda: nn.GroupNorm(1, STEPS), _plain),
    "unknown (functorch)": (Scale, _plain),
    "unknown, used twice": (Scale, _twice),
}


def _loss_over(call: Call, dtype: torch.dtype) -> Callable[[nn.Module, Sequence[int]], Tensor]:
    generator = torch.Generator().manual_seed(4)
    values = [torch.randn(n, STEPS, WIDTH, generator=generator, dtype=torch.float64).to(dtype) for n in ROWS_OF]
    codes = [torch.randint(0, CODES, (n, PER_ROW), generator=generator) for n in ROWS_OF]
    codes[1].fill_(1)  # one patient with nothing but padding, in the case that pads with code 1

    def loss(network: nn.Module, patients: Sequence[int]) -> Tensor:
        owner = torch.cat([torch.full((ROWS_OF[p],), i) for i, p in enumerate(patients)])
        row = torch.cat([10 * p + torch.arange(ROWS_OF[p]) for p in patients])
        order = torch.randperm(len(owner), generator=torch.Generator().manual_seed(len(owner)))
        x, c = (torch.cat([part[p] for p in patients])[order] for part in (values, codes))
        with Rows(owner[order], len(patients)):
            out: Tensor = call(network, x, c).flatten(1)
        return (out * torch.cos(row[order][:, None] * torch.arange(out.shape[1]) + 1)).sum()

    return loss


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, FLOAT32), (torch.float64, FLOAT64)], ids=["float32", "float64"]
)
@pytest.mark.parametrize("case", CASES)
def test_gradients_per_patient(case: str, dtype: torch.dtype, tolerance: Tolerance) -> None:
    """Clipped sum, norms and sensitivity are the oracle's for each layer, rows in any order, several per patient."""
    torch.manual_seed(0)
    make, call = CASES[case]
    network, loss = make().to(dtype), _loss_over(call, dtype)
    trained = [p for p in network.parameters() if p.requires_grad]
    gradients = patient_gradients(trained, lambda p: loss(network, [p]), range(len(ROWS_OF)))
    clip = 0.8 * float(gradients.norm(dim=1).median())
    check_private_sum(book_keeping_sum(network, loss, clip), gradients, clip, tolerance)


@pytest.mark.parametrize("kind", ["GRU", "LSTM", "RNN"])
def test_a_recurrent_layer_used_twice(kind: str) -> None:
    """Two calls of one recurrent layer in one pass are one gradient, with the cross terms in the norm."""
    torch.manual_seed(0)
    ours, plain = (getattr(layers, kind)(WIDTH, WIDTH, batch_first=True).double() for layers in (recurrent, nn))
    plain.load_state_dict(ours.state_dict())

    def call(module: Any, x: Tensor, codes: Tensor) -> Any:
        states, _ = module(x)
        return module(functional.dropout(states, 0.0))[0]

    loss = _loss_over(call, torch.float64)
    gradients = patient_gradients(plain.parameters(), lambda p: loss(plain, [p]), range(len(ROWS_OF)))
    clip = 0.8 * float(gradients.norm(dim=1).median())
    check_private_sum(book_keeping_sum(ours, loss, clip), gradients, clip, FLOAT64)
