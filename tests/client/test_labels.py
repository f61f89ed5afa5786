"""Labels from events: what a template says of any patient's times, and the files that the command writes."""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from client.commands import app
from client.labels.stays import CENSORED, DIED, ENDED, NO_END, Labelled, Patient, Stay, label_rows, stays_of
from client.labels.terms import DeathInStay, Readmission
from client.readers.meds import MedsDirectory
from common.errors import ConfigurationError, DataError
from tests.client.hospitals import write_site, write_study

START = datetime(2020, 1, 1)
SETTINGS = settings(deadline=None, max_examples=200)
hours = st.lists(st.integers(0, 120), max_size=5).map(sorted)
patients = st.tuples(hours, hours, hours.map(lambda times: times[:1]))
deaths = st.builds(
    DeathInStay,
    kind=st.just("death_in_stay"),
    after_hours=st.integers(1, 48),
    grace_hours=st.sampled_from([0, 24]),
    stays=st.sampled_from(["first", "all"]),
)
readmissions = st.builds(
    Readmission,
    kind=st.just("readmission"),
    within_days=st.integers(1, 3),
    grace_hours=st.sampled_from([0, 24, 48]),
    stays=st.sampled_from(["first", "all"]),
)
labels = deaths | readmissions
untils = st.integers(0, 200).map(lambda hour: at(hour))


def at(hour: float) -> datetime:
    return START + timedelta(hours=hour)


def patient(times: tuple[list[int], list[int], list[int]]) -> Patient:
    return Patient(*([at(hour) for hour in some] for some in times))


def rows(who: Patient, label: DeathInStay | Readmission, until: datetime) -> tuple[list[Labelled], Counter[str]]:
    left_out: Counter[str] = Counter()
    return label_rows(who, label, until, left_out), left_out


def after(who: Patient, moment: datetime, more: Patient) -> Patient:
    """The patient with everything later than `moment` exchanged for what `more` has later."""
    return Patient(
        *(
            sorted([time for time in mine if time <= moment] + [time for time in others if time > moment])
            for mine, others in (
                (who.admissions, more.admissions),
                (who.discharges, more.discharges),
                (who.deaths, more.deaths),
            )
        )
    )


@SETTINGS
@given(times=patients, other=patients, label=labels, until=untils)
def test_no_label_looks_past_its_horizon(times: Any, other: Any, label: Any, until: datetime) -> None:
    """Whatever happens after a label's horizon: the same row is there, with the same answer."""
    who = patient(times)
    for row in rows(who, label, until)[0]:
        assert row.at < row.horizon <= until
        assert row in rows(after(who, row.horizon, patient(other)), label, until)[0]


@SETTINGS
@given(times=patients, label=labels, until=untils)
def test_what_makes_a_label_true_is_after_the_prediction(times: Any, label: Any, until: datetime) -> None:
    """A positive needs a death or an admission in (prediction, horizon]: without these it is negative or gone."""
    who = patient(times)
    for row in rows(who, label, until)[0]:
        causes = who.deaths if isinstance(label, DeathInStay) else who.admissions
        within = [time for time in causes if row.at < time <= row.horizon]
        if isinstance(label, DeathInStay):
            assert row.positive == bool(within)
        else:
            assert row.positive == any(time <= row.at + timedelta(days=label.within_days) for time in within)


@SETTINGS
@given(times=patients, label=labels, until=untils)
def test_every_stay_has_a_label_or_is_counted(times: Any, label: Any, until: datetime) -> None:
    """Labels and reasons together are the stays that are asked about; no two rows share a prediction time."""
    who = patient(times)
    found, left_out = rows(who, label, until)
    asked = stays_of(who)[: 1 if label.stays == "first" else None]
    assert len(found) + left_out.total() == len(asked)
    assert len({row.at for row in found}) == len(found)


@SETTINGS
@given(times=patients)
def test_stays_follow_each_other(times: Any) -> None:
    """Stays do not overlap, begin with an admission, end with the first discharge or death after it."""
    who = patient(times)
    stays = stays_of(who)
    for stay in stays:
        ends = sorted(time for time in [*who.discharges, *who.deaths] if time > stay.start)
        assert stay.start in who.admissions
        assert stay.end == (ends[0] if ends else None)
        assert stay.died == (stay.end in who.deaths)
    for one, next_one in pairwise(stays):
        assert one.end is not None
        assert one.end <= next_one.start


FAR = at(10_000)
DEATH = DeathInStay(kind="death_in_stay", after_hours=48, stays="all")
DATED = DeathInStay(kind="death_in_stay", after_hours=48, grace_hours=24)
AGAIN = Readmission(kind="readmission", within_days=30, stays="all")
MONTH = 30 * 24


@pytest.mark.parametrize(
    ("times", "label", "until", "expected"),
    [
        (([0], [100], []), DEATH, FAR, [(48, False)]),
        (([0], [], [100]), DEATH, FAR, [(48, True)]),
        (([0], [100], [100]), DEATH, FAR, [(48, True)]),
        (([0], [100], [101]), DEATH, FAR, [(48, False)]),
        (([0], [100], [101]), DATED, FAR, [(48, True)]),
        (([0], [100], [125]), DATED, FAR, [(48, False)]),
        (([0], [], [48]), DEATH, FAR, ENDED),
        (([0], [47], []), DEATH, FAR, ENDED),
        (([0], [], []), DEATH, FAR, NO_END),
        (([0], [100], []), DEATH, at(99), CENSORED),
        (([0], [100], []), DATED, at(123), CENSORED),
        (([0, 50], [100], []), DEATH, FAR, [(48, False)]),  # a move within the stay
        (([0, 200], [100, 300], []), DEATH, FAR, [(48, False), (248, False)]),
        (([0], [10], []), AGAIN, FAR, [(10, False)]),
        (([0, 10 + MONTH], [10], []), AGAIN, at(10 + MONTH), [(10, True)]),
        (([0, 11 + MONTH], [10], []), AGAIN, at(10 + MONTH), [(10, False)]),
        (([0, 20], [10], []), AGAIN, at(9 + MONTH), CENSORED),  # a positive that was seen is left out, too
        (([0], [], [10]), AGAIN, FAR, DIED),
        (([0], [10], [11]), AGAIN, FAR, [(10, False)]),
        (([0, 10], [10], []), AGAIN, FAR, [(10, False)]),  # at the prediction time: it is an input, not the outcome
    ],
)
def test_labels_of_simple_patients(times: Any, label: Any, until: datetime, expected: Any) -> None:
    """Each rule, once: prediction hour and answer, or the reason for which there is none."""
    found, left_out = rows(patient(times), label, until)
    if isinstance(expected, str):
        assert not found
        assert left_out[expected] == 1
    else:
        assert [(row.at, row.positive) for row in found] == [(at(hour), answer) for hour, answer in expected]


def test_a_death_soon_after_the_discharge_is_no_missed_readmission() -> None:
    """Where deaths are dates, at 23:59:59, one on the day of the discharge ended the stay."""
    label = Readmission(kind="readmission", within_days=30, grace_hours=24)
    assert rows(patient(([0], [10], [11])), label, FAR) == ([], Counter({DIED: 1}))


def test_an_admission_written_twice_is_one_stay() -> None:
    """The same time twice, as two rows of an extract give it."""
    assert stays_of(patient(([5, 5], [9], []))) == [Stay(at(5), at(9))]


CODES = {
    "admission": ["ADMISSION//*"],
    "discharge": ["DISCHARGE//*"],
    "death": ["MEDS_DEATH"],
    "observed_until": "2021-01-01",
}
TASK = {"version": 1, "name": "in_hospital_death", "label": {"kind": "death_in_stay", "after_hours": 48}}
EVENTS = [(1, 0, "ADMISSION//ER"), (1, 100, "DISCHARGE//HOME"), (2, 0, "ADMISSION//ER"), (2, 90, "MEDS_DEATH")]
EVENTS += [(3, 0, "ADMISSION//ER"), (4, 3, "CODE//1"), *((who, 1, "CODE//1") for who in (1, 2, 3))]


@pytest.fixture
def site(own_process: None, tmp_path: Path) -> Path:
    (tmp_path / "records" / "data").mkdir(parents=True)
    write_events(tmp_path / "records", EVENTS)
    write_study(tmp_path)
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(TASK))
    return tmp_path


def write_events(records: Path, events: list[tuple[int, int, str]]) -> None:
    pl.DataFrame(
        [(who, at(hour), code, None) for who, hour, code in events],
        schema={"subject_id": pl.Int64, "time": pl.Datetime("us"), "code": pl.String, "numeric_value": pl.Float32},
        orient="row",
    ).write_parquet(records / "data" / "0.parquet")


def label(site: Path, **changes: Any) -> str:
    """Output of the command; errors of ours are raised."""
    path = write_site(site, site / "records", {"address": "localhost:1", "plaintext": True}, **changes)
    done = CliRunner().invoke(app, ["label", str(site / "task.yaml"), str(path)])
    if done.exception is not None:
        raise done.exception
    return done.output


def written(site: Path) -> list[tuple[Any, ...]]:
    return MedsDirectory(site / "records").labels("in_hospital_death").rows()


def test_the_file_is_what_a_study_reads(site: Path) -> None:
    """Rows as the reader wants them; who has none is counted; the file is this user's alone."""
    output = label(site, label_codes=CODES)
    assert written(site) == [(1, at(48), False), (2, at(48), True)]
    assert "2 labels of 2 patients, 1 positive" in output
    assert f"left out: 1 {NO_END}" in output
    assert (site / "records/labels/in_hospital_death.parquet").stat().st_mode & 0o077 == 0
    assert [path.name for path in (site / "records/labels").iterdir()] == ["in_hospital_death.parquet"]


def test_no_patient_changes_anothers_label(site: Path) -> None:
    """Without patient 2, whose death is the newest event, the others' rows are the same: neighbours differ in one."""
    write_events(site / "records", [event for event in EVENTS if event[0] != 2])
    label(site, label_codes=CODES)
    assert written(site) == [(1, at(48), False)]


def test_what_cannot_be_labelled_is_one_clear_error(site: Path) -> None:
    """No codes, codes that are nowhere, a code with two meanings, an end with a zone, a file that is there."""
    with pytest.raises(ConfigurationError, match="has no `label_codes`"):
        label(site)
    with pytest.raises(DataError, match="no label; no admission was found; compare `label_codes`"):
        label(site, label_codes=CODES | {"admission": ["ADM"]})
    with pytest.raises(ConfigurationError, match="a code is in two of admission, discharge and death"):
        label(site, label_codes=CODES | {"death": ["DISCHARGE//HOME"]})
    with pytest.raises(ConfigurationError, match="stands for every code"):
        label(site, label_codes=CODES | {"death": ["*"]})
    with pytest.raises(ConfigurationError, match=r"label_codes\.observed_until"):
        label(site, label_codes=CODES | {"observed_until": "2021-01-01T00:00:00Z"})
    label(site, label_codes=CODES)
    with pytest.raises(ConfigurationError, match="exists and is not overwritten"):
        label(site, label_codes=CODES)


def test_a_task_with_an_unknown_template_is_refused(site: Path) -> None:
    """The error names the file and what is known."""
    (site / "task.yaml").write_text(yaml.safe_dump(TASK | {"label": {"kind": "next_visit"}}))
    with pytest.raises(ConfigurationError, match=r"task\.yaml.*death_in_stay"):
        label(site, label_codes=CODES)


def test_the_examples_of_the_page_are_valid(site: Path) -> None:
    """Both task files and the site's codes of docs/check.md load, and make labels."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "check.md").read_text()
    blocks = [yaml.safe_load(part.split("```")[0]) for part in page.split("```yaml\n")[1:]]
    tasks = [block for block in blocks if "label" in block]
    (codes,) = (block["label_codes"] for block in blocks if "label_codes" in block)
    for task in tasks:
        (site / "task.yaml").write_text(yaml.safe_dump(task))
        codes_here = codes | {"admission": ["ADMISSION//*"], "discharge": ["DISCHARGE//*"]}
        assert "labels of" in label(site, label_codes=codes_here)
    assert len(tasks) == 2
