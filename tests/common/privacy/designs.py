"""Designs whose printed epsilon is not what their training costs: each with its settings, by its own accountant.

    python -m tests.common.privacy.designs      prints the table of docs/why-this-epsilon-differs.md

`printed` recomputes what the design reports, with the accountant that it uses: Opacus's PRV accountant, dp-accounting's
Renyi accountant at the design's own orders, or its formula. `costs` prices the steps that it takes, for the unit that a
hospital means (a patient) against the one who sees every update (the server), with `common.privacy.accounting`.

Settings are read from the design's source where it is named; "ours" where a design has no published run. None of the
code is theirs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import dp_accounting as dp
from dp_accounting import pld, rdp
from dp_accounting.dp_event import MixtureOfGaussiansDpEvent
from opacus.accountants import GaussianAccountant, PRVAccountant
from opacus.accountants.utils import get_noise_multiplier

from common.privacy.accounting import Steps, epsilon_of_history

FL4HEALTH_ORDERS = [1.25, 1.5, 1.75, 2, 2.25, 2.5, 3, 3.5, 4, 4.5, *range(5, 64), 128, 256, 512]


@dataclass(frozen=True)
class Design:
    """One row of the page."""

    design: str
    settings: str
    printed: Callable[[], float]
    costs: Callable[[], float]
    why: str


def ours(rate: float, sigma: float, steps: int, delta: float) -> float:
    """What we charge."""
    return epsilon_of_history([Steps(rate, sigma, steps)], delta)


def opacus_prv(rate: float, sigma: float, steps: int, delta: float) -> float:
    """Opacus's default accountant."""
    accountant = PRVAccountant()
    accountant.history = [(sigma, rate, steps)]
    return float(accountant.get_epsilon(delta))


def opacus_gaussian(rate: float, sigma: float, steps: int, delta: float) -> float:
    """Opacus's accountant by the central limit theorem; it warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accountant = GaussianAccountant()
    accountant.history = [(sigma, rate, steps)]
    return float(accountant.get_epsilon(delta=delta))


def renyi(rate: float, sigma: float, steps: int, delta: float) -> float:
    """dp-accounting's Renyi accountant at FL4Health's orders (`moments_accountant.py`)."""
    accountant = rdp.RdpAccountant(FL4HEALTH_ORDERS)
    step = dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(sigma))
    accountant.compose(dp.SelfComposedDpEvent(step, steps))
    return float(accountant.get_epsilon(delta))


@lru_cache
def flamby_sigma(batches: int) -> float:
    """FLamby's noise: Opacus's calibration to epsilon 1 for `epochs=nrounds`, 15, at one loader's sampling rate."""
    return float(
        get_noise_multiplier(
            target_epsilon=1.0, target_delta=1e-4, sample_rate=1 / batches, epochs=15, accountant="prv"
        )
    )


def classical_sigma(epsilon: float, delta: float) -> float:
    """sqrt(2 ln(1.25 / delta)) / epsilon (Dwork and Roth 2014, theorem A.1): one release, epsilon < 1."""
    return math.sqrt(2 * math.log(1.25 / delta)) / epsilon


def rows_of_one_patient(rows: int, rate: float, sigma: float, steps: int, delta: float) -> float:
    """Each of a patient's rows is drawn by its own coin and clipped alone (Ganesh 2024, arXiv 2401.10294)."""
    sums = [float(k) for k in range(rows + 1)]
    chances = [math.comb(rows, k) * rate**k * (1 - rate) ** (rows - k) for k in range(rows + 1)]
    accountant = pld.PLDAccountant(value_discretization_interval=1e-2)
    accountant.compose(dp.SelfComposedDpEvent(MixtureOfGaussiansDpEvent(sigma, sums, chances), steps))
    return float(accountant.get_epsilon(delta))


def _flamby(hospital: str, patients: int) -> Design:
    batches = math.ceil(patients / 4)
    return Design(
        "FLamby, Fed-Heart-Disease",
        f"{hospital}: {patients} patients, batch 4, 15 rounds of 100 updates, target 1 at delta 1e-4",
        printed=lambda: opacus_prv(1 / batches, flamby_sigma(batches), 15 * batches, 1e-4),
        costs=lambda: ours(1 / batches, flamby_sigma(batches), 15 * 100, 1e-4),
        why="calibrated for 15 epochs, runs 15 x 100 steps",
    )


def _flower(settings: str, rate: float, per_round: int, rounds: int) -> Design:
    return Design(
        "Flower, `examples/opacus`",
        f"{settings}, sigma 1, {rounds} rounds, delta 1e-5",
        printed=lambda: opacus_prv(rate, 1.0, per_round, 1e-5),
        costs=lambda: ours(rate, 1.0, per_round * rounds, 1e-5),
        why=f"a new engine every round: the last of {rounds} is printed",
    )


def _fl4health(client_rate: float, rounds: int, drawn: int) -> Design:
    rate, batches, delta = 64 / 2000, math.ceil(2000 / 64), 1 / 6000
    return Design(
        "FL4Health, `instance_level_dp`",
        f"3 sites of 2,000 patients (ours), batch 64, sigma 1, {rounds} rounds of 1 epoch, client rate {client_rate}, "
        "delta 1/6000",
        printed=lambda: renyi(client_rate * rate, 1.0, rounds * batches, delta),
        costs=lambda: ours(rate, 1.0, drawn * batches, delta),
        why=f"client rate multiplied into q; the server knows that this site was drawn {drawn} times",
    )


def _rows(rows: int) -> Design:
    return Design(
        "A row is an example",
        f"q .05, sigma 1.5, 500 steps, delta 1e-5 (ours); a patient with {rows} rows",
        printed=lambda: opacus_prv(0.05, 1.5, 500, 1e-5),
        costs=lambda: rows_of_one_patient(rows, 0.05, 1.5, 500, 1e-5),
        why="each row is drawn and clipped by itself",
    )


def _messages(epsilon: float, messages: int) -> Design:
    return Design(
        "Flower, `LocalDpMod`",
        f"epsilon {epsilon:g}, delta 1e-6 for each message; {messages} message{'s' * (messages > 1)} (ours)",
        printed=lambda: epsilon,
        costs=lambda: ours(1.0, classical_sigma(epsilon, 1e-6), messages, 1e-6),
        why="nothing adds up the rounds" if messages > 1 else "the formula holds for epsilon < 1",
    )


DESIGNS = (
    _flower("20,000 images, batch 32", 1 / 625, 625, 3),
    _flower("the same", 1 / 625, 625, 50),
    _flower("the same at a small hospital: q .05, 20 steps (ours)", 0.05, 20, 50),
    _fl4health(0.66, 10, 10),
    _fl4health(0.1, 100, 10),
    _flamby("Cleveland", 199),
    _flamby("Hungary", 172),
    _flamby("Switzerland", 30),
    _flamby("Long Beach", 85),
    _messages(1.0, 50),
    _messages(10.0, 1),
    _rows(2),
    _rows(4),
    Design(
        "Shuffled batches, priced as Poisson",
        "q .05, sigma 1, 10 epochs, delta 1e-5 (ours)",
        printed=lambda: opacus_prv(0.05, 1.0, 200, 1e-5),
        costs=lambda: ours(1.0, 1.0, 10, 1e-5),
        why="a patient is in one batch of each epoch, for certain; the bound for batches whose order may be known",
    ),
    Design(
        "The best of 20 runs",
        "q .05, sigma 1.5, 500 steps, delta 1e-5 (ours)",
        printed=lambda: opacus_prv(0.05, 1.5, 500, 1e-5),
        costs=lambda: ours(0.05, 1.5, 20 * 500, 1e-5),
        why="every run saw the patients, not only the one that was kept",
    ),
    Design(
        "Opacus, `GaussianAccountant`",
        "q .04, sigma 1.5, 2,250 steps, delta 1e-5 (Opacus's own test)",
        printed=lambda: opacus_gaussian(0.04, 1.5, 2250, 1e-5),
        costs=lambda: ours(0.04, 1.5, 2250, 1e-5),
        why="a central limit, not a bound",
    ),
)


def table() -> str:
    """The page's table."""
    rows = ["| design | settings | prints | costs | why |", "|---|---|---|---|---|"]
    rows += [f"| {d.design} | {d.settings} | {d.printed():.2f} | {d.costs():.2f} | {d.why} |" for d in DESIGNS]
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
