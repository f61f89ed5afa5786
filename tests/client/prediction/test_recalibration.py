"""`wardround client recalibrate`: what is fitted, on whom, and where it is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from common.errors import ConfigurationError, DataError
from common.metrics import calibration, in_the_large
from common.models.network import build_network
from common.training import state_of
from common.weights import to_bytes
from tests.client.prediction.predicting import Desk, random_weights


@pytest.fixture
def tuned(desk: Desk) -> Desk:
    """80 tuning and 80 held-out patients."""
    desk.some_tune()
    desk.labels_by_risk()
    return desk


def test_two_numbers_make_the_risks_true_where_they_were_fitted(tuned: Desk) -> None:
    """Slope and intercept are those of the tuning patients' risks; applied to them: slope 1, in the large 0."""
    plain = tuned.predict("--split", "tuning", name="plain")
    file = tuned.root / "local.yaml"
    tuned.run("recalibrate", "--out", file)
    found = yaml.safe_load(file.read_text())
    expected = calibration(plain["boolean_value"].to_numpy(), plain["predicted_boolean_probability"].to_numpy())
    assert (found["slope"], found["intercept"]) == pytest.approx(tuple(expected), abs=1e-9)
    assert found["slope"] > 1.5
    after = tuned.predict("--split", "tuning", "--recalibration", file, name="after")
    label, risk = after["boolean_value"].to_numpy(), after["predicted_boolean_probability"].to_numpy()
    assert calibration(label, risk) == pytest.approx((1.0, 0.0), abs=1e-6)
    assert in_the_large(label, risk) == pytest.approx(0.0, abs=1e-6)
    logit = np.log(plain["predicted_boolean_probability"] / (1 - plain["predicted_boolean_probability"]))
    assert risk == pytest.approx((1 / (1 + np.exp(-(expected.intercept + expected.slope * logit)))).to_numpy())


def test_held_out_patients_are_ranked_as_before(tuned: Desk) -> None:
    """AUROC and AUPRC of the held-out patients stay; the page says that there was a recalibration."""
    file = tuned.root / "local.yaml"
    tuned.run("recalibrate", "--out", file)
    tuned.predict(name="plain")
    tuned.predict("--recalibration", file, name="after")
    for measure in ("AUROC", "AUPRC"):
        assert tuned.value("scores-table", measure, "after") == tuned.value("scores-table", measure, "plain")
    assert tuned.value("scores-table", "Brier score", "after") != tuned.value("scores-table", "Brier score", "plain")
    assert "fitted here" in tuned.table("facts", "after")["local recalibration"][0]["text"]
    assert tuned.table("facts", "plain")["local recalibration"][0]["text"] == "none"


def test_the_file_is_private_new_and_of_these_weights(tuned: Desk) -> None:
    """Mode 0600, not overwritten, holding two numbers and two digests; other weights or another study are refused."""
    file = tuned.root / "local.yaml"
    tuned.run("recalibrate", "--out", file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert yaml.safe_load(file.read_text()).keys() == {"version", "study", "weights", "slope", "intercept"}
    with pytest.raises(ConfigurationError, match="exists and is not overwritten"):
        tuned.run("recalibrate", "--out", file)
    tuned.weights.write_bytes(to_bytes(random_weights(tuned.study, 1)))
    with pytest.raises(ConfigurationError, match="was fitted for weights"):
        tuned.predict("--recalibration", file, name="other")
    other = yaml.safe_load(file.read_text()) | {"study": "0" * 64}
    (tuned.root / "other.yaml").write_text(yaml.safe_dump(other))
    with pytest.raises(ConfigurationError, match="was fitted for study 000000000000"):
        tuned.predict("--recalibration", tuned.root / "other.yaml", name="other")


@pytest.mark.parametrize(
    "change", [{"slope": 0.0}, {"slope": -1.0}, {"slope": float("nan")}, {"intercept": 1e9}, {"more": 1}]
)
def test_a_file_that_cannot_be_a_recalibration_is_refused(tuned: Desk, change: dict[str, float]) -> None:
    """A slope that turns the order round, numbers that are none, keys that nobody wrote."""
    file = tuned.root / "local.yaml"
    tuned.run("recalibrate", "--out", file)
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | change))
    with pytest.raises(ConfigurationError, match=f"`{next(iter(change))}`"):
        tuned.predict("--recalibration", file, name="other")


def test_patients_who_trained_are_no_ground(tuned: Desk) -> None:
    """Where tuning patients train, the command refuses before it reads a record."""
    with pytest.raises(ConfigurationError, match="`splits` lets tuning patients train"):
        tuned.run("recalibrate", "--out", tuned.root / "local.yaml", splits=["train", "tuning"])


def test_too_few_or_wrongly_ranked_patients_give_no_file(desk: Desk) -> None:
    """Fewer than 50 tuning patients, a risk that falls with the label, and one risk for everybody are refused."""
    file = desk.root / "local.yaml"
    desk.some_tune(49 / 160)
    with pytest.raises(DataError, match="the tuning patients are too few"):
        desk.run("recalibrate", "--out", file)
    desk.some_tune(0.5)
    desk.labels_by_risk(turned=True)
    with pytest.raises(DataError, match="risk does not rise with the label"):
        desk.run("recalibrate", "--out", file)
    desk.weights.write_bytes(to_bytes(state_of(build_network(desk.study))))  # the head is zero: all risks are equal
    with pytest.raises(DataError, match="one distinct probability"):
        desk.run("recalibrate", "--out", file)
    assert not file.exists()


def test_nothing_about_it_can_be_sent() -> None:
    """No module that talks to the server, or trains, imports anything of the predictions."""
    root = Path(__file__).resolve().parents[3] / "client"
    talking = ["fleet", "service", "trainer", "app", "site", "hospital", "network", "heartbeat", "enrolment", "dry_run"]
    assert not [
        name for name in talking if "prediction" in (root / f"{name}.py").read_text().replace("prediction time", "")
    ]
