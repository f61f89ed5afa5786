"""Small made-up MEDS directories, written table by table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from simulations.meds_folder import write_frame

TASK = "outcome"
HOSPITALS = ("St. Mary", "st-anne", "7")


def made_up_source(
    root: Path,
    *,
    patients: int = 60,
    seed: int = 0,
    first_id: int = 1,
    splits: bool = True,
    label: str = "boolean_value",
    rows_per_patient: int = 1,
) -> Path:
    """A MEDS directory: a hospital as column, as code and as text, an age for most, three codes over time.

    Ids are `first_id`, `first_id + 10`, ...; every fourth patient is held out; a fifth is positive; the last two
    patients have no label.
    """
    random = np.random.default_rng(seed)
    ids = first_id + 10 * np.arange(patients)
    start = np.datetime64("2020-01-01T00:00", "us")
    events: list[dict[str, Any]] = []
    labels: list[dict[str, Any]] = []
    for place, subject in enumerate(ids.tolist()):
        hospital = HOSPITALS[place % 3]
        common = {"subject_id": subject, "hospital": hospital}
        events.append({**common, "code": "WARD", "text_value": hospital})
        events.append({**common, "code": f"WARD_NAME//{hospital}"})
        events.append({**common, "code": "WARD_NUMBER", "numeric_value": float(place % 3)})
        if place % 5:
            events.append({**common, "code": "AGE", "numeric_value": float(random.integers(20, 90))})
        days = np.sort(random.choice(300, 4, replace=False))
        for day in days:
            time = (start + np.timedelta64(int(day), "D")).astype(object)
            events.append({**common, "time": time, "code": f"CODE//{random.integers(1, 4)}"})
        for row in range(rows_per_patient):
            value = bool(random.random() < 0.2) if label == "boolean_value" else float(random.integers(0, 3))
            last = (start + np.timedelta64(int(days[-1]) + row, "D")).astype(object)
            labels.append({"subject_id": subject, "prediction_time": last, label: value})
    schema = {
        "subject_id": pl.Int64,
        "time": pl.Datetime("us"),
        "code": pl.String,
        "numeric_value": pl.Float32,
        "text_value": pl.String,
        "hospital": pl.String,
    }
    kinds = {"boolean_value": pl.Boolean, "float_value": pl.Float32, "integer_value": pl.Int64}
    frame = pl.DataFrame(labels).with_columns(
        pl.col("prediction_time").cast(pl.Datetime("us")), pl.col(label).cast(kinds[label])
    )
    write_frame(pl.DataFrame(events, schema=schema), root / "data" / "0.parquet")
    write_frame(frame, root / "labels" / "every_day.parquet")
    write_frame(frame.filter(~pl.col("subject_id").is_in(ids[-2:].tolist())), root / "labels" / f"{TASK}.parquet")
    if splits:
        split = np.where(np.arange(patients) % 4 == 3, "held_out", "train")
        write_frame(pl.DataFrame({"subject_id": ids, "split": split}), root / "metadata" / "subject_splits.parquet")
    (root / "metadata").mkdir(exist_ok=True)
    description = {"dataset_name": "made up", "site_id_columns": ["hospital"]}
    (root / "metadata" / "dataset.json").write_text(json.dumps(description))
    return root


def subjects_of(site: Path, table: str = "metadata/subject_splits.parquet") -> list[int]:
    """Distinct patients of a table, in order."""
    return pl.read_parquet(site / table)["subject_id"].unique(maintain_order=True).to_list()
