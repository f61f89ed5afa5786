"""`wardround client predict`: for whom, in which columns, and that what is written is whole and stays private."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from client.prediction import output
from client.readers.meds import read
from client.state import SPLIT_KEY
from common.batching import Dataset
from common.errors import ConfigurationError, DataError
from common.models.network import build_network
from common.training import load_state, predict
from common.weights import from_bytes
from tests.client.prediction.predicting import LABELS, SPLITS, Desk

COLUMNS = {
    "subject_id": pl.Int64(),
    "prediction_time": pl.Datetime("us"),
    "boolean_value": pl.Boolean(),
    "predicted_boolean_value": pl.Boolean(),
    "predicted_boolean_probability": pl.Float64(),
}


def labels(desk: Desk, split: str | None = None) -> pl.DataFrame:
    """The label rows, of a split or all, by patient and time."""
    rows = pl.read_parquet(desk.records / LABELS).sort("subject_id", "prediction_time")
    if split is None:
        return rows
    splits = pl.read_parquet(desk.records / SPLITS).filter(pl.col("split") == split)
    return rows.join(splits, on="subject_id", how="semi")


def rows_file(desk: Desk, rows: pl.DataFrame) -> Path:
    rows.write_parquet(desk.root / "rows.parquet")
    return desk.root / "rows.parquet"


def test_held_out_patients_are_predicted_by_the_network(desk: Desk) -> None:
    """Without options: the five columns, a row per held-out label row, the network's own probabilities to the bit."""
    found = desk.predict()
    assert dict(found.schema) == COLUMNS
    study, records = desk.study, desk.study.records
    mine = labels(desk, "held_out")
    assert found.select("subject_id", "prediction_time", "boolean_value").equals(
        mine.select("subject_id", "prediction_time", "boolean_value")
    )
    network = build_network(study)
    load_state(network, from_bytes(desk.weights.read_bytes()))
    sequences = read(
        desk.records, "diagnosis", study.features, "held_out", max_steps=records.max_steps, bin_hours=records.bin_hours
    )
    expected = predict(network, Dataset(sequences))
    assert found["predicted_boolean_probability"].to_list() == expected.tolist()
    assert found["predicted_boolean_value"].to_list() == (expected >= study.task.prevalence).tolist()
    assert len(set(expected)) > 100


def test_the_csv_says_the_same(desk: Desk) -> None:
    """predictions.csv, only when asked for, holds the rows of the Parquet file."""
    found = desk.predict("--csv", "--threshold", 0.3)
    again = pl.read_csv(desk.root / "out" / "predictions.csv", schema_overrides=COLUMNS)
    assert again.equals(found)
    assert found["predicted_boolean_value"].to_list() == (found["predicted_boolean_probability"] >= 0.3).to_list()
    desk.predict(name="other")
    assert not (desk.root / "other" / "predictions.csv").exists()


def test_training_patients_are_predicted_when_asked_and_never_judged(desk: Desk) -> None:
    """With every split there are more rows, and the evaluation is that of the held-out patients alone."""
    desk.predict()
    found = desk.predict("--split", "train", "--split", "held_out", name="all")
    assert len(found) == len(labels(desk))
    assert desk.table("scores-table", "all") == desk.table("scores-table")
    desk.predict("--split", "train", name="train")
    assert not (desk.root / "train" / "evaluation.html").exists()
    with pytest.raises(ConfigurationError, match="split 'test' is unknown; use train, tuning, held_out"):
        desk.predict("--split", "test", name="test")


def test_rows_of_ones_own_need_no_label(desk: Desk) -> None:
    """--rows: patients and times of a file; no label is null, a label of a training patient is left out."""
    train, held_out = labels(desk, "train").head(3), labels(desk, "held_out").head(4)
    unknown = train.with_columns(pl.lit(None, pl.Boolean).alias("boolean_value"))
    known = pl.concat([labels(desk, "train").tail(2), held_out])
    found = desk.predict("--rows", rows_file(desk, pl.concat([unknown, known])))
    assert found["subject_id"].to_list() == sorted([*train["subject_id"], *held_out["subject_id"]])
    labelled = found.filter(pl.col("boolean_value").is_not_null())
    assert labelled["subject_id"].to_list() == held_out["subject_id"].to_list()
    without = desk.predict("--rows", rows_file(desk, unknown.drop("boolean_value")), name="without")
    assert without["boolean_value"].null_count() == 3
    both = found.join(without, on="subject_id")
    assert both["predicted_boolean_probability"].to_list() == both["predicted_boolean_probability_right"].to_list()
    assert not (desk.root / "without" / "evaluation.html").exists()


def test_a_missing_label_changes_no_prediction(desk: Desk) -> None:
    """The label is no input: with labels turned round or unknown the probabilities are the same."""
    rows = labels(desk, "held_out")
    true = desk.predict("--rows", rows_file(desk, rows))
    turned = desk.predict("--rows", rows_file(desk, rows.with_columns(~pl.col("boolean_value"))), name="turned")
    null = desk.predict("--rows", rows_file(desk, rows.drop("boolean_value")), name="null")
    column = "predicted_boolean_probability"
    assert true[column].equals(turned[column])
    assert true[column].equals(null[column])


def test_patients_without_a_row_are_predicted_at_their_last_event(desk: Desk) -> None:
    """--unlabelled adds whoever has events and no row, with a null label, at the time of the last event."""
    all_rows = labels(desk)
    gone = all_rows.head(5)["subject_id"]
    all_rows.filter(~pl.col("subject_id").is_in(gone.implode())).write_parquet(desk.records / LABELS)
    found = desk.predict("--unlabelled").filter(pl.col("boolean_value").is_null())
    assert found["subject_id"].to_list() == gone.to_list()
    events = pl.read_parquet(desk.records / "data" / "0.parquet")
    last = events.group_by("subject_id").agg(pl.col("time").max())
    assert found["prediction_time"].to_list() == found.join(last, on="subject_id", how="left")["time"].to_list()


def test_who_opted_out_is_predicted_nowhere(desk: Desk) -> None:
    """Neither from the label file nor from --rows nor as somebody without a row."""
    out = labels(desk, "held_out").head(5)["subject_id"].to_list()
    (desk.root / "out.csv").write_text("subject_id\n" + "\n".join(map(str, out)) + "\n")
    rows = rows_file(desk, labels(desk, "held_out").head(10).drop("boolean_value"))
    for number, options in enumerate([(), ("--unlabelled",), ("--rows", rows)]):
        found = desk.predict(*options, name=str(number), exclude="out.csv")
        assert len(found) >= 5
        assert not set(out) & set(found["subject_id"])


def test_a_patient_is_predicted_at_every_visit(desk: Desk) -> None:
    """Two label rows of a patient: two predictions, the earlier from the earlier record; counted both ways."""
    rows = labels(desk)
    earlier = rows.with_columns(pl.col("prediction_time") - timedelta(days=30))
    events = pl.read_parquet(desk.records / "data" / "0.parquet").drop_nulls("time")
    first = events.group_by("subject_id").agg(pl.col("time").min())
    earlier = earlier.join(first, on="subject_id").filter(pl.col("prediction_time") >= pl.col("time")).drop("time")
    pl.concat([rows, earlier]).write_parquet(desk.records / LABELS)
    found = desk.predict()
    alone = desk.predict("--rows", rows_file(desk, earlier), name="alone")
    assert len(found) > len(labels(desk, "held_out").unique("subject_id"))
    assert (
        found.join(alone, on=["subject_id", "prediction_time"])
        .select((pl.col("predicted_boolean_probability") - pl.col("predicted_boolean_probability_right")).abs().max())
        .item()
        <= 1e-7
    )  # other patients share the batch: a last bit may differ
    assert len(desk.table("scores-table")["AUROC"]) == 2
    counts = found.group_by("subject_id").len()
    weight = 1 / found.join(counts, on="subject_id", how="left")["len"].to_numpy()
    expected = np.average(found["boolean_value"].to_numpy(), weights=weight)
    assert desk.value("scores-table", "prevalence", column=1) == pytest.approx(expected)


@pytest.mark.parametrize("task", ["phenotype_0", "phenotype_2"])
def test_each_of_many_labels_is_a_task(own_process: None, cohort: dict[str, Path], tmp_path: Path, task: str) -> None:
    """A multi-label problem is a task per label: its own label file, weights and predictions, joined by patient."""
    desk = Desk.make(tmp_path, cohort["north"], task={"name": task, "prevalence": 0.2})
    found = desk.predict()
    truth = pl.read_parquet(desk.records / "labels" / f"{task}.parquet")
    both = found.join(truth, on=["subject_id", "prediction_time"])
    assert len(both) == len(found) == 160
    assert both["boolean_value"].equals(both["boolean_value_right"])


@pytest.mark.parametrize("task", ["time_to_readmission", "next_visit"])
def test_another_kind_of_label_is_refused(
    own_process: None, cohort: dict[str, Path], tmp_path: Path, task: str
) -> None:
    """A time to an event and a category are refused by name, with what to do instead."""
    desk = Desk.make(tmp_path, cohort["north"], task={"name": task, "prevalence": 0.2})
    with pytest.raises(DataError, match=r"probabilities of a yes or no.*make a yes or no of it"):
        desk.predict()


def test_files_are_whole_and_for_this_user_alone(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folder 0700, files 0600; a failure while writing leaves no folder; what is there is never overwritten."""
    desk.predict("--csv")
    out = desk.root / "out"
    assert out.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o600}
    before = sorted(path.name for path in desk.root.iterdir())
    with pytest.raises(ConfigurationError, match="is not empty; name a new folder"):
        desk.predict()

    def no_space(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output, "_sync", no_space)
    with pytest.raises(ConfigurationError, match=r"cannot be written \(No space left on device\); make room"):
        desk.predict(name="full")
    assert sorted(path.name for path in desk.root.iterdir()) == before


def test_nobody_is_named_but_in_the_predictions(desk: Desk) -> None:
    """Ids unlike any count are in predictions.parquet, and in no line, page or error."""
    base = 7_654_300_000
    for file in ("data/0.parquet", LABELS, SPLITS):
        frame = pl.read_parquet(desk.records / file)
        frame.with_columns(pl.col("subject_id") + base).write_parquet(desk.records / file)
    said = desk.run("predict", "--out", desk.root / "out", "--resamples", 20).output
    said += "".join((desk.root / "out" / f"evaluation.{kind}").read_text() for kind in ("html", "json"))
    stranger = labels(desk).head(1).with_columns(pl.col("subject_id") + 1_000_000)
    with pytest.raises(DataError, match="without any event") as error:
        desk.predict("--rows", rows_file(desk, stranger.drop("boolean_value")), name="other")
    assert "76543" not in (said + str(error.value)).replace(",", "")
    assert pl.read_parquet(desk.root / "out" / "predictions.parquet")["subject_id"].min() > base  # type: ignore[operator]


def test_without_a_split_key_nobody_is_called_held_out(desk: Desk) -> None:
    """No split file and no key: refused, and no key is made; with the key, its own split is the one that is judged."""
    (desk.records / SPLITS).unlink()
    with pytest.raises(ConfigurationError, match="nobody can tell who was held out"):
        desk.predict()
    assert not (desk.root / "state" / SPLIT_KEY).exists()
    (desk.root / "state" / SPLIT_KEY).write_bytes(bytes(range(32)))
    (desk.root / "state" / SPLIT_KEY).chmod(0o600)
    assert 10 < len(desk.predict()) < 80  # 15 % of 240


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.drop("subject_id"), "column `subject_id` is missing"),
        (lambda rows: rows.with_columns(boolean_value=pl.lit(1)), "is Int32, expected boolean"),
        (lambda rows: pl.concat([rows, rows]), "repeat a patient and prediction time"),
        (lambda rows: rows.with_columns(pl.col("prediction_time").dt.date()), "expected a date-time"),
        (lambda rows: rows.clear(), "no label rows"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(desk: Desk, change: object, message: str) -> None:
    """A file of rows with wrong columns, types or repeated rows is one clear error."""
    path = rows_file(desk, change(labels(desk)))  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        desk.predict("--rows", path)
