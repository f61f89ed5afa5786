"""A study small enough to work out by hand, and made-up records for it, written down patient by patient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray

from common.privacy.plan import Plan
from common.provenance import code_digest
from common.records import Header, Request, request_to_content
from common.sequences import Sequences
from common.study import Study
from common.terms import parse
from common.weights import Weights
from simulations.seeded import Silent

VALUES, CODES, STATICS = 2, 3, 1
SITE_NODES = {2: "north", 3: "east"}
_FEATURE = {"centre": 0, "scale": 1, "unit": "none", "min": -20, "max": 20, "basis": "made up"}
_STUDY: dict[str, Any] = {
    "version": 1,
    "name": "small",
    "task": {"name": "diagnosis", "prevalence": 0.2},
    "features": {
        "version": 1,
        "name": "small",
        "source": "made up",
        "time_gap": {"unit_hours": 720, "centre": 0.7},
        "values": {"VITAL//0": _FEATURE, "VITAL//1": _FEATURE},
        "codes": ["CODE//1", "CODE//2", "CODE//3"],
        "statics": {"AGE": {**_FEATURE, "centre": 62, "scale": 14, "min": 0, "max": 120}},
    },
    "records": {"max_steps": 6},
    "model": {"hidden": 5, "embedding": 4, "head_start": "random"},
    "privacy": {"epsilon": 1.0, "delta": 1e-3, "sampling_rate": 0.5, "clip": 0.7, "spare_rounds": 1},
    "training": {"rounds": 3, "learning_rate": 0.05},
    "sites": {"north": {"declared_patients": 80}, "east": {"declared_patients": 50}},
    "quorum": 2,
    "simulation": {"cohort": "medium"},
}


def small_study(**changes: Any) -> Study:
    """The small study; `model={"cell": "lstm"}` changes one key of a section, `quorum=1` a key of the study."""
    data = changes | {
        key: {**value, **changes.get(key, {})}
        if isinstance(value, dict) and key != "sites"
        else changes.get(key, value)
        for key, value in _STUDY.items()
    }
    return parse(data, Study, "small")


@dataclass
class Visit:
    """One step of a record: values [V], measured [V], gap, codes."""

    values: list[float]
    measured: list[bool]
    gap: float
    codes: list[int]


@dataclass
class Stay:
    """One sequence: its steps, statics [K] and label."""

    visits: list[Visit]
    statics: list[float]
    label: int


Patient = list[Stay]


def made_up_patients(seed: int, count: int, *, most_stays: int = 3, most_visits: int = 5) -> list[Patient]:
    """`count` patients of one or more stays of one or more visits; some visits have no code."""
    random = np.random.default_rng(seed)

    def visit() -> Visit:
        codes = np.flatnonzero(random.random(CODES) < 0.4).tolist()
        return Visit(
            random.normal(size=VALUES).tolist(), (random.random(VALUES) < 0.6).tolist(), random.random(), codes
        )

    def stay() -> Stay:
        visits = [visit() for _ in range(random.integers(1, most_visits + 1))]
        return Stay(visits, random.normal(size=STATICS).tolist(), int(random.random() < 0.4))

    return [[stay() for _ in range(random.integers(1, most_stays + 1))] for _ in range(count)]


def as_sequences(patients: list[Patient]) -> Sequences:
    """The patients as a site holds them."""
    stays = [stay for patient in patients for stay in patient]
    visits = [visit for stay in stays for visit in stay.visits]
    return Sequences(
        patient_id=np.arange(100, 100 + len(patients)),
        patient=np.array([i for i, patient in enumerate(patients) for _ in patient], np.int64),
        start=np.cumsum([0, *(len(stay.visits) for stay in stays)]),
        values=np.array([visit.values for visit in visits], np.float32).reshape(len(visits), VALUES),
        measured=np.array([visit.measured for visit in visits], bool).reshape(len(visits), VALUES),
        gap=np.array([visit.gap for visit in visits], np.float32),
        codes=np.array([code for visit in visits for code in visit.codes], np.int64),
        code_start=np.cumsum([0, *(len(visit.codes) for visit in visits)]),
        statics=np.array([stay.statics for stay in stays], np.float32).reshape(len(stays), STATICS),
        label=np.array([stay.label for stay in stays], np.float32),
        prediction_time=np.zeros(len(stays), "datetime64[us]"),
    )


class Chosen(Silent):
    """No noise, and samples that the test chose: one per step."""

    def __init__(self, *samples: list[int]) -> None:
        super().__init__(0, "north", 1, 1)
        self.samples = list(samples)
        self.patients_seen: list[int] = []

    def poisson_sample(self, patients: int, sampling_rate: float) -> NDArray[np.int64]:
        """The next sample."""
        del sampling_rate
        self.patients_seen.append(patients)
        return np.array(self.samples.pop(0), np.int64)


def plan(**changes: Any) -> Plan:
    """A plan with noise, which `Silent` and `Chosen` leave out."""
    terms = {"sampling_rate": 0.5, "noise_multiplier": 1.0, "clip": 0.7, "delta": 1e-3, "steps": 3, "spare_steps": 1}
    return Plan(**{**terms, **changes})


def request(study: Study, weights: Weights, round_number: int = 1) -> Request:
    """What the server of `study` asks for."""
    return Request(Header(study.digest(), code_digest(), round_number), weights)


def message(content: RecordDict, *, node: int = 2, kind: str = MessageType.TRAIN) -> Message:
    """A message from the server to a node, as it arrives."""
    identify()
    sent = Message(content, dst_node_id=node, message_type=kind)
    sent.metadata.__dict__["_message_id"] = f"test-{node}"  # the SuperLink's part
    return sent


def request_message(study: Study, weights: Weights, round_number: int = 1, node: int = 2) -> Message:
    """A TRAIN message of the study's server."""
    return message(request_to_content(request(study, weights, round_number)), node=node)


def reply_message(content: RecordDict, *, node: int = 2) -> Message:
    """A node's answer, as the server receives it."""
    return Message(content, reply_to=message(RecordDict({"any": ConfigRecord({})}), node=node))


def identify() -> None:
    """Flower stamps messages with the identity of the process's task."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 0
