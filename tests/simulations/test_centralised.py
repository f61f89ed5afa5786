"""Everything in one place: joined records are the records, and the plain loop is the private code without privacy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from common.batching import Dataset
from common.sequences import Sequences
from simulations.centralised import Gathered, join, train_plainly
from simulations.experiment import train
from simulations.hospitals import Hospitals
from simulations.lines import pooled
from simulations.rows import POOLED
from simulations.seeded import Silent
from tests.small import as_sequences, made_up_patients, small_study

PARTS = [as_sequences(made_up_patients(seed, count)) for seed, count in ((1, 7), (2, 4), (3, 9))]


def test_joined_records_are_the_records() -> None:
    """Sequence by sequence, values, codes, statics, label and who belongs together are as before the join."""
    whole = join(PARTS)
    assert whole.n_patients == sum(part.n_patients for part in PARTS)
    assert np.array_equal(whole.patient_id, np.arange(whole.n_patients))
    sequence, patients = 0, 0
    for part in PARTS:
        for s in range(part.n_sequences):
            for one, other in zip(_of(whole, sequence), _of(part, s), strict=True):
                assert np.array_equal(one, other)
            assert whole.patient[sequence] - patients == part.patient[s]
            sequence += 1
        patients += part.n_patients
    assert sequence == whole.n_sequences


def test_a_joined_batch_is_the_batches() -> None:
    """What a network sees of a joined patient is what it sees of that patient at its site."""
    whole = Dataset(join(PARTS)).batch(np.array([PARTS[0].n_patients + 2]))
    alone = Dataset(PARTS[1]).batch(np.array([2]))
    assert all(np.array_equal(getattr(whole, n), getattr(alone, n)) for n in ("dense", "codes", "code_start", "label"))


def test_records_that_are_handed_over_are_trained_on() -> None:
    """Gathered hospitals have no directory, and every site the records that it was given."""
    hospitals = Gathered(small_study(), {}, 0, training={"north": PARTS[0], "east": PARTS[1]})
    assert hospitals.dataset("east", ("train",)).n_patients == PARTS[1].n_patients


@pytest.mark.parametrize("cell", ["gru", "none"])
def test_the_plain_loop_is_a_study_that_never_clips(cell: str) -> None:
    """Without weight decay it ends at the weights of the private code with one site, no noise and a boundless clip."""
    records = join(PARTS)
    study = small_study(
        model={"cell": cell},
        privacy={"clip": 1e6, "epsilon": None},
        sites={POOLED: {"declared_patients": records.n_patients}},
        quorum=1,
    )
    private = train(Gathered(study, {}, 5, Silent, {POOLED: records}))
    plain = train_plainly(study, records, 5)
    assert private.keys() == plain.keys()
    # Adam divides a coordinate's gradient by its own size: rounding shows where that is near zero.
    thousandth_of_a_step = study.training.learning_rate * study.training.rounds / 1000
    for name in plain:
        np.testing.assert_allclose(plain[name], private[name], rtol=1e-4, atol=thousandth_of_a_step)


def test_weight_decay_shrinks_matrices_alone() -> None:
    """With decay the matrices end smaller, and nothing is selected or stopped by it."""
    study = pooled(small_study())
    free, decayed = (train_plainly(study, join(PARTS), 5, weight_decay=decay) for decay in (0.0, 5.0))
    assert np.square(decayed["recurrence.weight_hh_l0"]).sum() < np.square(free["recurrence.weight_hh_l0"]).sum()


def test_stopping_early_is_a_prefix() -> None:
    """The weights after two of three rounds are those that training to the end passes through."""
    study, passed = pooled(small_study()), []
    train_plainly(study, join(PARTS), 5, on_round=lambda number, weights: passed.append((number, weights)))
    stopped = train_plainly(study, join(PARTS), 5, rounds=2)
    assert [number for number, _ in passed] == [1, 2, 3]
    assert all(np.array_equal(passed[1][1][name], stopped[name]) for name in stopped)


def test_a_curator_of_one_site_is_that_site(cohort: dict[str, Path]) -> None:
    """With one hospital there is nothing to join: the curator's records are the site's, in the same order."""
    study = small_study(sites={"north": {"declared_patients": 80}}, quorum=1)
    part = Hospitals(study, cohort, 0).dataset("north", ("train",)).sequences
    joined = join([part])
    assert np.array_equal(joined.values, part.values)
    assert np.array_equal(joined.code_start, part.code_start)
    assert np.array_equal(joined.patient, part.patient)


def _of(records: Sequences, s: int) -> tuple[np.ndarray, ...]:
    """Everything of a sequence."""
    rows = slice(records.start[s], records.start[s + 1])
    codes = records.codes[records.code_start[rows.start] : records.code_start[rows.stop]]
    counts = np.diff(records.code_start[rows.start : rows.stop + 1])
    return (
        records.values[rows],
        records.measured[rows],
        records.gap[rows],
        codes,
        counts,
        records.statics[s],
        records.label[s],
        records.prediction_time[s],
    )
