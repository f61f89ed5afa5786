"""OMOP CDM: the rules, the same from every source, and no diagnosis before its visit ends."""

from __future__ import annotations

import csv
import importlib
import os
import tempfile
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.readers.formats import BILLING_TYPES
from client.readers.meds import MedsDirectory
from common.errors import ConfigurationError, DataError
from common.schema import SPLITS, FeatureSchema
from common.sequences import Sequences
from common.terms import parse
from tests.client.readers.extracts import convert_to, events_of, terms_of
from tests.client.readers.plain_omop import events_of_cdm, moment, rows_of
from tests.common.plain_sequences import same

MIMIC = Path(os.environ.get("WARDROUND_DATA", Path(__file__).parents[4] / "shared" / "data")) / "mimic4-demo-omop"
BILLED, CHARTED = 32821, 32817
PATIENT, VISIT = -8254164865273971123, -2366238349102619807
ADMITTED, LEFT = "2150-03-05 10:30:00", "2150-03-09 16:00:00"
BIRTH = {"year_of_birth": "2095", "month_of_birth": "", "day_of_birth": ""}
PERSON: dict[str, Any] = {
    "person_id": PATIENT,
    **BIRTH,
    "gender_concept_id": 8507,
    "race_concept_id": 0,
    "race_source_value": "X Y",
}
STAY: dict[str, Any] = {
    "visit_occurrence_id": VISIT,
    "person_id": PATIENT,
    "visit_concept_id": 9201,
    "visit_start_datetime": ADMITTED,
    "visit_end_datetime": LEFT,
}
DIAGNOSIS: dict[str, Any] = {
    "person_id": PATIENT,
    "visit_occurrence_id": VISIT,
    "condition_concept_id": 4140598,
    "condition_start_datetime": ADMITTED,
    "condition_type_concept_id": BILLED,
}
MEASUREMENT: dict[str, Any] = {
    "person_id": PATIENT,
    "measurement_concept_id": 3004249,
    "measurement_datetime": "2150-03-06 08:00:00",
}
OMOP: dict[str, Any] = {"kind": "omop", "folder": "cdm"}
Tables = dict[str, list[dict[str, Any]]]


def write(folder: Path, tables: Tables, *, upper: bool = False) -> None:
    """The tables as CSV; rows of a table may have different keys."""
    folder.mkdir(exist_ok=True)
    for table, rows in tables.items():
        names = list(dict.fromkeys(name for row in rows for name in row))
        with (folder / f"{table.upper() if upper else table}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, names, restval="")
            writer.writerow({name: name.upper() if upper else name for name in names})
            writer.writerows(rows)


def converted(folder: Path, tables: Tables, **keys: Any) -> list[tuple[Any, ...]]:
    """(time, code, number) of the only patient's events."""
    write(folder / "cdm", {"person": [PERSON], "visit_occurrence": [STAY], **tables})
    convert_to(folder / "out", **OMOP, **keys)
    found = events_of(folder / "out")
    assert found["subject_id"].unique().to_list() == [PATIENT]
    return [row[1:4] for row in found.rows()]


def at(text: str) -> datetime:
    return datetime.fromisoformat(text)


def test_persons_and_visits_become_events(tmp_path: Path) -> None:
    """Negative 64-bit numbers stay; a birth by year is its first day; a concept 0 gives way to the source value."""
    stay = {**STAY, "discharge_to_concept_id": 8536}
    assert converted(tmp_path, {"visit_occurrence": [stay]}) == [
        (None, "GENDER//8507", None),
        (None, "RACE//SOURCE//X Y", None),
        (at("2095-01-01"), "MEDS_BIRTH", None),
        (at(ADMITTED), "VISIT_START//9201", None),
        (at(LEFT), "VISIT_END//9201", None),
        (at(LEFT), "DISCHARGED_TO//8536", None),
    ]


def test_names_of_5_4_are_known(tmp_path: Path) -> None:
    """5.4 renamed the place of discharge."""
    stay = {**STAY, "discharged_to_concept_id": 0, "discharged_to_source_value": "HOME"}
    assert (at(LEFT), "DISCHARGED_TO//SOURCE//HOME", None) in converted(tmp_path, {"visit_occurrence": [stay]})


def test_the_number_of_a_visit_never_becomes_a_code(tmp_path: Path) -> None:
    """Source values of visits are numbers of visits and patients, so they do not stand in for a concept 0."""
    detail = {"person_id": PATIENT, "visit_detail_concept_id": 0, "visit_detail_start_datetime": ADMITTED}
    stay = {**STAY, "visit_concept_id": 0, "visit_source_value": "98765|1"}
    rows = [{**detail, "visit_detail_source_value": "98765|2"}]
    found = converted(tmp_path, {"visit_occurrence": [stay], "visit_detail": rows})
    assert [row for row in found if "98765" in row[1]] == []


def test_a_unit_or_an_answer_is_part_of_the_code(tmp_path: Path) -> None:
    """Unit concept, else unit text; the concept in place of a number only where there is none; missing is missing."""
    rows: list[dict[str, Any]] = [
        {"value_as_number": "7.5", "unit_concept_id": "8840.0", "unit_source_value": "mg/dl"},
        {"value_as_number": "7.5", "unit_concept_id": 0, "unit_source_value": " mmol/l "},
        {"value_as_concept_id": 9191},
        {"value_as_number": "NULL", "value_as_concept_id": 0},
        {"value_as_number": "1", "value_as_concept_id": 9191},
        {"measurement_concept_id": 0, "measurement_source_value": "GLU"},
        {"measurement_concept_id": 0},
    ]
    found = converted(tmp_path, {"measurement": [{**MEASUREMENT, **row} for row in rows]})
    assert [row[1:] for row in found if "MEAS" in row[1]] == [
        ("MEASUREMENT//3004249//8840", 7.5),
        ("MEASUREMENT//3004249//mmol/l", 7.5),
        ("MEASUREMENT//3004249//VALUE//9191", None),
        ("MEASUREMENT//3004249", None),
        ("MEASUREMENT//3004249", 1.0),
        ("MEASUREMENT//SOURCE//GLU", None),
    ]


@pytest.mark.parametrize(
    ("stamp", "wanted"),
    [
        ({"measurement_date": "2150-03-06"}, "2150-03-06 23:59:59"),
        ({"measurement_date": "2150-03-06", "measurement_datetime": "2150-03-06 00:00:00"}, "2150-03-06 23:59:59"),
        ({"measurement_date": "2150-03-06", "measurement_datetime": ""}, "2150-03-06 23:59:59"),
        ({"measurement_datetime": "2150-03-06T08:00:00.5"}, "2150-03-06 08:00:00.5"),
    ],
)
def test_a_date_alone_is_the_end_of_its_day(tmp_path: Path, stamp: dict[str, str], wanted: str) -> None:
    """Also where a date was cast to midnight, as an extract of dates does."""
    bare = {key: MEASUREMENT[key] for key in ("person_id", "measurement_concept_id")}
    found = converted(tmp_path, {"measurement": [{**bare, **stamp}]})
    assert [row[0] for row in found if "MEAS" in row[1]] == [at(wanted)]


def test_a_death_by_date_is_at_the_end_of_the_day(tmp_path: Path) -> None:
    """Stamped 00:00, it would tell of the death before it happened."""
    death = {"person_id": PATIENT, "death_date": "2150-03-08", "death_datetime": "2150-03-08 00:00:00"}
    assert (at("2150-03-08 23:59:59"), "MEDS_DEATH", None) in converted(tmp_path, {"death": [death]})


@pytest.mark.parametrize(
    ("changes", "keys", "wanted"),
    [
        ({}, {}, LEFT),  # billed
        ({"condition_type_concept_id": 0}, {}, LEFT),  # who knows?
        ({"condition_type_concept_id": CHARTED}, {}, LEFT),  # not named as charted
        ({"condition_type_concept_id": CHARTED}, {"charted_types": [CHARTED]}, ADMITTED),
        ({"visit_occurrence_id": ""}, {}, ADMITTED),  # belongs to no visit
        ({"condition_start_datetime": "2150-04-01 08:00:00"}, {}, "2150-04-01 08:00:00"),  # coded later still
        ({"condition_start_datetime": ""}, {}, LEFT),
    ],
)
def test_a_diagnosis_waits_for_the_end_of_its_visit(
    tmp_path: Path, changes: dict[str, Any], keys: dict[str, Any], wanted: str
) -> None:
    """Whatever its stamp, unless the site says that its type is charted at its own time."""
    found = converted(tmp_path, {"condition_occurrence": [{**DIAGNOSIS, **changes}]}, **keys)
    assert [row[0] for row in found if "CONDITION" in row[1]] == [at(wanted)]


def test_other_billed_rows_wait_too(tmp_path: Path) -> None:
    """A procedure from the bill waits, one from the ward does not."""
    procedure = {"person_id": PATIENT, "visit_occurrence_id": VISIT, "procedure_datetime": ADMITTED}
    rows = [
        {**procedure, "procedure_concept_id": kind, "procedure_type_concept_id": kind} for kind in (BILLED, CHARTED)
    ]
    found = converted(tmp_path, {"procedure_occurrence": rows})
    times = {row[1]: row[0] for row in found if "PROCEDURE" in row[1]}
    assert times == {f"PROCEDURE//{BILLED}": at(LEFT), f"PROCEDURE//{CHARTED}": at(ADMITTED)}


def test_a_diagnosis_of_an_open_visit_is_left_out_and_counted(tmp_path: Path) -> None:
    """Nobody knows yet when it counts; the same for a visit that is not there."""
    tables: Tables = {
        "person": [PERSON],
        "visit_occurrence": [{**STAY, "visit_end_datetime": ""}],
        "condition_occurrence": [DIAGNOSIS, {**DIAGNOSIS, "visit_occurrence_id": 5}],
    }
    write(tmp_path / "cdm", tables)
    done = convert_to(tmp_path / "out", **OMOP)
    assert done.left_out == {
        "rows of condition_occurrence that wait for the end of a visit, which is unknown": 2,
        "visits' ends without a time": 1,
    }
    assert not events_of(tmp_path / "out")["code"].str.contains("CONDITION").any()


def sequences(folder: Path, codes: list[str]) -> Sequences:
    """The sequences of task `t` with these codes as inputs."""
    terms = {"version": 1, "name": "o", "source": "made up", "codes": codes, "time_gap": {"unit_hours": 1, "centre": 0}}
    schema = parse(terms, FeatureSchema, "o")
    return MedsDirectory(folder).read("t", schema, SPLITS, max_steps=1000, bin_hours=None, split_key=bytes(32))


def test_a_billing_diagnosis_stamped_with_the_admission_reaches_the_model_after_discharge_only(tmp_path: Path) -> None:
    """Predictions a second before the visit ends see no diagnosis; those at its end do."""
    moments = [at(LEFT) - timedelta(seconds=1), at(LEFT)]
    rows = "".join(f"{PATIENT},{moment},{k}\n" for k, moment in enumerate(moments))
    (tmp_path / "l.csv").write_text("subject_id,prediction_time,boolean_value\n" + rows)
    converted(tmp_path, {"condition_occurrence": [DIAGNOSIS]}, labels={"t": {"files": "l.csv"}})
    diagnosis = "CONDITION//4140598"
    seen = sequences(tmp_path / "out", [diagnosis, "VISIT_START//9201"])
    column = [diagnosis, "VISIT_START//9201"].index(diagnosis)
    has = [
        column in seen.codes[seen.code_start[seen.start[i]] : seen.code_start[seen.start[i + 1]]].tolist()
        for i in range(seen.n_sequences)
    ]
    assert has == [False, True]


STAMPS = st.integers(-3 * 24 * 60, 9 * 24 * 60).map(lambda m: str(at(ADMITTED) + timedelta(minutes=m)))


@settings(deadline=None, max_examples=25)
@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {
                "stamp": st.one_of(STAMPS, STAMPS.map(lambda text: text[:10]), st.just("")),
                "type": st.sampled_from([0, BILLED, 32810, CHARTED, 32827]),
                "visit": st.sampled_from([VISIT, 7, 8, ""]),
            }
        ),
        min_size=1,
        max_size=8,
    ),
    charted=st.sampled_from([(), (CHARTED,), (CHARTED, 32827)]),
)
def test_the_slow_rules_agree(rows: list[dict[str, Any]], charted: tuple[int, ...]) -> None:
    """Any stamps, types and visits: the same events as a loop over rows, and no waiting diagnosis before its end."""
    diagnoses = [
        {**DIAGNOSIS, "condition_start_datetime": r["stamp"], "condition_type_concept_id": r["type"]}
        | {"visit_occurrence_id": r["visit"], "condition_concept_id": k + 1}
        for k, r in enumerate(rows)
    ]
    stays = [STAY, {**STAY, "visit_occurrence_id": 7, "visit_end_datetime": "", "visit_end_date": "2150-03-07"}]
    with tempfile.TemporaryDirectory() as name:
        write(Path(name) / "cdm", {"person": [PERSON], "visit_occurrence": stays, "condition_occurrence": diagnoses})
        convert_to(Path(name) / "out", **OMOP, charted_types=list(charted))
        found = events_of(Path(name) / "out").drop("text_value")
        slow = list(events_of_cdm(Path(name) / "cdm", set(BILLING_TYPES), set(charted)))
    wanted = pl.DataFrame(slow, schema=found.schema, orient="row")
    assert found.sort(found.columns).equals(wanted.sort(found.columns))
    ends = {VISIT: at(LEFT), 7: at("2150-03-07 23:59:59")}
    times = dict(found.select("code", "time").rows())
    for k, row in enumerate(rows):
        if row["type"] not in charted and row["visit"] in ends and f"CONDITION//{k + 1}" in times:
            assert times[f"CONDITION//{k + 1}"] >= ends[row["visit"]]


def test_every_source_gives_the_same_events(tmp_path: Path) -> None:
    """CSV, upper-case names, typed Parquet (whole or in parts) and a DuckDB file are one CDM."""
    duckdb = pytest.importorskip("duckdb")
    tables: Tables = {
        "person": [PERSON],
        "visit_occurrence": [STAY],
        "condition_occurrence": [DIAGNOSIS],
        "measurement": [
            {**MEASUREMENT, "value_as_number": 7.5, "unit_concept_id": 8840, "measurement_date": "2150-03-06"},
            {**MEASUREMENT, "value_as_number": "", "unit_concept_id": "", "measurement_date": "2150-03-07"}
            | {"measurement_datetime": ""},
        ],
        "death": [{"person_id": PATIENT, "death_date": "2150-03-08"}],
    }
    write(tmp_path / "cdm", tables)
    write(tmp_path / "upper", tables, upper=True)
    (tmp_path / "typed/measurement").mkdir(parents=True)
    with duckdb.connect(str(tmp_path / "cdm.duckdb")) as connection:
        connection.execute("CREATE SCHEMA omop")
        for table in tables:
            connection.execute(
                f"CREATE TABLE omop.{table} AS FROM read_csv('{tmp_path}/cdm/{table}.csv', header = true)"
            )
            frame = pl.read_csv(tmp_path / "cdm" / f"{table}.csv", try_parse_dates=True)
            if table == "measurement":
                for part in (0, 1):
                    frame[part : part + 1].write_parquet(tmp_path / f"typed/measurement/{part}.parquet")
            else:
                frame.write_parquet(tmp_path / f"typed/{table}.parquet")
        types = connection.execute(
            "SELECT measurement_datetime, death_date FROM omop.measurement, omop.death"
        ).description
        assert [str(kind[1]).lower() for kind in types] != ["string", "string"]
    sources: dict[str, dict[str, str]] = {name: {"folder": name} for name in ("cdm", "upper", "typed")}
    sources["base"] = {"database": "cdm.duckdb", "database_schema": "omop"}
    found = {}
    for name, source in sources.items():
        convert_to(tmp_path / f"out-{name}", kind="omop", **source)
        found[name] = events_of(tmp_path / f"out-{name}")
    assert len(found["cdm"]) == 9
    assert [name for name, events in found.items() if not events.equals(found["cdm"])] == []


def test_moments_of_a_database_become_local_times(tmp_path: Path) -> None:
    """A column with a zone is converted to the hospital's; whatever zone the session has."""
    duckdb = pytest.importorskip("duckdb")
    with duckdb.connect(str(tmp_path / "cdm.duckdb")) as connection:
        connection.execute("CREATE TABLE person AS SELECT 1::BIGINT AS person_id, 1987::SMALLINT AS year_of_birth")
        connection.execute(
            "CREATE TABLE death AS SELECT 1 AS person_id, TIMESTAMPTZ '2020-07-01 08:00:00+00' AS death_datetime"
        )
    convert_to(tmp_path / "out", kind="omop", database="cdm.duckdb", timezone="Europe/Berlin")
    assert events_of(tmp_path / "out")["time"].to_list() == [at("1987-01-01"), at("2020-07-01 10:00:00")]


def test_without_duckdb_a_folder_is_read_and_a_database_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a database needs the extra, and the message names it."""
    real = importlib.import_module

    def absent(name: str, *rest: Any) -> Any:
        if name == "duckdb":
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", absent)
    assert converted(tmp_path, {})
    (tmp_path / "x.duckdb").touch()
    with pytest.raises(ConfigurationError, match=r"pip install 'wardround\[omop\]'"):
        convert_to(tmp_path / "out2", kind="omop", database="x.duckdb")


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"person": []}, "no table person|is empty"),
        ({"person": [{"id": 1}]}, "table person: has no column `person_id`"),
        ({"visit_occurrence": [STAY, STAY]}, "2 rows share their visit_occurrence_id"),
        ({"condition_occurrence": [{**DIAGNOSIS, "person_id": "P98765"}]}, "`person_id`: in 1 of 1"),
        ({"condition_occurrence": [{**DIAGNOSIS, "condition_concept_id": "98765x"}]}, "`condition_concept_id`: in 1"),
        ({"condition_occurrence": [{**DIAGNOSIS, "condition_start_datetime": "98765"}]}, "_datetime`: in 1 of 1"),
        ({"measurement": [{**MEASUREMENT, "value_as_number": "98765x"}]}, "`value_as_number`: in 1 of 1"),
        ({"person": [PERSON, {**PERSON, "person_id": ""}]}, "has no patient"),
    ],
)
def test_faulty_tables_are_refused(tmp_path: Path, tables: Tables, words: str) -> None:
    """Table, column and count are named, a cell never."""
    write(tmp_path / "cdm", {"person": [PERSON], "visit_occurrence": [STAY], **tables})
    with pytest.raises(DataError, match=words) as caught:
        convert_to(tmp_path / "out", **OMOP)
    assert "98765" not in str(caught.value).replace(str(tmp_path), "")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "give one of `folder` and `database`"),
        ({"folder": "a", "database": "b"}, "give one of"),
        ({"folder": "a", "charted_types": [BILLED]}, "in both billing_types and charted_types"),
        ({"database": "b", "database_schema": "x; drop"}, "database_schema"),
    ],
)
def test_terms_that_cannot_be_are_refused(keys: dict[str, Any], words: str) -> None:
    """One clear line."""
    with pytest.raises(ConfigurationError, match=words):
        terms_of(kind="omop", **keys)


def test_sources_that_cannot_be_are_refused(tmp_path: Path) -> None:
    """A folder that is absent, the same table twice."""
    with pytest.raises(DataError, match="no such folder"):
        convert_to(tmp_path / "out", **OMOP)
    write(tmp_path / "cdm", {"person": [PERSON]})
    pl.DataFrame({"person_id": [1]}).write_parquet(tmp_path / "cdm/person.parquet")
    with pytest.raises(DataError, match="table person is there as"):
        convert_to(tmp_path / "out", **OMOP)


def test_databases_that_cannot_be_are_refused(tmp_path: Path) -> None:
    """A file that is absent, one that is no database, and one without the CDM; what DuckDB says is not passed on."""
    duckdb = pytest.importorskip("duckdb")
    with pytest.raises(DataError, match="no such file"):
        convert_to(tmp_path / "out", kind="omop", database="absent.duckdb")
    (tmp_path / "x.duckdb").write_text("98765" * 1000)
    with pytest.raises(DataError, match="cannot be attached") as caught:
        convert_to(tmp_path / "out", kind="omop", database="x.duckdb")
    assert "98765" not in str(caught.value)
    duckdb.connect(str(tmp_path / "y.duckdb")).close()
    with pytest.raises(DataError, match=r"no table person; check format\.folder, or format\.database_schema"):
        convert_to(tmp_path / "out", kind="omop", database="y.duckdb")


@pytest.mark.skipif(not MIMIC.is_dir(), reason=f"{MIMIC} is absent")
def test_the_mimic_demo_is_read_whole_and_its_bill_comes_last(tmp_path: Path) -> None:
    """Every table of events is read, identically to the slow rules, down to the sequences; no billing diagnosis of
    a visit is before that visit's end, although 99 % of them are stamped with its start.
    """
    folder = MIMIC / "omop_csv"
    labels = {"files": str(MIMIC / "labels.csv"), "patient": "person_id", "label": "in_hospital_death"}
    keys: dict[str, Any] = {"kind": "omop", "folder": str(folder), "charted_types": [CHARTED], "labels": {"t": labels}}
    done = convert_to(tmp_path / "out", **keys)
    assert (done.patients, done.labels) == (100, {"t": 249})
    assert done.left_out == {"visit_detail whose concept is 0 and that have no source value": 41}
    found = events_of(tmp_path / "out").drop("text_value")
    counts = dict(found.group_by(pl.col("code").str.split("//").list.first()).len().rows())
    assert counts["CONDITION"] == 16_441
    assert counts["PROCEDURE"] == 18_447
    assert counts["DRUG"] == 18_229
    assert counts["VISIT_START"] == counts["VISIT_END"] == 852
    assert counts["MEDS_DEATH"] == 15
    assert counts["MEDS_BIRTH"] == 100
    assert {"DEVICE", "SPECIMEN", "VISIT_DETAIL", "DISCHARGED_TO", "GENDER"} <= set(counts)
    slow = pl.DataFrame(list(events_of_cdm(folder, set(BILLING_TYPES), {CHARTED})), schema=found.schema, orient="row")
    assert found.sort(found.columns).equals(slow.sort(found.columns))

    (tmp_path / "slow/data").mkdir(parents=True)
    slow.sort("subject_id", "time", maintain_order=True).write_parquet(tmp_path / "slow/data/0.parquet")
    (tmp_path / "out/labels").rename(tmp_path / "slow/labels")
    (tmp_path / "out/labels").symlink_to(tmp_path / "slow/labels")
    common = found["code"].value_counts(sort=True).filter(~pl.col("code").str.contains("[{}]"))["code"]
    codes = [code for code in common.head(800).to_list() if len(code) < 200]
    one, two = sequences(tmp_path / "out", codes), sequences(tmp_path / "slow", codes)
    assert one.n_sequences == 249
    assert same(one, two)

    stays = {row["visit_occurrence_id"]: row for row in rows_of(folder, "visit_occurrence")}
    billed: list[dict[str, Any]] = [
        {
            "subject_id": int(row["person_id"]),
            "code": f"CONDITION//{row['condition_concept_id']}",
            "time": moment(stays[row["visit_occurrence_id"]], "visit_end"),
            "stamp": moment(row, "condition_start"),
        }
        for row in rows_of(folder, "condition_occurrence")
        if int(row["condition_type_concept_id"]) == BILLED
    ]
    assert len(billed) == 3833
    assert sum(row["stamp"] < row["time"] for row in billed) > 3700
    bill = pl.DataFrame(billed).cast({"time": pl.Datetime("us"), "stamp": pl.Datetime("us")})
    assert len(bill.join(found, on=["subject_id", "code", "time"], how="semi")) == 3833
    early = bill.drop("time").rename({"stamp": "time"}).join(bill, on=["subject_id", "code", "time"], how="anti")
    at_stamp = early.unique().join(found, on=["subject_id", "code", "time"], how="semi")
    assert at_stamp.is_empty()
