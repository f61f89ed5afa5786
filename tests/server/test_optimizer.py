"""The server's arithmetic against torch and against the formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.weights import Weights
from server.optimizer import AdamState, adam, plain, weighted_mean

NAMES = ("b.weight", "a")
WEIGHT = st.floats(1e-3, 1e6)


def arrays(seed: int, scale: float = 1.0) -> Weights:
    random = np.random.default_rng(seed)
    shapes = {"b.weight": (4, 3), "a": (2,)}
    return {name: (scale * random.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_adam_is_torchs_adam(scale: float) -> None:
    """Ten steps with falling rates along averaged updates are torch.optim.Adam's steps on minus those updates."""
    start = arrays(0)
    parameters = {name: torch.nn.Parameter(torch.from_numpy(array).double()) for name, array in start.items()}
    optimizer = torch.optim.Adam(parameters.values(), lr=1.0, betas=(0.9, 0.99), eps=1e-8)
    state, weights = AdamState(), start
    for step in range(10):
        average = {name: array.astype(np.float64) for name, array in arrays(step + 1, scale).items()}
        rate = 0.03 * (1 - step / 10)
        state, weights = adam(state, weights, average, rate)
        for name, parameter in parameters.items():
            parameter.grad = -torch.from_numpy(average[name])
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    assert state.step == 10
    for name, parameter in parameters.items():
        assert weights[name].dtype == np.float32
        assert np.allclose(weights[name], parameter.detach().numpy(), rtol=0, atol=1e-5)


def test_adam_walks_along_the_update() -> None:
    """The first step moves every weight by the learning rate in the direction of its averaged update."""
    average = {name: array.astype(np.float64) for name, array in arrays(1).items()}
    _, new = adam(AdamState(), arrays(0), average, 0.5)
    for name, old in arrays(0).items():
        assert np.allclose(new[name] - old, 0.5 * np.sign(average[name]), atol=1e-5)


def test_a_step_changes_neither_its_state_nor_its_weights() -> None:
    """Pure: the same arguments give the same result again, so a checkpoint can be taken anywhere."""
    average = {name: array.astype(np.float64) for name, array in arrays(1).items()}
    state, weights = adam(AdamState(), arrays(0), average, 0.1)
    once, first = adam(state, weights, average, 0.1)
    again, second = adam(state, weights, average, 0.1)
    assert once.step == again.step == 2
    assert all(np.array_equal(first[name], second[name]) for name in NAMES)
    assert all(np.array_equal(once.second[name], again.second[name]) for name in NAMES)


def test_zero_updates_leave_the_weights() -> None:
    """Without any gradient Adam and plain averaging stand still."""
    zero = {name: np.zeros(array.shape) for name, array in arrays(0).items()}
    for new in (adam(AdamState(), arrays(0), zero, 0.1)[1], plain(arrays(0), zero)):
        assert all(np.array_equal(new[name], arrays(0)[name]) for name in NAMES)


def test_plain_averaging_adds_the_average() -> None:
    """Federated averaging: new weights = old weights + average update, in float32."""
    average = {name: array.astype(np.float64) for name, array in arrays(3).items()}
    new = plain(arrays(0), average)
    assert all(new[name].dtype == np.float32 for name in NAMES)
    assert all(np.array_equal(new[name], (arrays(0)[name] + average[name]).astype(np.float32)) for name in NAMES)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.sampled_from("abcdef"), WEIGHT, min_size=1))
def test_the_mean_is_weighted_and_normalised_over_who_is_there(site_weights: dict[str, float]) -> None:
    """Sum of weight x update over the sum of the weights of the sites present; absent sites have no say."""
    updates = {site: arrays(ord(site)) for site in site_weights}
    mean = weighted_mean(updates, {**site_weights, "absent": 1e9})
    total = sum(site_weights.values())
    for name in NAMES:
        expected = sum(w * updates[site][name].astype(np.float64) for site, w in site_weights.items()) / total
        assert mean[name].dtype == np.float64
        assert np.allclose(mean[name], expected, rtol=1e-12, atol=1e-12)


def test_the_mean_does_not_depend_on_who_answered_first() -> None:
    """The same updates in another order give the same bits."""
    weights = {"north": 0.7, "east": 0.2, "south": 0.1}
    updates = {site: arrays(i) for i, site in enumerate(weights)}
    turned = dict(reversed(updates.items()))
    one, other = weighted_mean(updates, weights), weighted_mean(turned, weights)
    assert all(np.array_equal(one[name], other[name]) for name in NAMES)


def test_one_site_alone_is_its_own_mean() -> None:
    """With a single update the mean is that update, whatever the site weighs."""
    mean = weighted_mean({"north": arrays(1)}, {"north": 1e-9, "east": 1.0})
    assert all(np.array_equal(mean[name], arrays(1)[name].astype(np.float64)) for name in NAMES)
