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
from client.labels.rules import CENSORED, DEAD, DIED, ENDED, HAD, NO_END, NO_NEXT, Labelled, label_rows
from client.labels.stays import Patient, Stay, stays_of
from client.labels.terms import DeathInStay, FirstCode, Label, LongStay, NextVisit, Readmission
from client.readers.meds import MedsDirectory
from common.errors import ConfigurationError, DataError
from tests.client.hospitals import write_site, write_study

START = datetime(2020, 1, 1)
SETTINGS = settings(deadline=None, max_examples=200)
hours = st.lists(st.integers(0, 120), max_size=5).map(sorted)
patients = st.tuples(hours, hours, hours.map(lambda times: times[:1]), hours)
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
long_stays = st.builds(
    LongStay,
    kind=st.just("long_stay"),
    over_days=st.integers(1, 3),
    after_hours=st.integers(1, 23),
    stays=st.sampled_from(["first", "all"]),
)
first_codes = st.builds(
    FirstCode,
    kind=st.just("first_code"),
    codes=st.just(["CODE"]),
    predict=st.sampled_from(["admission", "discharge"]),
    within_days=st.integers(1, 3),
    grace_hours=st.integers(0, 23),
    stays=st.sampled_from(["first", "all"]),
)
next_visits = st.builds(
    NextVisit,
    kind=st.just("next_visit"),
    sets=st.just({"one": ["CODE"]}),
    grace_hours=st.sampled_from([0, 24]),
    stays=st.sampled_from(["first", "all"]),
)
labels = deaths | readmissions | long_stays | first_codes | next_visits
untils = st.integers(0, 200).map(lambda hour: at(hour))


def at(hour: float) -> datetime:
    return START + timedelta(hours=hour)


def patient(times: tuple[list[int], ...]) -> Patient:
    return Patient(*([at(hour) for hour in some] for some in times))


def rows(who: Patient, label: Label, until: datetime) -> tuple[list[Labelled], Counter[str]]:
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
                (who.codes, more.codes),
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
    """A positive is an event in (prediction, horizon], or its absence there for a long stay: checked another way."""
    who = patient(times)
    for row in rows(who, label, until)[0]:
        assert row.positive == expected_answer(who, label, row)


def expected_answer(who: Patient, label: Label, row: Labelled) -> bool:
    def within(times: Any, last: datetime = row.horizon) -> bool:
        return any(row.at < time <= last for time in times)

    if isinstance(label, DeathInStay):
        return within(who.deaths)
    if isinstance(label, Readmission):
        return within(who.admissions, row.at + timedelta(days=label.within_days))
    if isinstance(label, LongStay):
        return not within([*who.discharges, *who.deaths])
    if isinstance(label, FirstCode):
        assert not any(time <= row.at for time in who.codes)
        return within(who.codes)
    stays = stays_of(who)
    (here,) = (place for place, stay in enumerate(stays) if stay.end == row.at)
    end = stays[here + 1].end
    assert end is not None
    after_it = [stay.start for stay in stays[here + 2 :]]
    mine = [
        time for time in who.codes if time >= stays[here + 1].start and (time <= end or time < min([*after_it, FAR]))
    ]
    return within(mine)


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
    """Stays do not overlap, begin with an admission, end with the first discharge or death that is left to them."""
    who = patient(times)
    stays = stays_of(who)
    for before, stay in zip([None, *stays], stays, strict=False):
        taken = before is not None and before.end == stay.start
        ends = sorted(t for t in [*who.discharges, *who.deaths] if t > stay.start or (t == stay.start and not taken))
        assert stay.start in who.admissions
        assert stay.end == (ends[0] if ends else None)
        assert stay.died == (stay.end in who.deaths)
    for one, next_one in pairwise(stays):
        assert one.end is not None
        assert one.end <= next_one.start
        assert one.start < next_one.start


FAR = at(10_000)
DEATH = DeathInStay(kind="death_in_stay", after_hours=48, stays="all")
DATED = DeathInStay(kind="death_in_stay", after_hours=48, grace_hours=24)
AGAIN = Readmission(kind="readmission", within_days=30, stays="all")
MONTH = 30 * 24
WEEK = 7 * 24
LONG = LongStay(kind="long_stay", over_days=7, after_hours=48)
FIRST = FirstCode(kind="first_code", codes=["C"], within_days=30, stays="all")
FIRST_IN = FirstCode(kind="first_code", codes=["C"], within_days=30, predict="admission", after_hours=6)
FIRST_DATED = FirstCode(kind="first_code", codes=["C"], within_days=30, grace_hours=24)
NEXT = NextVisit(kind="next_visit", sets={"c": ["C"]})
NEXT_DATED = NextVisit(kind="next_visit", sets={"c": ["C"]}, grace_hours=24)


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
        (([0], [WEEK + 1], []), LONG, at(WEEK), [(48, True)]),
        (([0], [WEEK], []), LONG, FAR, [(48, False)]),  # over seven days, not seven
        (([0], [], [WEEK - 1]), LONG, FAR, [(48, False)]),
        (([0], [], []), LONG, at(WEEK), [(48, True)]),  # still there
        (([0], [], []), LONG, at(WEEK - 1), CENSORED),
        (([0], [48], []), LONG, FAR, ENDED),
        (([0], [10], [], [10 + MONTH]), FIRST, at(10 + MONTH), [(10, True)]),
        (([0], [10], [], [11 + MONTH]), FIRST, at(10 + MONTH), [(10, False)]),
        (([0], [10], [], []), FIRST, at(9 + MONTH), CENSORED),
        (([0], [10], [], [20]), FIRST, at(9 + MONTH), CENSORED),  # a positive that was seen is left out, too
        (([0], [10], [], [10, 20]), FIRST, FAR, HAD),  # at the prediction time: it is an input
        (([0], [10], [], [-5000]), FIRST, FAR, HAD),
        (([0, 50], [10, 60], [], [55]), FIRST, FAR, [(10, True)]),  # the second stay has had it
        (([0], [], [10], []), FIRST, FAR, DEAD),
        (([0], [], [], []), FIRST, FAR, NO_END),
        (([0], [10], [20], []), FIRST, FAR, [(10, False)]),  # died without it: followed to the end
        (([0], [10], [], [34]), FIRST_DATED, FAR, HAD),
        (([0], [10], [], [35]), FIRST_DATED, FAR, [(10, True)]),
        (([0], [], [], [7]), FIRST_IN, FAR, [(6, True)]),
        (([0], [], [], [6]), FIRST_IN, FAR, HAD),
        (([0], [], [3], []), FIRST_IN, FAR, DEAD),
        (([0, 50], [10, 60], [], [50]), NEXT, FAR, [(10, True)]),
        (([0, 50], [10, 60], [], [60]), NEXT, at(60), [(10, True)]),
        (([0, 50], [10, 60], [], [61]), NEXT, FAR, [(10, False)]),
        (([0, 50], [10, 60], [], [40]), NEXT, FAR, [(10, False)]),  # between two stays
        (([0, 50], [10, 60], [], [61]), NEXT_DATED, FAR, [(10, True)]),
        (([0, 50, 70], [10, 60, 80], [], [71]), NEXT_DATED, FAR, [(10, False), (60, True)]),  # of the stay after it
        (([0, 10], [10, 20], [], [10]), NEXT, FAR, [(10, False)]),  # at the prediction time: it is an input
        (([0, 50], [10, 60], [], [50]), NEXT, at(59), CENSORED),
        (([0], [10], [], []), NEXT, FAR, NO_NEXT),
        (([0], [], [10], []), NEXT, FAR, DIED),
        (([0, 50], [10], [], [55]), NEXT, FAR, NO_END),
    ],
)
def test_labels_of_simple_patients(times: Any, label: Any, until: datetime, expected: Any) -> None:
    """Each rule, once: prediction hour and answer, or the reason for which there is none."""
    found, left_out = rows(patient(times), label, until)
    if isinstance(expected, str):
        assert not found
        assert left_out[expected] >= 1
    else:
        assert [(row.at, row.positive) for row in found] == [(at(hour), answer) for hour, answer in expected]


def test_a_death_soon_after_the_discharge_is_no_missed_readmission() -> None:
    """Where deaths are dates, at 23:59:59, one on the day of the discharge ended the stay."""
    label = Readmission(kind="readmission", within_days=30, grace_hours=24)
    assert rows(patient(([0], [10], [11])), label, FAR) == ([], Counter({DIED: 1}))


def test_a_stay_of_no_time_does_not_run_into_the_next_one() -> None:
    """Admission and discharge at one moment, as by date, are a stay; a discharge that ends a stay ends no other."""
    assert stays_of(patient(([5, 5, 50], [5, 60], []))) == [Stay(at(5), at(5)), Stay(at(50), at(60))]
    assert stays_of(patient(([0, 5], [5, 60], []))) == [Stay(at(0), at(5)), Stay(at(5), at(60))]
    assert stays_of(patient(([5], [], [5]))) == [Stay(at(5), at(5), died=True)]
    assert rows(patient(([5], [], [5])), AGAIN, FAR) == ([], Counter({DIED: 1}))


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
    (site / "task.yaml").write_text(yaml.safe_dump(TASK | {"label": {"kind": "length_of_stay"}}))
    with pytest.raises(
        ConfigurationError, match=r"task\.yaml.*death_in_stay, readmission, long_stay, first_code, next_visit"
    ):
        label(site, label_codes=CODES)
