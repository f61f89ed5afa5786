"""How many hidden units, and which cell: cross-validation by patient over a grid.

For records that are public or synthetic. On anybody else's every fit is a look at the patients; what that costs is
priced here too (`price_of_choosing`), and nothing is trained.

Decisions a reader would question:

- A grid, not Bayesian optimisation: of eight candidates nothing can be saved that would not be lost in the spread over
  folds, a curve over widths is what a reader wants to see, and an adaptive search has no price but composition.
- Every candidate has the clip of its own by the rule of typical.py, which reads no record; learning rate, rounds and
  budget are the study's.
- The federation is trained, each site on its part of a fold, with the noise that the parts' sizes give: a fold has
  fewer patients than the study will have, for every candidate alike.
- Recommended is the smallest candidate within one standard error of the best (Breiman et al. 1984): the best of many
  near-equals is best by chance.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.errors import ConfigurationError, DataError
from common.metrics import auroc
from common.models.network import build_network
from common.privacy.accounting import Steps, epsilon_of, epsilon_of_history
from common.privacy.plan import Plan
from common.privacy.selection import Runs, epsilon_of_best
from common.sequences import Sequences
from common.study import Study
from common.terms import parse
from common.training import load_state, predict, state_of
from simulations.centralised import as_dataset, join
from simulations.choosing import Candidate, train_candidate
from simulations.cost import step_time
from simulations.experiment import one_thread
from simulations.typical import typical_clip

Parts = Mapping[str, Sequences]
NO_RECURRENCE = "none"


@dataclass(frozen=True)
class Tuned:
    """A candidate, and its AUROC on the patients left out of each fold.

    Attributes:
        hidden: None without recurrence.
    """

    cell: str
    hidden: int | None
    parameters: int
    clip: float
    aurocs: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over folds."""
        return statistics.fmean(self.aurocs)

    @property
    def spread(self) -> float:
        """Standard deviation over folds."""
        return statistics.stdev(self.aurocs)

    @property
    def name(self) -> str:
        """`gru 32`, or `none`."""
        return self.cell if self.hidden is None else f"{self.cell} {self.hidden}"


@dataclass(frozen=True)
class Price:
    """Epsilon per patient and site of choosing on patients who are not public.

    Attributes:
        study: of one training, which is what was agreed.
        best_of_runs: of the best of a random number of runs, on average as many as candidates, each trained once.
        all_folds: of every candidate in every fold, composed, and the final training.
        trainings: how many trainings of one patient the latter are.
    """

    study: float
    best_of_runs: float
    all_folds: float
    trainings: int


def candidates_of(study: Study, cells: list[str], widths: list[int]) -> list[Study]:
    """The study with every cell and width; without recurrence there is one, whatever the widths.

    Raises:
        ConfigurationError: a cell or width that a study cannot have.
    """
    models: list[dict[str, Any]] = []
    for cell in cells:
        if cell == NO_RECURRENCE:
            models.append({"cell": cell, "pooling": ["last_input", "mean_input"]})
        else:
            models += [{"cell": cell, "hidden": width} for width in widths]
    found = []
    for model in models:
        terms = study.model_dump(mode="json")
        terms["model"] |= model
        made = parse(terms, Study, "tune")
        clip = typical_clip(made)
        found.append(made.model_copy(update={"privacy": made.privacy.model_copy(update={"clip": clip})}))
    return found


def price_of_choosing(plan: Plan, candidates: int, folds: int) -> Price:
    """What this grid would cost on private patients, two ways. A patient is in all folds' trainings but one."""
    trainings = candidates * (folds - 1) + 1
    composed = Steps(plan.sampling_rate, plan.noise_multiplier, trainings * plan.priced_steps)
    return Price(
        epsilon_of(plan),
        epsilon_of_best(plan, Runs.with_mean(candidates)),
        epsilon_of_history([composed], plan.delta),
        trainings,
    )


def folds_of(parts: Parts, folds: int, seed: int) -> list[tuple[Parts, Parts]]:
    """(records to fit, records left out) of each fold, by site; every patient is left out once.

    Raises:
        ConfigurationError: fewer than two folds.
        DataError: a site with fewer patients than folds.
    """
    if folds < 2:
        raise ConfigurationError(f"--folds {folds}: must be at least 2")
    for site, part in parts.items():
        if part.n_patients < folds:
            raise DataError(f"site {site} has fewer training patients than {folds} folds; lower --folds")
    random = np.random.default_rng(seed)
    order = {site: random.permutation(part.n_patients) for site, part in parts.items()}
    return [
        (
            {site: part.select(np.delete(order[site], np.s_[fold::folds])) for site, part in parts.items()},
            {site: part.select(order[site][fold::folds]) for site, part in parts.items()},
        )
        for fold in range(folds)
    ]


def tune(candidates: list[Study], parts: Parts, folds: int, seed: int) -> Iterator[Tuned]:
    """Cross-validate each candidate; folds, starting weights' seed and samples are the same for all of them."""
    split = folds_of(parts, folds, seed)
    for study in candidates:
        scores = tuple(_score(study, fit, join(list(rest.values())), seed) for fit, rest in split)
        model = study.model
        hidden = None if model.cell == NO_RECURRENCE else model.hidden
        yield Tuned(model.cell, hidden, _parameters(study), study.privacy.clip, scores)


def seconds_of(candidates: list[Study], parts: Parts, folds: int) -> float:
    """Rough time of `tune`: real steps of every candidate are timed at these sizes."""
    total = 0.0
    for study in candidates:
        step, rate = step_time(study), study.privacy.sampling_rate
        sampled = [rate * part.n_patients * (folds - 1) / folds for part in parts.values()]
        total += folds * study.plan().steps * sum(step.of(patients) for patients in sampled)
    return total


def smallest_as_good(results: list[Tuned]) -> Tuned:
    """The candidate of fewest parameters whose mean is within one standard error of the best one's."""
    best = max(results, key=lambda result: result.mean)
    bound = best.mean - best.spread / math.sqrt(len(best.aurocs))
    return min((result for result in results if result.mean >= bound), key=lambda result: result.parameters)


def as_rows(results: list[Tuned]) -> list[dict[str, Any]]:
    """The results as plain data."""
    return [
        {
            "cell": result.cell,
            "hidden": result.hidden,
            "parameters": result.parameters,
            "clip": result.clip,
            "auroc": result.mean,
            "spread": result.spread,
            **{f"fold_{number}": score for number, score in enumerate(result.aurocs, start=1)},
        }
        for result in results
    ]


def as_csv(results: list[Tuned]) -> str:
    """The results as a table for a spreadsheet."""
    rows, text = as_rows(results), io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _score(study: Study, fit: Parts, rest: Sequences, seed: int) -> float:
    weights = train_candidate(Candidate("tuned", study), fit, seed)
    network = build_network(study, seed)
    load_state(network, weights)
    with one_thread():
        return auroc(rest.label, predict(network, as_dataset(study, rest)))


def _parameters(study: Study) -> int:
    return sum(array.size for array in state_of(build_network(study)).values())
