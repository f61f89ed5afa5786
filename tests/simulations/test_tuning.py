"""Cross-validation by patient, its choice, and its price on patients who are not public."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from common.errors import ConfigurationError, DataError
from common.privacy.accounting import Steps, epsilon_of, epsilon_of_history
from common.privacy.selection import Runs, epsilon_of_best
from simulations.tuning import (
    Tuned,
    as_csv,
    as_rows,
    candidates_of,
    folds_of,
    price_of_choosing,
    smallest_as_good,
    tune,
)
from simulations.typical import typical_clip
from tests.small import as_sequences, made_up_patients, small_study

PARTS = {"east": as_sequences(made_up_patients(1, 40)), "north": as_sequences(made_up_patients(2, 61))}


def tuned(name: str, parameters: int, *aurocs: float) -> Tuned:
    return Tuned(name, 8, parameters, 1.0, aurocs)


def test_every_patient_is_left_out_once() -> None:
    """Folds are of patients, not sequences: at every site the parts left out are everybody, and nobody is in both."""
    split = folds_of(PARTS, 3, 0)
    assert len(split) == 3
    for site, part in PARTS.items():
        left_out = np.concatenate([rest[site].patient_id for _, rest in split])
        assert sorted(left_out) == sorted(part.patient_id)
        for fit, rest in split:
            assert not set(fit[site].patient_id) & set(rest[site].patient_id)
            assert fit[site].n_patients + rest[site].n_patients == part.n_patients


def test_impossible_folds_are_refused() -> None:
    """One fold leaves nothing out, and a site needs a patient for each fold."""
    with pytest.raises(ConfigurationError, match="at least 2"):
        folds_of(PARTS, 1, 0)
    with pytest.raises(DataError, match="site east has fewer training patients than 41 folds"):
        folds_of(PARTS, 41, 0)


def test_candidates_are_every_cell_and_width() -> None:
    """Each with the typical clip of its own network; without recurrence there is one, whatever the widths."""
    found = candidates_of(small_study(), ["gru", "lstm", "none"], [3, 5])
    assert [(study.model.cell, study.model.hidden) for study in found[:4]] == [
        ("gru", 3),
        ("gru", 5),
        ("lstm", 3),
        ("lstm", 5),
    ]
    assert [study.model.cell for study in found[4:]] == ["none"]
    assert all(study.privacy.clip == typical_clip(study) for study in found)
    with pytest.raises(ConfigurationError, match=r"model\.cell"):
        candidates_of(small_study(), ["gpu"], [3])


def test_candidates_share_folds_and_are_scored_in_each() -> None:
    """A score per fold; the same candidate again has the same scores, also beside others."""
    first, second = candidates_of(small_study(), ["gru"], [3, 5])
    both = list(tune([first, second], PARTS, 2, 0))
    (alone,) = tune([second], PARTS, 2, 0)
    assert both[1] == alone
    assert [len(result.aurocs) for result in both] == [2, 2]
    assert all(0 <= score <= 1 for result in both for score in result.aurocs)
    assert [result.name for result in both] == ["gru 3", "gru 5"]


def test_the_smallest_within_one_standard_error_is_recommended() -> None:
    """Of near-equals the one with fewest parameters; the best itself where nothing smaller is near it."""
    best, near, far = tuned("a", 300, 0.70, 0.74), tuned("b", 200, 0.70, 0.71), tuned("c", 100, 0.60, 0.70)
    assert smallest_as_good([best, near, far]) is near  # the standard error of the best is .02
    assert smallest_as_good([best, far]) is best


def test_the_price_counts_every_training_of_a_patient() -> None:
    """Composed: a patient is in all folds' trainings but one, of every candidate, and in the final one."""
    plan = small_study().plan()
    price = price_of_choosing(plan, 4, 3)
    assert price.trainings == 4 * 2 + 1
    assert price.study == epsilon_of(plan)
    composed = Steps(plan.sampling_rate, plan.noise_multiplier, 9 * plan.priced_steps)
    assert price.all_folds == epsilon_of_history([composed], plan.delta)
    assert price.best_of_runs == epsilon_of_best(plan, Runs.with_mean(4))
    assert price.study < price.best_of_runs < price.all_folds


def test_the_table_is_the_results(tmp_path: Path) -> None:
    """A line per candidate with every fold's score, as CSV and as plain data that JSON takes."""
    results = [tuned("gru", 300, 0.5, 0.7), Tuned("none", None, 20, 2.0, (0.5, 0.6))]
    lines = as_csv(results).splitlines()
    assert lines[0] == "cell,hidden,parameters,clip,auroc,spread,fold_1,fold_2"
    assert lines[2].startswith("none,,20,2.0,0.55,")
    assert json.loads(json.dumps(as_rows(results)))[1]["hidden"] is None
