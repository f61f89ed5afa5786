"""What float32 rounding may do to the released sum: patients whose rows cancel, and thousands whose gradients agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from common.models import recurrent
from common.privacy.bookkeeping import BookKeepingHooks, clip_weights
from common.privacy.rows import Rows
from tests.benchmarks.batch_rounding import KINDS as CELLS
from tests.benchmarks.batch_rounding import STEPS as LONG
from tests.benchmarks.batch_rounding import largest_move
from tests.common.privacy.cases import BACKENDS, cancelling
from tests.oracles import Tolerance, book_keeping_sum, check_private_sum, patient_gradients

PATIENTS, STEPS = 400, 16
BOUNDS = Tolerance(total=math.inf, below=1e-6, above=math.inf, removal=1e-4)  # norms and removal, and no more
KINDS = ("Linear", "RNN", "GRU", "LSTM")
WIDTHS = pytest.mark.parametrize("width", [8, 64], ids=["by product", "by Gram"])

Loss = Callable[[nn.Module, Sequence[int]], Tensor]


def _forgetful(layers: ModuleType, kind: str, width: int) -> nn.Module:
    """A layer whose state depends on the step's input alone, so that its rows can be made to cancel."""
    torch.manual_seed(0)
    if kind == "Linear":
        return nn.Linear(width, width)
    layer: nn.Module = getattr(layers, kind)(width, width, batch_first=True)
    with torch.no_grad():
        layer.get_parameter("weight_hh_l0").zero_()
        if kind != "RNN":
            layer.get_parameter("bias_ih_l0")[width : 2 * width] = -40.0  # z of a GRU, f of an LSTM: nothing is kept
    return layer


def _loss(A: Tensor, X: Tensor) -> Loss:
    """A loss whose gradient at the layer's output is A [P, T, G], for inputs X [P, T, F]."""

    def loss(network: nn.Module, patients: Sequence[int]) -> Tensor:
        x, a = X[list(patients)], A[list(patients)]
        with Rows(torch.arange(len(x)), len(x)):
            outputs = network(x.to(next(network.parameters()).dtype))
        states: Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
        return (states * a).sum()

    return loss


def _exact(kind: str, network: nn.Module, width: int, loss: Loss, patients: int) -> Tensor:
    """Gradients [P, d] of torch's own layer with these weights, in float64."""
    twin = _forgetful(nn, kind, width).double()
    twin.load_state_dict(network.state_dict())
    return patient_gradients(twin.parameters(), lambda patient: loss(twin, [patient]), range(patients))


def _check_cancelling(kind: str, width: int, backend: str, removed: Sequence[int]) -> None:
    A, X = cancelling(PATIENTS, STEPS, width, width)
    if kind != "Linear":
        A[:, [0, STEPS // 2]] = 0  # the state before the first step is zero, before the ninth it is not
    network, loss = _forgetful(recurrent, kind, width), _loss(A, X)
    recurrent.set_backend(network, backend)
    gradients = _exact(kind, network, width, loss, PATIENTS)
    half = _exact(kind, network, width, _loss(A[:, : STEPS // 2], X[:, : STEPS // 2]), 1)
    assert float(gradients[0].norm()) < 1e-3 * float(half.norm())
    clip = float(gradients.norm(dim=1).median()) / 100
    check_private_sum(book_keeping_sum(network, loss, clip), gradients, clip, BOUNDS, removed)


@WIDTHS
@pytest.mark.parametrize("kind", KINDS)
def test_a_patient_whose_steps_cancel_moves_the_released_sum_by_the_clip(kind: str, width: int) -> None:
    """400 patients whose 16 steps cancel to 1e-4: norms are bounds, and removing one of 10 moves C (1 + 1e-4)."""
    _check_cancelling(kind, width, "blocked", range(0, PATIENTS, PATIENTS // 10))


@pytest.mark.full
@WIDTHS
@pytest.mark.parametrize(
    ("kind", "backend"), [("Linear", "blocked"), *((kind, backend) for kind in KINDS[1:] for backend in BACKENDS)]
)
def test_any_patient_whose_steps_cancel_moves_the_released_sum_by_the_clip(kind: str, backend: str, width: int) -> None:
    """As above, removing each of the 400, whatever runs the recurrence."""
    _check_cancelling(kind, width, backend, range(PATIENTS))


STEPS_BY_WAY = pytest.mark.parametrize("steps", [1, 4, 24], ids=["a row each", "by rows", "by products"])


def _aligned(patients: int, steps: int, width: int, spread: float) -> tuple[Tensor, Tensor]:
    """Gradients and inputs, [P, T, width] each, of patients who all want the same but for a `spread` of the inputs."""
    generator = torch.Generator().manual_seed(0)
    a, x = (torch.randn(1, steps, width, generator=generator) for _ in range(2))
    return a.repeat(patients, 1, 1), x + spread * torch.randn(patients, steps, width, generator=generator)


@pytest.mark.parametrize("spread", [0.0, 1e-3, 0.1])
@STEPS_BY_WAY
def test_the_sum_over_thousands_of_aligned_patients_is_rounded_little(steps: int, spread: float) -> None:
    """2,501 patients who pull the same way: the sum's rounding stays below 1e-6 C per patient."""
    A, X = _aligned(2501, steps, 16, spread)
    network, loss = nn.Linear(16, 16), _loss(A, X)
    hooks = BookKeepingHooks(network, loss_reduction="sum")
    loss(network, range(len(A))).backward()
    norms = hooks.book.gradients().norms()
    hooks.cleanup()
    clip = 0.3 * float(norms.min())
    total, _ = book_keeping_sum(network, loss, clip)(range(len(A)))
    c = clip_weights(norms, clip, torch.float32)
    exact = [torch.einsum("p,ptg,ptf->gf", c, A.double(), X.double()), torch.einsum("p,ptg->g", c, A.double())]
    error = float((total - torch.cat([part.flatten() for part in exact])).norm())
    assert float(total.norm()) > 0.9 * len(A) * clip
    assert error <= 1e-6 * len(A) * clip


@STEPS_BY_WAY
@pytest.mark.parametrize("kind", KINDS)
def test_a_patient_among_thousands_of_aligned_ones_moves_the_sum_by_the_clip(kind: str, steps: int) -> None:
    """Removing one of 2,501 patients who pull the same way, which rounds every block anew, moves C (1 + 1e-4)."""
    A, X = _aligned(2501, steps, 16, 0.1)
    torch.manual_seed(0)
    network = nn.Linear(16, 16) if kind == "Linear" else getattr(recurrent, kind)(16, 16, batch_first=True)
    private_sum = book_keeping_sum(network, _loss(A, X), 0.01)
    total, norms = private_sum(range(len(A)))
    assert norms is not None
    assert float(norms.min()) > 0.01
    for patient in range(0, len(A), len(A) // 6):
        without, _ = private_sum([other for other in range(len(A)) if other != patient])
        assert float((total - without).norm()) <= 0.01 * (1 + 1e-4)


@pytest.mark.parametrize("patients", [2, 4, 6])
@pytest.mark.parametrize("cell", CELLS)
def test_chaotic_weights_do_not_turn_rounding_into_other_gradients(cell: str, patients: int) -> None:
    """Weights that a hostile server may choose: who else is in a small batch moves nobody's gradient."""
    assert largest_move(cell, patients, LONG, gain=3.0) <= 1 + 1e-4
