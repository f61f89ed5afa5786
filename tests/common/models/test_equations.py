"""The layers compute the equations that papers print, written out in numpy one step and one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from common.models.recurrent import GRU, LSTM, RNN, Recurrent, set_backend

Array = NDArray[np.float64]
INPUTS, HIDDEN, STEPS = 5, 4, 9


def sigmoid(v: Array) -> Array:
    """The logistic function."""
    out: Array = 1 / (1 + np.exp(-v))
    return out


def parameters(layer: Recurrent) -> tuple[list[Array], list[Array], list[Array], list[Array]]:
    """W, U and the two biases of a one-layer network, cut by gate in torch's order."""
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    found = [layer.get_parameter(name).detach().numpy() for name in names]
    cut = [np.split(parameter, len(parameter) // HIDDEN) for parameter in found]
    return cut[0], cut[1], cut[2], cut[3]


def rnn(layer: Recurrent, x: Array) -> Array:
    """The state is h = f(W x + U h + b), f = tanh (Elman 1990) or the positive part."""
    f = np.tanh if layer.mode == "RNN_TANH" else lambda argument: np.maximum(argument, 0.0)
    (W,), (U,), (b,), (c,) = parameters(layer)
    h, out = np.zeros(HIDDEN), []
    for row in x:
        h = f(W @ row + U @ h + b + c)
        out.append(h)
    return np.array(out)


def lstm(layer: Recurrent, x: Array) -> Array:
    """Gates i, f, o and candidate g; c = f c + i g; h = o tanh(c) (Hochreiter and Schmidhuber 1997; Gers 2000)."""
    W, U, b, d = parameters(layer)
    h, c, out = np.zeros(HIDDEN), np.zeros(HIDDEN), []
    for row in x:
        i, f, g, o = (W[k] @ row + U[k] @ h + b[k] + d[k] for k in range(4))
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        out.append(h)
    return np.array(out)


def gru(layer: Recurrent, x: Array) -> Array:
    """The state is h = (1 - z) h + z tanh(W x + (1 - r) U h + b).

    z and r are what torch calls 1 - z and 1 - r: sigmoids whose weights and biases are torch's with the other sign.
    """
    W, U, b, d = parameters(layer)
    assert not d[2].any(), "this form has no bias inside (1 - r)"
    for weights in (W, U, b, d):
        weights[0], weights[1] = -weights[0], -weights[1]  # r and z
    h, out = np.zeros(HIDDEN), []
    for row in x:
        r, z = (sigmoid(W[k] @ row + U[k] @ h + b[k] + d[k]) for k in (0, 1))
        h = (1 - z) * h + z * np.tanh(W[2] @ row + (1 - r) * (U[2] @ h) + b[2])
        out.append(h)
    return np.array(out)


LAYERS: dict[str, tuple[Callable[[], Recurrent], Callable[[Recurrent, Array], Array]]] = {
    "RNN, tanh": (lambda: RNN(INPUTS, HIDDEN, dtype=torch.float64), rnn),
    "RNN, relu": (lambda: RNN(INPUTS, HIDDEN, nonlinearity="relu", dtype=torch.float64), rnn),
    "LSTM": (lambda: LSTM(INPUTS, HIDDEN, dtype=torch.float64), lstm),
    "GRU": (lambda: GRU(INPUTS, HIDDEN, dtype=torch.float64), gru),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_layers_compute_the_printed_equations(name: str) -> None:
    """Training outputs, by each backend, and evaluation outputs equal the written-out equations to 1e-12 in float64."""
    torch.manual_seed(0)
    make, equations = LAYERS[name]
    layer = make()
    if name == "GRU":
        with torch.no_grad():
            layer.get_parameter("bias_hh_l0")[2 * HIDDEN :] = 0
    x = torch.randn(STEPS, 1, INPUTS, dtype=torch.float64)
    expected = equations(layer, x[:, 0].numpy())
    for training, backend in ((True, "blocked"), (True, "fused"), (False, "blocked")):
        set_backend(layer.train(training), backend)
        states, _ = layer(x)
        assert np.allclose(states[:, 0].detach().numpy(), expected, rtol=0, atol=1e-12)
