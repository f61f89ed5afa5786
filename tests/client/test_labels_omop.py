"""Templates against labels that somebody else made: the MIMIC-IV demo in OMOP form, 249 admissions of 24 h or more."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import polars as pl
import pytest

from client.labels.terms import DeathInStay, LabelCodes, LongStay, TaskFile
from client.labels.write import write_labels
from client.readers.meds import MedsDirectory
from common.schema import FeatureSchema
from common.terms import load
from tests.client.readers.extracts import convert_to

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT.parent / "shared" / "data" / "mimic4-demo-omop"
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not DEMO.is_dir(), reason="needs ../shared/data/mimic4-demo-omop"),
]
INPATIENT = (8883, 9201, 262, 8870, 581385)  # visits but 38004207, which are the outpatient ones
LONG = LongStay(kind="long_stay", over_days=7, after_hours=24, stays="all")
DEATH = DeathInStay(kind="death_in_stay", after_hours=24, grace_hours=24, stays="all")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> MedsDirectory:
    out = tmp_path_factory.mktemp("omop") / "records"
    convert_to(out, kind="omop", folder=str(DEMO / "omop_csv"), charted_types=[32817])
    return MedsDirectory(out)


@pytest.mark.parametrize(("label", "column"), [(LONG, "stay_over_7d"), (DEATH, "in_hospital_death")])
def test_labels_agree_with_those_of_the_data_set(
    records: MedsDirectory, label: LongStay | DeathInStay, column: str
) -> None:
    """Every inpatient visit that overlaps no other one of its patient has the row and answer of the data set.

    But for admissions written by date, as 00:00: the reader places them at the end of their day. And one stay of 7 days
    and 22 minutes is not over 7 days to the data set, which then seems to count whole hours.
    """
    codes = LabelCodes(
        admission=tuple(f"VISIT_START//{kind}" for kind in INPATIENT),
        discharge=tuple(f"VISIT_END//{kind}" for kind in INPATIENT),
        observed_until=datetime(2300, 1, 1),
    )
    schema = load(ROOT / "configs" / "features" / "diabetes130.yaml", FeatureSchema)
    (done,) = write_labels(records, TaskFile(version=1, name=column, label=label), codes, schema)
    ours = pl.read_parquet(done.path)
    visits = inpatient_visits()
    theirs = pl.read_csv(DEMO / "labels.csv").select(
        "visit_occurrence_id",
        pl.col("prediction_time").str.to_datetime(time_unit="us"),
        pl.col(column).cast(pl.Boolean).alias("given"),
    )
    dated = visits.filter(pl.col("start").dt.time() == pl.time())
    a_week = visits.filter((pl.col("end") - pl.col("start")).dt.total_hours() == 7 * 24)
    alone = theirs.join(visits, on="visit_occurrence_id")
    for others in (touching(visits), dated, a_week):
        alone = alone.join(others, on="visit_occurrence_id", how="anti")
    found = alone.join(ours, on=["subject_id", "prediction_time"], how="left")
    assert len(alone) > 200
    assert found["boolean_value"].to_list() == found["given"].to_list()


def inpatient_visits() -> pl.DataFrame:
    times = (pl.col(f"visit_{end}_datetime").str.to_datetime(time_unit="us").alias(end) for end in ("start", "end"))
    visits = pl.read_csv(DEMO / "omop_csv" / "visit_occurrence.csv.gz")
    inpatient = visits.filter(pl.col("visit_concept_id").is_in(INPATIENT))
    return inpatient.select(pl.col("person_id").alias("subject_id"), "visit_occurrence_id", *times)


def touching(visits: pl.DataFrame) -> pl.DataFrame:
    """Visits during which, or at whose ends, another one of the same patient begins or ends."""
    both = visits.join(visits, on="subject_id", suffix="_other")
    another = pl.col("visit_occurrence_id") != pl.col("visit_occurrence_id_other")
    meets = (pl.col("start_other") <= pl.col("end")) & (pl.col("end_other") >= pl.col("start"))
    return both.filter(another & meets).select("visit_occurrence_id").unique()
