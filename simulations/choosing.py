"""The fair line without privacy: several ways to regularise, the best chosen on patients nobody is tested on.

Training to the end without noise overfits so much that a private run beats it, which would print as "privacy improves
accuracy". A line without privacy is therefore what a careful person would do who may look at everything but the test
patients: train each candidate on a part of the training patients, note the AUROC on the rest after evenly spaced
rounds, take the best candidate and round, and train that again on all training patients.

The rest is the tuning split where the records have one, else a fifth of each site's training patients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common.errors import DataError
from common.metrics import auroc
from common.models.network import build_network
from common.privacy.accounting import SIGMA_FLOOR, epsilon_of
from common.schema import TRAIN, TUNING
from common.sequences import Sequences
from common.study import SiteTerms, Study
from common.training import load_state, predict
from common.weights import Weights
from simulations.centralised import Gathered, as_dataset, join, train_plainly
from simulations.experiment import SCORED_ROUNDS, evenly_spaced, one_thread, train
from simulations.rows import POOLED
from simulations.sources import read_sequences

Parts = Mapping[str, Sequences]
WEIGHT_DECAY = 1.0  # per unit of learning rate: over 160 rounds of a linear decay from .021, weights shrink to a fifth
TOKEN_EPSILON = 8.0  # half the noise of this budget: too little to cost anything, enough to regularise


@dataclass(frozen=True)
class Candidate:
    """A way to train without privacy: a study, of one virtual site `pooled` where all records are in one place.

    `weight_decay` is None where the private code trains (clip, and the study's noise), else the plain loop does.
    """

    name: str
    study: Study
    weight_decay: float | None = None


@dataclass(frozen=True)
class Choice:
    """What was chosen, and on whom."""

    candidate: Candidate
    rounds: int
    auroc: float
    chosen_on: str


def pooled_candidates(study: Study) -> list[Candidate]:
    """For records in one place: plain, weight decay, and clip with token noise. `study` has one virtual site."""
    plain = at_epsilon(study, None)
    return [
        Candidate("plain", plain, 0.0),
        Candidate("weight decay", plain, WEIGHT_DECAY),
        Candidate("clip and token noise", with_token_noise(study)),
    ]


def federated_candidates(study: Study) -> list[Candidate]:
    """For records that stay where they are: clip alone, and clip with token noise."""
    return [Candidate("clip", at_epsilon(study, None)), Candidate("clip and token noise", with_token_noise(study))]


def with_token_noise(study: Study) -> Study:
    """The study with half the noise of epsilon 8: far too little to protect anyone."""
    plan = at_epsilon(study, TOKEN_EPSILON).plan()
    token = replace(plan, noise_multiplier=max(SIGMA_FLOOR, plan.noise_multiplier / 2))
    return at_epsilon(study, epsilon_of(token))


def at_epsilon(study: Study, epsilon: float | None) -> Study:
    """The study with another budget."""
    return study.model_copy(update={"privacy": study.privacy.model_copy(update={"epsilon": epsilon})})


def choose(candidates: list[Candidate], study: Study, directories: Mapping[str, Path], seed: int) -> Choice:
    """The candidate and the number of rounds that rank the validation patients best; the first of equals.

    Args:
        candidates: made from `study`.
        study: whose sites' training records these are.
        directories: MEDS directory by site.
        seed: as of the final training; where there is no tuning split, also of who is set aside.
    """
    fit, rest, chosen_on = training_parts(study, directories, seed)
    found = [
        Choice(candidate, number, score, chosen_on)
        for candidate in candidates
        for number, score in _ranked(candidate, fit, join(list(rest.values())), seed)
    ]
    return max(found, key=lambda choice: choice.auroc)


def _ranked(candidate: Candidate, fit: Parts, rest: Sequences, seed: int) -> list[tuple[int, float]]:
    """(round, AUROC on the rest) after evenly spaced rounds of training on the part to fit."""
    validation, network = as_dataset(candidate.study, rest), build_network(candidate.study, seed)
    scored = evenly_spaced(candidate.study.training.rounds, SCORED_ROUNDS)
    found = []

    def note(number: int, weights: Weights) -> None:
        if number in scored:
            load_state(network, weights)
            with one_thread():
                found.append((number, auroc(rest.label, predict(network, validation))))

    train_candidate(candidate, fit, seed, on_round=note)
    return found


def train_candidate(
    candidate: Candidate,
    parts: Parts,
    seed: int,
    *,
    rounds: int | None = None,
    on_round: Callable[[int, Weights], None] = lambda _number, _weights: None,
) -> Weights:
    """Train on these records by site. Where nothing is private, sizes are the true ones."""
    records = {POOLED: join(list(parts.values()))} if POOLED in candidate.study.sites else dict(parts)
    sizes = {site: SiteTerms(declared_patients=max(2, part.n_patients)) for site, part in records.items()}
    study = candidate.study.model_copy(update={"sites": sizes})
    if candidate.weight_decay is not None:
        decay = candidate.weight_decay
        return train_plainly(study, records[POOLED], seed, weight_decay=decay, rounds=rounds, on_round=on_round)
    return train(
        Gathered(study, {}, seed, training=records),
        rounds=rounds,
        on_round=lambda record: on_round(record.round_number, record.weights),
    )


def training_parts(study: Study, directories: Mapping[str, Path], seed: int) -> tuple[Parts, Parts, str]:
    """(records to fit, records to choose on, what the latter are), by site; never a held-out patient."""
    splits = study.simulation.train
    rest = None if TRAIN not in splits else _tuning(study, directories)
    if rest is not None:
        return {site: read_sequences(study, path, (TRAIN,)) for site, path in directories.items()}, rest, "tuning split"
    whole = {site: read_sequences(study, path, splits) for site, path in directories.items()}
    random = np.random.default_rng(seed)
    order = {site: random.permutation(part.n_patients) for site, part in whole.items()}
    return (
        {site: part.select(order[site][part.n_patients // 5 :]) for site, part in whole.items()},
        {site: part.select(order[site][: part.n_patients // 5]) for site, part in whole.items()},
        "a fifth of the training patients",
    )


def _tuning(study: Study, directories: Mapping[str, Path]) -> Parts | None:
    """The tuning split of every site, or None if one of them has none."""
    try:
        return {site: read_sequences(study, path, (TUNING,)) for site, path in directories.items()}
    except DataError:  # that is how a reader says that nobody is in a split
        return None
