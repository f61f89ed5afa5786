"""The evaluation against scikit-learn and plain counting; small groups; groups by name."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from client.prediction.evaluation import LEAST_PATIENTS, enough
from client.prediction.groups import by_name
from common.errors import ConfigurationError
from common.groups import Grouping
from common.schema import FeatureSchema
from common.scores import MIN_EVENTS
from common.terms import load
from tests.client.hospitals import CONFIGS
from tests.client.prediction.predicting import Desk

GROUPS = """\
version: 1
subgroups:
  sex: {static: SEX//F, levels: {female: 1, male: 0}}
  age: {static: AGE, bands: [60]}
  centenarians: {static: AGE, bands: [100]}
"""


def numbers(found: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]  # of bool and of float
    return found["boolean_value"].to_numpy(), found["predicted_boolean_probability"].to_numpy()


def test_every_number_is_scikit_learns(desk: Desk) -> None:
    """AUROC, AUPRC, Brier, slope, intercept, rates and prevalence from predictions.parquet by another library."""
    label, risk = numbers(desk.predict())
    logit = np.log(risk / (1 - risk))[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # how "no penalty" is said changes between versions
        fitted = LogisticRegression(C=np.inf, tol=1e-10, max_iter=10_000).fit(logit, label)
    for row, expected in {
        "AUROC": roc_auc_score(label, risk),
        "AUPRC": average_precision_score(label, risk),
        "Brier score": brier_score_loss(label, risk),
        "prevalence": label.mean(),
    }.items():
        assert desk.value("scores-table", row) == pytest.approx(expected, abs=1e-12)
    assert desk.value("calibration-numbers", "slope") == pytest.approx(fitted.coef_[0, 0], abs=1e-5)
    assert desk.value("calibration-numbers", "intercept") == pytest.approx(fitted.intercept_[0], abs=1e-5)
    shifted = 1 / (1 + np.exp(-(logit[:, 0] + desk.value("calibration-numbers", "in the large"))))
    assert shifted.mean() == pytest.approx(label.mean(), abs=1e-9)
    flagged = risk >= desk.study.task.prevalence
    assert desk.value("scores-table", "positives flagged") == pytest.approx(flagged[label].mean())
    assert desk.value("scores-table", "negatives flagged") == pytest.approx(flagged[~label].mean())


def test_the_decision_curve_is_counted(desk: Desk) -> None:
    """Net benefit at each threshold: true positives per 100, less false ones at the threshold's odds."""
    label, risk = numbers(desk.predict())
    rows = desk.table("decision-data")
    assert len(rows) == 19
    for name, (model, everybody, nobody) in rows.items():
        threshold = float(name.removesuffix("\u00a0%")) / 100
        flagged, odds = risk >= threshold, threshold / (1 - threshold)
        expected = (flagged & label).mean() - (flagged & ~label).mean() * odds
        assert model["value"] == pytest.approx(100 * expected, abs=1e-9)
        assert everybody["value"] == pytest.approx(100 * (label.mean() - (~label).mean() * odds), abs=1e-9)
        assert nobody["value"] == 0


def test_intervals_resample_patients_not_rows(desk: Desk) -> None:
    """A record written for ten times as many rows of the same patients does not get a narrower interval."""
    desk.predict(name="once")
    labels = pl.read_parquet(desk.records / "labels/diagnosis.parquet")
    more = [labels.with_columns(pl.col("prediction_time") + pl.duration(microseconds=k)) for k in range(10)]
    pl.concat(more).write_parquet(desk.records / "labels/diagnosis.parquet")
    desk.predict(name="ten")
    one, ten = (desk.table("scores-table", name)["AUROC"][0] for name in ("once", "ten"))
    assert ten["value"] == pytest.approx(one["value"], abs=0.01)
    assert ten["high"] - ten["low"] > 0.8 * (one["high"] - one["low"])


def test_groups_are_those_of_the_records_and_small_ones_are_not_shown(desk: Desk) -> None:
    """Sex and age band as the file says; who is over 100 is too few: no number of theirs is in page or JSON."""
    (desk.root / "groups.yaml").write_text(GROUPS)
    found = desk.predict("--groups", desk.root / "groups.yaml")
    rows = desk.table("groups-table")
    events = pl.read_parquet(desk.records / "data" / "0.parquet")
    women = events.filter(pl.col("code") == "SEX//F")["subject_id"]
    mine = found.filter(pl.col("subject_id").is_in(women.implode()))
    label, risk = numbers(mine)
    assert enough(mine["subject_id"], label)
    assert rows["sex: female"][0]["value"] == len(mine)
    assert rows["sex: female"][3]["value"] == pytest.approx(roc_auc_score(label, risk))
    assert rows["all"][0]["value"] == 160
    assert rows["centenarians: >= 100"] == [{"text": "not shown"}] * 7
    assert "not shown" in (desk.root / "out" / "evaluation.html").read_text()


@pytest.mark.parametrize(
    ("patients", "rows_each", "positives", "shown"),
    [
        (LEAST_PATIENTS, 1, MIN_EVENTS, True),
        (LEAST_PATIENTS - 1, 1, MIN_EVENTS, False),
        (LEAST_PATIENTS - 1, 4, 4 * MIN_EVENTS, False),
        (LEAST_PATIENTS, 1, MIN_EVENTS - 1, False),
        (LEAST_PATIENTS, 1, LEAST_PATIENTS - MIN_EVENTS + 1, False),
    ],
)
def test_a_group_needs_patients_and_both_labels(patients: int, rows_each: int, positives: int, shown: bool) -> None:
    """50 patients, however many rows, and ten labels of each kind."""
    patient = np.repeat(np.arange(patients), rows_each)
    label = (np.arange(len(patient)) < positives).astype(float)
    assert enough(patient, label) is shown


def test_few_held_out_patients_are_said_to_be_few(desk: Desk) -> None:
    """With one positive held-out patient, the page warns at its top and shows what can be computed."""
    desk.some_tune(0.9)
    file = desk.records / "labels" / "diagnosis.parquet"
    last = pl.col("subject_id") == pl.col("subject_id").max()
    pl.read_parquet(file).with_columns(last.alias("boolean_value")).write_parquet(file)
    desk.predict()
    assert "Too few patients to rely on." in (desk.root / "out" / "evaluation.html").read_text()
    assert desk.table("scores-table")["Brier score"][0]["value"] >= 0


@pytest.mark.parametrize("positive", [True, False])
def test_labels_of_one_kind_stop_nothing(desk: Desk, positive: bool) -> None:
    """AUROC is unknown, the Brier score is not, and no NaN is on the page."""
    labels = pl.read_parquet(desk.records / "labels/diagnosis.parquet")
    labels.with_columns(pl.lit(positive).alias("boolean_value")).write_parquet(
        desk.records / "labels/diagnosis.parquet"
    )
    desk.predict()
    assert desk.table("scores-table")["AUROC"][0] == {"text": "unknown"}
    assert desk.table("scores-table")["Brier score"][0]["value"] >= 0
    json.loads((desk.root / "out" / "evaluation.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("synthetic", {"sex": ["SEX//F", "not SEX//F"], "age": [45, 60, 75]}),
        ("physionet2012", {"sex": ["Gender 0 (0 female, 1 male)", "Gender 1 (0 female, 1 male)"], "age": [45, 60, 75]}),
        (
            "diabetes130",
            {"sex": [f"GENDER//{word}" for word in ("Female", "Male", "Unknown/Invalid")], "age": [45, 60, 75]},
        ),
    ],
)
def test_sex_and_age_are_found_by_name(name: str, expected: dict[str, list[object]]) -> None:
    """In each schema that is shipped, under the schema's own names."""
    schema = load(CONFIGS / "features" / f"{name}.yaml", FeatureSchema)
    found = by_name(schema)
    assert {key: list(one.bands or one.levels or one.codes) for key, one in found.items()} == expected


def test_a_file_of_groups_that_asks_for_what_is_not_read_is_refused(desk: Desk) -> None:
    """Before any record is read."""
    (desk.root / "groups.yaml").write_text("version: 1\nsubgroups: {w: {static: WEIGHT, bands: [70]}}\n")
    with pytest.raises(ConfigurationError, match="static = WEIGHT"):
        desk.predict("--groups", desk.root / "groups.yaml")


def test_a_schema_without_sex_and_age_has_no_groups(tmp_path: Path) -> None:
    """Nothing is guessed: `AGENT` is no age."""
    schema = load(CONFIGS / "features" / "synthetic.yaml", FeatureSchema)
    other = schema.model_copy(update={"statics": {"AGENT//1": schema.statics["AGE"]}})
    assert by_name(other) == {}
    assert isinstance(by_name(schema)["age"], Grouping)
