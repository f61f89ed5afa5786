"""A canary audit through client and server: what an attacker learns from a study's messages, against the claim.

    python -m tests.statistical.audit

The attacker is the server. It knows everybody's records, chooses the weights that it sends, and guesses of each of
many patients ("canaries") whether the site has them; fair coins decided. Its best case is built: all patients join
every step (q = 1), and weights under which a canary's clipped gradient is C on a coordinate of its own, the embedding
of a code that nobody else has. One coordinate then is one run of the Gaussian mechanism with the worst neighbour, and
one round audits as many of them as there are canaries.

What takes part is the product: `server.rounds.run` over `FederatedAveraging`, the local grid, Flower messages, the
ClientApp, `Site` with its ledger, the network, book-keeping, clip and noise. The study is the stock recipe with two
sites and two rounds. The attacker turns the sign of the weights after the first round, as a hostile server may: the
mean of its two scores, one turned back, has sqrt(2) times the signal of one round, and noise that repeats is gone.

A canary has three sequences of different lengths, gradients of twenty times C before clipping, and as many patients
with small gradients beside it: so that a clip that counts sequences, mixes patients, or comes too late shows.
`faults.py` has clients with one such fault each; the table shows what the audit makes of them. What it cannot see is
listed in docs/audit.md.
"""

from __future__ import annotations

import argparse
import math
import secrets
import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from client.ledger import MemoryLedger
from client.site import Site
from common.batching import Dataset
from common.models.network import build_network
from common.privacy.accounting import epsilon_of
from common.sequences import Sequences
from common.study import Study
from common.terms import parse
from common.training import state_of
from common.weights import Weights
from server.rounds import RoundRecord, run
from server.strategy import FederatedAveraging
from simulations.experiment import one_thread
from simulations.local_grid import LocalGrid
from tests.statistical.bounds import Scores, epsilon_of_mu, mu_at_least
from tests.statistical.faults import FAULTS, NONE, Fault

SITES = ("east", "north")
LENGTHS = (3, 1, 2)  # steps of a patient's sequences
LOUD = 20.0  # norm of a canary's gradient before clipping, in units of C
THRESHOLDS = (0.5, 2.0, 8.0)  # in units of C; the first is the best one against the claimed mechanism


@dataclass(frozen=True)
class Finding:
    """What the attacker got out of one study.

    Attributes:
        claimed_mu, claimed_epsilon: of the plan, at `delta`.
        inside, outside: [attacks, canaries] scores, whose mean is 1 for a canary that is in, 0 for one that is not.
    """

    claimed_mu: float
    claimed_epsilon: float
    delta: float
    inside: Scores
    outside: Scores

    def mu(self, error: float) -> float:
        """Lower bound on mu, wrong with probability at most `error`."""
        return mu_at_least(self.inside, self.outside, THRESHOLDS, error)

    def epsilon(self, error: float) -> float:
        """Lower bound on epsilon at `delta`, wrong with probability at most `error`."""
        return epsilon_of_mu(self.mu(error), self.delta)


def audit(canaries: int, fault: Fault = NONE, *, epsilon: float = 2.0, delta: float = 1e-5) -> Finding:
    """Run the study once, with the client as it is or with a fault in it, and score every canary.

    Args:
        canaries: how many there are, over both sites; even.
        fault: what is wrong with the client.
        epsilon, delta: the claim; the study's sigma is calibrated to it.
    """
    study = study_of(canaries, epsilon, delta)
    coins = np.frombuffer(secrets.token_bytes(canaries), np.uint8) % 2 == 1
    codes = dict(zip(SITES, np.split(np.arange(canaries), len(SITES)), strict=True))
    ledgers = {name: MemoryLedger(epsilon, delta) for name in SITES}

    def open_site(name: str) -> Site:
        records = Dataset(records_of(codes[name][coins[codes[name]]], fillers=len(codes[name]) // 2))
        source = fault.randomness(name)
        return Site(name, study, records, ledgers[name], source)

    seen = [weights_sent(study, sign) for sign in (1.0, -1.0)]
    updates: list[dict[str, Weights]] = []
    with one_thread(), fault.in_place(), LocalGrid(open_site, SITES) as grid:
        strategy = FederatedAveraging(study, seen[0], lambda: grid.roster)

        def look(record: RoundRecord) -> None:
            updates.append(strategy.replies.updates)
            strategy.weights = seen[record.round_number % len(seen)]

        run(grid, strategy, rounds=study.training.rounds, on_round=look)

    plan = study.plan()
    assert [ledger.steps_taken(study.digest()) for ledger in ledgers.values()] == [plan.steps] * len(SITES)
    divisor = plan.divisor(study.sites[SITES[0]].declared_patients) / plan.clip
    # [rounds, sites, canaries + 1]: the step along the canaries' own gradients, in units of C
    steps = np.array([[divisor * of[name]["embedding.weight"][:, 0] for name in SITES] for of in updates])
    mean = np.mean(steps * np.array([1.0, -1.0])[:, None, None], axis=0)
    own = mean[np.repeat([0, 1], canaries // 2), np.arange(canaries)]
    other = mean[np.repeat([1, 0], canaries // 2), np.arange(canaries)]
    nobody = np.repeat(mean[:, -1], canaries // 2)
    scores = np.stack([own, own - other, own - nobody])
    return Finding(
        math.sqrt(plan.steps) / plan.noise_multiplier, epsilon_of(plan), delta, scores[:, coins], scores[:, ~coins]
    )


def study_of(canaries: int, epsilon: float, delta: float) -> Study:
    """Two sites, two rounds of one step each on all patients; a code for each canary, and one that nobody has."""
    study = {
        "version": 1,
        "name": "audit",
        "task": {"name": "canary", "prevalence": 0.5},
        "features": {
            "version": 1,
            "name": "audit",
            "source": "made up",
            "codes": [f"CANARY//{number}" for number in range(canaries)] + ["NOBODY"],
            "time_gap": {"unit_hours": 1, "centre": 0},
        },
        "records": {"max_steps": max(LENGTHS)},
        "model": {"hidden": 2, "embedding": 1},
        "privacy": {"epsilon": epsilon, "delta": delta, "sampling_rate": 1.0, "clip": 1.0, "spare_rounds": 0},
        "training": {"rounds": 2, "learning_rate": 0.1},
        "sites": {name: {"declared_patients": canaries // 2} for name in SITES},  # about as many as there are
        "quorum": len(SITES),
    }
    return parse(study, Study, "audit")


def records_of(codes: NDArray[np.int64], fillers: int) -> Sequences:
    """A site's patients: one canary per code, which stands in the last step of each of its sequences, and fillers.

    Fillers, evenly spread among the canaries, have no code; their gradient, below C, touches no canary's coordinate.
    """
    patients, sequences = len(codes) + fillers, len(LENGTHS)
    spread = np.argsort(np.concatenate([np.linspace(0, 1, len(codes)), np.linspace(0, 1, fillers)]), kind="stable")
    code_of_sequence = np.repeat(np.concatenate([codes, np.full(fillers, -1)])[spread], sequences)
    last = np.cumsum(np.tile(LENGTHS, patients)) - 1
    codes_of_row = np.zeros(sum(LENGTHS) * patients, np.int64)
    codes_of_row[last[code_of_sequence >= 0]] = 1
    rows = len(codes_of_row)
    return Sequences(
        patient_id=np.arange(patients),
        patient=np.repeat(np.arange(patients), sequences),
        start=np.concatenate([[0], last + 1]),
        values=np.zeros((rows, 0), np.float32),
        measured=np.zeros((rows, 0), bool),
        gap=np.zeros(rows, np.float32),
        codes=code_of_sequence[code_of_sequence >= 0],
        code_start=np.concatenate([[0], np.cumsum(codes_of_row)]),
        statics=np.zeros((patients * sequences, 0), np.float32),
        label=np.ones(patients * sequences, np.float32),
        prediction_time=np.zeros(patients * sequences, "datetime64[us]"),
    )


def weights_sent(study: Study, sign: float) -> Weights:
    """Weights that turn all of a canary's clipped gradient onto its code's embedding, up to one part in 1,000.

    All is zero but the way from the embedding through the GRU's candidate n into the last state and the logit. So
    logits are 0 and states are 0; of the loss log(1 + exp(-logit)) the derivative is -1/2, of the last state after n
    1/2 (the update gate), of n after the embedding `gain`. What else has a gradient has less than 1.
    """
    weights = {name: np.zeros_like(array) for name, array in state_of(build_network(study)).items()}
    hidden = study.model.hidden
    gain = 4 * LOUD * study.privacy.clip
    weights["recurrence.weight_ih_l0"][2 * hidden, study.features.n_dense :] = gain
    weights["head.weight"][0, 0] = sign
    return weights


def main() -> None:
    """Audit the client, then each faulty one, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--canaries", type=int, default=12_000)
    parser.add_argument("--epsilon", type=float, default=2.0)
    parser.add_argument("--confidence", type=float, default=0.99)
    parser.add_argument("--ours", action="store_true", help="only the client as it is")
    args = parser.parse_args()
    began = time.monotonic()
    error = 1 - args.confidence
    print(f"{args.canaries} canaries, bounds at {args.confidence:.6g} confidence, torch {torch.__version__}\n")
    print("| client | claimed epsilon | epsilon is at least | claimed mu | mu is at least | audit says |")
    print("|---|---|---|---|---|---|")
    for fault in (NONE,) if args.ours else (NONE, *FAULTS):
        found = audit(args.canaries, fault, epsilon=args.epsilon)
        refuted = found.epsilon(error) > found.claimed_epsilon
        print(
            f"| {fault.says} | {found.claimed_epsilon:.2f} | **{found.epsilon(error):.2f}** | {found.claimed_mu:.3f} "
            f"| {found.mu(error):.3f} | {'claim refuted' if refuted else 'no contradiction'} |",
            flush=True,
        )
    print(f"\n{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
