"""The bill and the model: what of real, billed diagnoses is in a sequence at the time of its prediction."""

from __future__ import annotations

import csv
import gzip
import os
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.readers.formats import BILLING_TYPES
from client.readers.meds import MedsDirectory
from client.readers.omop import DOMAINS, PERSON, VISIT
from common.batching import Dataset
from common.models.network import build_network
from common.schema import SPLITS
from common.sequences import Sequences
from common.study import Study
from common.training import predict
from tests.client.readers.extracts import convert_to
from tests.client.readers.plain_omop import Row, moment, rows_of
from tests.small import small_study

MIMIC = Path(os.environ.get("WARDROUND_DATA", Path(__file__).parents[4] / "shared" / "data")) / "mimic4-demo-omop"
CDM = MIMIC / "omop_csv"
CHARTED = 32817
NOT_READ = {  # why: see docs/readers.md
    *("drug_era", "condition_era", "observation_period", "care_site", "location", "cdm_source"),
    *("2b_concept", "2b_vocabulary"),
}

pytestmark = pytest.mark.skipif(not CDM.is_dir(), reason=f"{CDM} is absent")


def billed(row: Row) -> bool:
    """A diagnosis of the bill."""
    return int(row["condition_type_concept_id"]) in BILLING_TYPES


def write_cdm(folder: Path, diagnoses: list[Row]) -> Path:
    """The demo's persons and visits with these diagnoses."""
    folder.mkdir()
    for table in (PERSON, VISIT):
        (folder / f"{table}.csv.gz").symlink_to(CDM / f"{table}.csv.gz")
    with gzip.open(folder / "condition_occurrence.csv.gz", "wt", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(diagnoses[0]))
        writer.writeheader()
        writer.writerows(diagnoses)
    return folder


def write_labels(path: Path, moments: set[tuple[int, datetime]]) -> dict[str, Any]:
    """A label at each (patient, moment), as terms."""
    lines = [f"{patient},{time},{k % 2}" for k, (patient, time) in enumerate(sorted(moments))]
    path.write_text("\n".join(["subject_id,prediction_time,boolean_value", *lines]))
    return {"t": {"files": str(path)}}


def study_of(codes: list[str]) -> Study:
    """A study whose inputs are these codes, each event a step."""
    features = {"version": 1, "name": "o", "source": "made up", "time_gap": {"unit_hours": 1, "centre": 0}}
    return small_study(features=features | {"codes": sorted(codes)}, records={"max_steps": 10_000})


def read(folder: Path, study: Study) -> Sequences:
    """The sequences of task `t`."""
    return MedsDirectory(folder).read(
        "t", study.features, SPLITS, max_steps=10_000, bin_hours=None, split_key=bytes(32)
    )


def test_every_table_of_the_demo_is_read_or_known_not_to_be() -> None:
    """No file of the demo is passed over unnoticed."""
    there = {path.name.removesuffix(".csv.gz") for path in CDM.glob("*.csv.gz")}
    assert there - {PERSON, VISIT, "death", *(domain.table for domain in DOMAINS)} == NOT_READ


def test_a_billed_diagnosis_is_in_a_sequence_from_the_end_of_its_visit(tmp_path: Path) -> None:
    """All 3,833, at predictions a day after admission, a second before each visit's end, and at that end: a sequence
    has exactly the codes whose visit has ended. Read by their own stamp, hundreds of sequences would have others.
    """
    bill = [row for row in rows_of(CDM, "condition_occurrence") if billed(row)]
    assert len(bill) == 3833
    visits = {row["visit_occurrence_id"]: row for row in rows_of(CDM, VISIT)}
    known: dict[int, list[tuple[datetime, str]]] = {}
    moments: set[tuple[int, datetime]] = set()
    for row in bill:
        patient, visit = int(row["person_id"]), visits[row["visit_occurrence_id"]]
        start, end = moment(visit, "visit_start"), moment(visit, "visit_end")
        assert start is not None
        assert end is not None
        known.setdefault(patient, []).append((end, f"CONDITION//{row['condition_concept_id']}"))
        moments |= {(patient, at) for at in (start + timedelta(days=1), end - timedelta(seconds=1), end)}
    study = study_of(sorted({code for rows in known.values() for _, code in rows if not code.endswith("//0")}))
    keys: dict[str, Any] = {
        "kind": "omop",
        "folder": str(write_cdm(tmp_path / "bill", bill)),
        "labels": write_labels(tmp_path / "l.csv", moments),
    }
    convert_to(tmp_path / "meds", **keys)
    convert_to(tmp_path / "stamped", **keys, billing_types=[], charted_types=list(BILLING_TYPES))

    def differing(folder: Path) -> int:
        """How many sequences have other codes than those of visits that have ended."""
        found, wrong = read(folder, study), 0
        for i, (owner, time) in enumerate(zip(found.patient, found.prediction_time.tolist(), strict=True)):
            patient = int(found.patient_id[owner])
            wanted = {code for end, code in known[patient] if end <= time} & set(study.features.codes)
            first, last = found.code_start[found.start[i]], found.code_start[found.start[i + 1]]
            has = {study.features.codes[code] for code in found.codes[first:last]}
            wrong += has != wanted
        assert found.n_sequences == len(moments)
        return wrong

    assert differing(tmp_path / "meds") == 0
    assert differing(tmp_path / "stamped") > 300


def test_the_bill_of_a_stay_does_not_change_what_the_model_says_during_it(tmp_path: Path) -> None:
    """A day after each patient's first admission, the network says the same, to the last bit, whether the bills of
    visits that end later are in the CDM or not; with the bill read by its own stamp it says something else.
    """
    visits = {row["visit_occurrence_id"]: row for row in rows_of(CDM, VISIT)}
    with (MIMIC / "labels.csv").open(newline="") as file:
        times = [
            (datetime.fromisoformat(row["prediction_time"]), int(row["person_id"])) for row in csv.DictReader(file)
        ]
    at = {patient: time for time, patient in sorted(times, reverse=True)}  # the first of each patient
    assert len(at) == 100
    diagnoses = [row for row in rows_of(CDM, "condition_occurrence") if int(row["person_id"]) in at]

    def later(row: Row) -> bool:
        end = moment(visits[row["visit_occurrence_id"]], "visit_end")
        return billed(row) and end is not None and end > at[int(row["person_id"])]

    kept = [row for row in diagnoses if not later(row)]
    assert len(diagnoses) - len(kept) > 3000  # of 3,833
    labels = write_labels(tmp_path / "l.csv", set(at.items()))
    codes = [
        code for code, _ in Counter(f"CONDITION//{row['condition_concept_id']}" for row in diagnoses).most_common(500)
    ]
    study = study_of([code for code in codes if code != "CONDITION//0"])
    network = build_network(study, 0)

    def says(name: str, rows: list[Row], charted: list[int]) -> np.ndarray[Any, Any]:
        folder = write_cdm(tmp_path / f"{name}-cdm", rows)
        billing = [kind for kind in BILLING_TYPES if kind not in charted]
        terms = {"billing_types": billing, "charted_types": charted, "labels": labels}
        convert_to(tmp_path / name, kind="omop", folder=str(folder), **terms)
        sequences = read(tmp_path / name, study)
        assert sequences.n_sequences == len(at)
        return predict(network, Dataset(sequences, centre_mask=True))

    whole, without = says("whole", diagnoses, [CHARTED]), says("without", kept, [CHARTED])
    assert np.array_equal(whole, without)
    stamped = says("stamped", diagnoses, [CHARTED, *BILLING_TYPES])
    assert (stamped != whole).mean() > 0.5
