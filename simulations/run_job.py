"""One job of a sweep -> its row: train as the line says, score the held-out patients once more than it was watched.

A process keeps what jobs share: records (simulations/sources.py), the held-out patients ready to be scored, and the
accountant's prices. None of it changes a number; that a row does not depend on what ran before it is tested.
"""

from __future__ import annotations

import importlib.metadata
import math
import platform
import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from common.metrics import auroc
from common.models.network import build_network
from common.privacy.accounting import epsilon_of
from common.study import Study
from common.training import load_state, state_of
from common.weights import Weights
from simulations.centralised import Gathered, join
from simulations.choosing import choose, federated_candidates, pooled_candidates, train_candidate
from simulations.experiment import HeldOut, evenly_spaced, one_thread, traffic, watch
from simulations.hospitals import Hospitals
from simulations.lines import How
from simulations.planning import Job
from simulations.rows import POOLED, RoundRow, Row, Setting
from simulations.run_folder import VERSIONS
from simulations.scoring import calibrate, score_sites, score_subgroups
from simulations.sources import read_sequences

KEPT = 4  # sets of held-out patients that a process keeps: two masks of two seeds
_held_out: dict[tuple[object, ...], HeldOut] = {}


@dataclass(frozen=True)
class Trained:
    """What a line came to: risks of the held-out sequences, and how they came about."""

    probability: NDArray[np.float64]
    rounds: tuple[RoundRow, ...] = ()
    terms: dict[str, Setting] = field(default_factory=dict)
    parameters: int = 0


def run_job(job: Job, code: str) -> Row:
    """The finished row; equal jobs give equal rows, but for the time they took.

    Args:
        job: what to run.
        code: digest of the code, for the row (`simulations.sweep_folder.rooms_digest`).

    Raises:
        WardroundError: as in training and scoring.
    """
    began, began_cpu = time.monotonic(), time.process_time()
    held_out = held_out_of(job)
    with one_thread():
        trained = MAKERS[job.line.how](job, held_out)
        study, whole = job.line.study, job.setup.study
        at_sites = study if set(study.sites) <= set(whole.sites) else whole  # a curator has everybody's patients
        scores = score_sites(at_sites, held_out, trained.probability, job.resamples)
        subgroups = score_subgroups(study.features, job.subgroups, held_out, trained.probability, job.resamples)
    private = job.line.how in (How.FEDERATED, How.CURATOR)
    federated = job.line.how in (How.FEDERATED, How.FEDERATED_FREE) and len(study.sites) > 1
    moved = traffic(study, state_of(build_network(study)))
    return Row(
        line=job.line.name,
        study=study.name,
        settings=dict(job.setup.settings),
        terms=trained.terms,
        epsilon=job.epsilon,
        spent=_finite(epsilon_of(study.plan())) if private else None,
        delta=study.privacy.delta,
        seed=job.seed,
        plan=study.plan() if private else None,
        weighting=study.training.aggregation if federated else None,
        weights=study.aggregation_weights() if federated else {},
        sites=scores,
        calibration=calibrate(held_out, trained.probability),
        subgroups=subgroups,
        rounds=trained.rounds,
        bytes_per_round=dict.fromkeys(study.sites, moved) if federated else {},
        parameters=trained.parameters,
        seconds=time.monotonic() - began,
        cpu_seconds=time.process_time() - began_cpu,
        study_digest=study.digest(),
        code_digest=code,
        versions={"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in VERSIONS}},
        research_mode=bool(job.setup.records),
    )


def held_out_of(job: Job) -> HeldOut:
    """The held-out patients that a job is scored on; kept for the next job."""
    study, directories = job.line.study, {site: job.setup.directories[site] for site in job.setup.scored}
    records, centre, device = study.records, study.model.centre_mask, study.device
    splits = job.setup.splits
    key = (tuple(directories.items()), splits, study.task.name, study.features.digest(), records, centre, device)
    if key not in _held_out:
        while len(_held_out) >= KEPT:
            del _held_out[next(iter(_held_out))]
        some = next(iter(study.sites.values()))
        scored = study.model_copy(update={"sites": dict.fromkeys(directories, some)})  # only their names are used
        _held_out[key] = HeldOut(Hospitals(scored, directories, job.seed), splits)
    return _held_out[key]


def _federated(job: Job, held_out: HeldOut) -> Trained:
    return _watched(Hospitals(job.line.study, job.setup.directories, job.seed), job, held_out)


def _curator(job: Job, held_out: HeldOut) -> Trained:
    study, whole = job.line.study, job.setup.study
    parts = [read_sequences(study, job.setup.directories[site], study.simulation.train) for site in whole.sites]
    return _watched(Gathered(study, {}, job.seed, training={POOLED: join(parts)}), job, held_out)


def _watched(hospitals: Hospitals, job: Job, held_out: HeldOut) -> Trained:
    """A run of the private code."""
    weights, history = watch(hospitals, held_out, scored_rounds=job.scored_rounds)
    rounds = tuple(
        RoundRow(each.round_number, each.auroc, _finite(max(each.epsilon.values())))
        for each in history
        if each.auroc is not None
    )
    return _trained(job.line.study, weights, held_out, rounds, {})


def _free(job: Job, held_out: HeldOut) -> Trained:
    """The best of several ways without privacy, chosen on training patients."""
    study, whole = job.line.study, job.setup.study
    candidates = (pooled_candidates if job.line.how is How.POOLED_FREE else federated_candidates)(study)
    directories = {site: job.setup.directories[site] for site in whole.sites}
    choice = choose(candidates, whole, directories, job.seed)
    network = build_network(study, job.seed)
    scored, rounds = evenly_spaced(choice.rounds, job.scored_rounds), []

    def note(number: int, weights: Weights) -> None:
        if number in scored:
            load_state(network, weights)
            rounds.append(RoundRow(number, auroc(held_out.label, held_out.probabilities(network)), None))

    parts = {site: read_sequences(study, path, study.simulation.train) for site, path in directories.items()}
    weights = train_candidate(choice.candidate, parts, job.seed, rounds=choice.rounds, on_round=note)
    terms: dict[str, Setting] = {
        "chosen": choice.candidate.name,
        "rounds": choice.rounds,
        "chosen_on": choice.chosen_on,
        "weight_decay": choice.candidate.weight_decay,
        "noise_multiplier": choice.candidate.study.plan().noise_multiplier,
    }
    return _trained(study, weights, held_out, tuple(rounds), terms)


def _truth(job: Job, held_out: HeldOut) -> Trained:
    """The exact probabilities as if a model had said them: on these very patients, hence with their chance."""
    del job
    known = [truth for truth in held_out.truth.values() if truth is not None]
    if len(known) < len(held_out.truth):
        raise DataError("best-possible: the records have no truth.parquet; only synthetic cohorts do")
    return Trained(np.concatenate(known))


def _prevalence(job: Job, held_out: HeldOut) -> Trained:
    """The public prevalence for everybody: what a score without any information gets."""
    return Trained(np.full(len(held_out.label), job.line.study.task.prevalence))


MAKERS = {
    How.FEDERATED: _federated,
    How.CURATOR: _curator,
    How.POOLED_FREE: _free,
    How.FEDERATED_FREE: _free,
    How.TRUTH: _truth,
    How.PREVALENCE: _prevalence,
}


def _trained(
    study: Study, weights: Weights, held_out: HeldOut, rounds: tuple[RoundRow, ...], terms: dict[str, Setting]
) -> Trained:
    network = build_network(study)
    load_state(network, weights)
    return Trained(held_out.probabilities(network), rounds, terms, sum(array.size for array in weights.values()))


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
