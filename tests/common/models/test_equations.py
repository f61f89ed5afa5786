"""The layers compute the equations that papers print, written out in numpy one step and one sequence at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from common.models.recurrent import GRU, LSTM, RNN

Array = NDArray[np.float64]
INPUTS, HIDDEN, STEPS = 5, 4, 9


def sigmoid(v: Array) -> Array:
    """The logistic function."""
    out: Array = 1 / (1 + np.exp(-v))
    return out


def parameters(layer: torch.nn.RNNBase) -> tuple[list[Array], list[Array], list[Array], list[Array]]:
    """W, U and the two biases of a one-layer network, cut by gate in torch's order."""
    gates = layer.weight_ih_l0.shape[0] // HIDDEN
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    cut = [np.split(getattr(layer, name).detach().numpy(), gates) for name in names]
    return cut[0], cut[1], cut[2], cut[3]


def rnn(layer: torch.nn.RNNBase, x: Array) -> Array:
    """The state is h = f(W x + U h + b), f = tanh (Elman 1990)."""
    (W,), (U,), (b,), (c,) = parameters(layer)
    h, out = np.zeros(HIDDEN), []
    for row in x:
        h = np.tanh(W @ row + U @ h + b + c)
        out.append(h)
    return np.array(out)


def lstm(layer: torch.nn.RNNBase, x: Array) -> Array:
    """Gates i, f, o and candidate g; c = f c + i g; h = o tanh(c) (Hochreiter and Schmidhuber 1997; Gers 2000)."""
    W, U, b, d = parameters(layer)
    h, c, out = np.zeros(HIDDEN), np.zeros(HIDDEN), []
    for row in x:
        i, f, g, o = (W[k] @ row + U[k] @ h + b[k] + d[k] for k in range(4))
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        out.append(h)
    return np.array(out)


def gru(layer: torch.nn.RNNBase, x: Array) -> Array:
    """The state is h = (1 - z) h + z tanh(W x + (1 - r) U h + b): z and r are sigmoids of minus torch's gate inputs."""
    W, U, b, d = parameters(layer)
    assert not d[2].any(), "this form has no bias inside (1 - r)"
    h, out = np.zeros(HIDDEN), []
    for row in x:
        r, z = (sigmoid(-(W[k] @ row + U[k] @ h + b[k] + d[k])) for k in (0, 1))
        h = (1 - z) * h + z * np.tanh(W[2] @ row + (1 - r) * (U[2] @ h) + b[2])
        out.append(h)
    return np.array(out)


@pytest.mark.parametrize(("cell", "equations"), [(RNN, rnn), (LSTM, lstm), (GRU, gru)])
def test_the_layers_compute_the_printed_equations(cell: type[torch.nn.RNNBase], equations: object) -> None:
    """Training and evaluation outputs of RNN, LSTM and GRU equal the written-out equations to 1e-12 in float64."""
    torch.manual_seed(0)
    layer = cell(INPUTS, HIDDEN, dtype=torch.float64)
    if cell is GRU:
        with torch.no_grad():
            layer.bias_hh_l0[2 * HIDDEN :] = 0
    x = torch.randn(STEPS, 1, INPUTS, dtype=torch.float64)
    expected = equations(layer, x[:, 0].numpy())  # type: ignore[operator]  # one of the three functions above
    for training in (True, False):
        states, _ = layer.train(training)(x)
        assert np.allclose(states[:, 0].detach().numpy(), expected, atol=1e-12)
