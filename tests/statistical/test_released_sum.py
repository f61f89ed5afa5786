"""What one patient can change of what a hospital releases: the real client, three rounds, its ledger in a file."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from flwr.common.serde import recorddict_to_proto
from numpy.typing import NDArray
from torch.optim.optimizer import register_optimizer_step_post_hook

from client.entries import Attempted
from client.entry_file import read_entries
from common.privacy.randomness import Randomness
from common.records import Status
from common.study import Study
from common.weights import Weights
from tests.client.ledger_cases import UNSYNCED
from tests.small import Patient, as_sequences, made_up_patients, small_study
from tests.statistical.faults import FAULTS, Fault
from tests.statistical.released import Coupled, Hospital, Numbers, flat, grid, random_weights

ROUNDS = 3
CLIP_ROUNDING = 1e-5  # of C: what float32 may add to the clip (norms.py; tests/oracles.py FLOAT32.removal)
cells = pytest.mark.parametrize("cell", ["gru", "lstm", "rnn", "none"])


@pytest.fixture
def folder() -> Iterator[Path]:
    """For ledgers: in memory where there is such a place, so that a slow disk does not slow the tests."""
    with tempfile.TemporaryDirectory(dir=UNSYNCED) as name:
        yield Path(name)


def unlike_patients() -> list[Patient]:
    """Ten ordinary patients of one to four sequences, then: six loud sequences, NaN, one bare step, opposite labels."""
    patients = made_up_patients(7, 10, most_stays=4)
    loud, broken, bare, torn = made_up_patients(8, 4, most_stays=1)
    loud = [copy.deepcopy(stay) for stay in loud * 6]
    for number, stay in enumerate(loud):
        stay.label = number % 2  # a loud input is right or wrong for certain; one of the two has a gradient
        for visit in stay.visits:
            visit.values = [100 * value for value in visit.values]
    broken[0].visits[0].values = [math.nan, 0.0]
    bare[0].visits = [bare[0].visits[0]]
    bare[0].visits[0].codes = []
    torn = [torn[0], copy.deepcopy(torn[0])]
    torn[1].label = 1 - torn[0].label
    return [*patients, loud, broken, bare, torn]


PATIENTS = unlike_patients()
LOUD, BROKEN = 10, 11


def released(study: Study, present: list[int], folder: Path, source: type[Coupled] = Coupled) -> list[Numbers]:
    """The noised sums [d] of three rounds at a hospital with these of the patients; weights are any server's."""
    folder.mkdir()
    who = np.array(present, np.int64)
    records = as_sequences([PATIENTS[i] for i in present])
    with Hospital(study, records, folder, lambda number, _attempt: source(who, len(PATIENTS), number)) as hospital:
        return [hospital.released_sum(random_weights(study, number), number) for number in range(1, ROUNDS + 1)]


def slack(study: Study, number: int, sums: list[Numbers], divisor: float) -> float:
    """What rounding may add to the distance of two released sums.

    The grid moves each of d coordinates by at most a step between two sums. Update = (weights - step) - weights in
    float32: three roundings of at most 2^-24 of |weights| + 4 |update| together.
    """
    before = np.abs(flat(random_weights(study, number)))
    rounding = sum(2.0**-24 * np.linalg.norm(divisor * before + 4 * np.abs(total)) for total in sums)
    return float(grid(study) * math.sqrt(len(before)) + rounding) + CLIP_ROUNDING * study.privacy.clip


def moved(
    study: Study, folder: Path, source: type[Coupled] = Coupled, left_out: tuple[int, ...] = ()
) -> NDArray[np.float64]:
    """[patients, rounds] how far the released sum moves when a patient leaves (or joins), less slack, in units of C."""
    divisor = study.plan().divisor(study.sites["north"].declared_patients)
    everybody = [i for i in range(len(PATIENTS)) if i not in left_out]
    whole = released(study, everybody, folder / "all", source)
    distances = np.zeros((len(PATIENTS), ROUNDS))
    for patient in everybody:
        without = released(study, [i for i in everybody if i != patient], folder / f"without{patient}", source)
        for at in range(ROUNDS):
            allowed = slack(study, at + 1, [whole[at], without[at]], divisor)
            assert allowed < 2e-3 * study.privacy.clip
            distance = float(np.linalg.norm(whole[at] - without[at]))
            distances[patient, at] = max(0.0, distance - allowed) / study.privacy.clip
    return distances


def joined(study: Study) -> NDArray[np.bool_]:
    """[patients, rounds] who was sampled."""
    everybody = np.arange(len(PATIENTS))
    rate = study.plan().sampling_rate
    return np.stack([Coupled(everybody, len(PATIENTS), n).joins(rate) for n in range(1, ROUNDS + 1)], axis=1)


def study_of(cell: str) -> Study:
    return small_study(model={"cell": cell}, privacy={"epsilon": 3.0, "spare_rounds": 0}, training={"rounds": ROUNDS})


@cells
def test_one_patient_moves_the_released_sum_by_at_most_the_clip(cell: str, folder: Path) -> None:
    """Over three rounds, with and without any one patient, update times divisor differs by at most C (and rounding).

    Sample and noise are the same on both sides. Where the patient was not sampled the difference is nothing but
    rounding; where it was, the bound is reached, so that a smaller sensitivity would not do either.
    """
    study = study_of(cell)
    distances, sampled = moved(study, folder), joined(study)
    assert distances.max() <= 1
    assert not distances[~sampled].any()
    assert not distances[BROKEN].any()
    assert sampled[[LOUD, BROKEN]].any(axis=1).all()
    assert distances.max() > 0.995


class ClippedAsAWhole(Coupled):
    """A batch's sum is brought to norm C instead of each patient's gradient."""

    def add_noise(self, clipped_sum: Numbers, clip: float, noise_multiplier: float) -> Numbers:
        """Clip, then noise."""
        return super().add_noise(
            clipped_sum * min(1.0, clip / float(np.linalg.norm(clipped_sum))), clip, noise_multiplier
        )


CLIP_FAULTS = [fault for fault in FAULTS if fault.replaced and fault.name != "clipped-after-the-mean"]
AS_A_WHOLE = Fault("clipped-as-a-whole", "", replaced=next(f for f in FAULTS if f.name == "never-clipped").replaced)


@pytest.mark.parametrize("fault", [*CLIP_FAULTS, AS_A_WHOLE], ids=lambda fault: fault.name)
def test_a_wrong_clip_moves_the_released_sum_further(fault: Fault, folder: Path) -> None:
    """The measurement of the test above sees every fault of the clip; one of them the canary audit cannot see."""
    source = ClippedAsAWhole if fault is AS_A_WHOLE else Coupled
    with fault.in_place():  # a NaN would be all there is to see
        distances = moved(study_of("gru"), folder, source, left_out=(BROKEN,))
    assert distances.max() > 1.01


@contextmanager
def counted_steps() -> Iterator[list[str]]:
    """The classes of torch optimizers, one for each step that any of them takes while this is open."""
    taken: list[str] = []

    def count(optimizer: torch.optim.Optimizer, _args: object, _named: object) -> None:
        taken.append(type(optimizer).__name__)

    handle = register_optimizer_step_post_hook(count)
    try:
        yield taken
    finally:
        handle.remove()


class Breaking(Randomness):
    """Fails in the second step of the attempts that it is told of; samples nobody in a round's first step."""

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self._breaks, self._steps = breaks, 0

    def poisson_sample(self, patients: int, sampling_rate: float) -> NDArray[np.int64]:
        """Who joins."""
        self._steps += 1
        if self._breaks and self._steps == 2:
            raise MemoryError
        return super().poisson_sample(patients if self._steps > 1 else 0, sampling_rate)


@pytest.mark.parametrize(("recipe", "local_steps"), [("fedavg-one-step", 1), ("fedavg-local", 3)])
def test_the_ledger_charges_every_step_that_is_taken(recipe: str, local_steps: int, folder: Path) -> None:
    """Charged steps in the file are the optimizer's own: also of empty samples, none for replays and refusals.

    A round that breaks off in its second step has been charged whole: more than taken, never less.
    """
    study = small_study(
        training={"recipe": recipe, "local_steps": local_steps, "rounds": ROUNDS},
        privacy={"epsilon": 3.0, "spare_rounds": 1},
    )
    weights = random_weights(study, 1)
    breaks = {(2, 1)} if local_steps > 1 else set()
    inner = {"fedavg-one-step": "SGD", "fedavg-local": "Adam"}[recipe]
    records = as_sequences(made_up_patients(5, 20))
    asked: list[tuple[Weights, int]] = [
        (weights, 1),  # trained
        (weights, 1),  # a replay
        (random_weights(study, 2), 1),  # refused: released for other weights
        (weights, ROUNDS + 1),  # refused: no such round
        (weights, 2),  # trained; with local steps it breaks off in the second
        (weights, 2),  # with local steps tried again, else a replay
        (weights, 3),  # trained
    ]
    status, taken_at, charged_at = [], [], []
    source = lambda number, attempt: Breaking((number, attempt) in breaks)  # noqa: E731 (one line says it)
    with counted_steps() as taken, Hospital(study, records, folder, source) as hospital:
        for request in asked:
            status.append(hospital.reply(*request).status)
            taken_at.append(taken.count(inner))
            charged_at.append(hospital.ledger.steps_taken(study.digest()))
    trained, broken = Status.OK, Status.LOCAL_FAILURE if breaks else Status.OK
    assert status == [trained, trained, Status.BUDGET, Status.MALFORMED, broken, trained, trained]
    wasted = local_steps - 1 if breaks else 0  # charged for the attempt that broke off, and not taken
    steps = local_steps
    rounds = [1, 1, 1, 1, 2, 3 if breaks else 2, 4 if breaks else 3]
    assert charged_at == [steps * n for n in rounds]
    assert taken_at == [charged - (wasted if n > 1 else 0) for charged, n in zip(charged_at, rounds, strict=True)]
    stored = [entry for entry in read_entries(folder / "ledger.db").entries if isinstance(entry, Attempted)]
    assert sum(entry.steps for entry in stored) == charged_at[-1]


def broken_patients(count: int) -> list[Patient]:
    """Patients whose gradients are not finite: each counts as zero."""
    patients = made_up_patients(3, count)
    for visit in (visit for patient in patients for stay in patient for visit in stay.visits):
        visit.values = [math.nan] * len(visit.values)
    return patients


class OnlyTheFirst(Coupled):
    """A sample that happens to be the first five patients."""

    def joins(self, sampling_rate: float) -> NDArray[np.bool_]:
        """The first five."""
        return np.arange(self._persons) < 5


@pytest.mark.parametrize(("ordinary", "source"), [(0, Coupled), (5, OnlyTheFirst)])
def test_the_true_count_is_in_no_byte_of_a_reply(ordinary: int, source: type[Coupled], folder: Path) -> None:
    """Hospitals of 0, 1, 40 and 400 more patients who add nothing to the sum answer with the same bytes.

    Same declared patients, same noise; the others have no finite gradient, or are not sampled. So neither divisor nor
    noise nor anything else in a reply follows from how many there are; the ledger's head, a salted hash, is as long.
    """
    study = small_study(privacy={"epsilon": 3.0, "sampling_rate": 1.0})
    weights = random_weights(study, 1)
    seen = set()
    for more in (0, 1, 40, 400):
        place = folder / str(more)
        place.mkdir()
        patients = made_up_patients(2, ordinary) + broken_patients(more)
        who = np.arange(len(patients))
        with Hospital(
            study,
            as_sequences(patients),
            place,
            lambda number, _attempt, who=who: source(who, len(who), number),  # type: ignore[misc]  # binds `who`
        ) as hospital:
            content = hospital.answer(weights, 1).content
        record = content["reply"]
        assert isinstance(record, ConfigRecord)
        head = str(record["head"])
        record["head"] = "-" * len(head)
        seen.add(recorddict_to_proto(content).SerializeToString(deterministic=True))
    assert len(seen) == 1
