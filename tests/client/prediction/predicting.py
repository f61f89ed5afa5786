"""A hospital with a finished study's weights, and the commands that use them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from click.testing import Result
from typer.testing import CliRunner

from client.commands import app
from client.state import StateFolder
from common.models.network import build_network
from common.schema import HELD_OUT, SPLIT
from common.study import Study
from common.training import state_of
from common.weights import Weights, to_bytes
from tests.client.hospitals import write_site, write_study

SERVER = {"address": "localhost:1", "plaintext": True}
LABELS, SPLITS = "labels/diagnosis.parquet", "metadata/subject_splits.parquet"


def random_weights(study: Study, seed: int = 0) -> Weights:
    """Weights that say something else of everybody."""
    random = np.random.default_rng(seed)
    start = state_of(build_network(study))
    return {name: (array + random.normal(0, 0.3, array.shape)).astype(np.float32) for name, array in start.items()}


@dataclass
class Desk:
    """A hospital's folder: study.yaml, site.yaml, state/, records and weights."""

    root: Path
    records: Path
    study: Study
    weights: Path

    @classmethod
    def make(cls, root: Path, records: Path, **changes: Any) -> Desk:
        """With random weights; `changes` are of the study."""
        study = write_study(root, **changes)
        StateFolder(root / "state", create=True)
        weights = root / "weights.safetensors"
        weights.write_bytes(to_bytes(random_weights(study)))
        return cls(root, records, study, weights)

    def run(self, command: str, *arguments: object, **site: Any) -> Result:
        """A command with these weights; errors of ours are raised."""
        path = write_site(self.root, self.records, SERVER, **site)
        words = [command, str(path), "--weights", str(self.weights), *map(str, arguments)]
        done = CliRunner().invoke(app, words)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done

    def predict(self, *arguments: object, name: str = "out", **site: Any) -> pl.DataFrame:
        """What `client predict` wrote into folder `name`, with few resamples."""
        self.run("predict", "--out", self.root / name, "--resamples", 20, *arguments, **site)
        return pl.read_parquet(self.root / name / "predictions.parquet")

    def table(self, table: str, name: str = "out") -> dict[str, list[dict[str, Any]]]:
        """A table of evaluation.json: heading of a row -> its other cells."""
        page = json.loads((self.root / name / "evaluation.json").read_text())
        blocks = [block for section in page["sections"] for block in section["blocks"]]
        tables = [block.get("data", block) for block in blocks if "table" in block or "data" in block]
        (found,) = [one for one in tables if one["table"] == table]
        return {row[0]["text"]: row[1:] for row in found["rows"]}

    def value(self, table: str, row: str, name: str = "out", column: int = 0) -> float:
        """One number of it."""
        return float(self.table(table, name)[row][column]["value"])

    def some_tune(self, share: float = 0.5) -> None:
        """Move the first part of the held-out patients to the tuning split."""
        splits = pl.read_parquet(self.records / SPLITS)
        held_out = splits.filter(pl.col(SPLIT) == HELD_OUT)["subject_id"]
        chosen = held_out.head(round(share * len(held_out))).implode()
        moved = pl.when(pl.col("subject_id").is_in(chosen)).then(pl.lit("tuning")).otherwise(SPLIT)
        splits.with_columns(moved.alias(SPLIT)).write_parquet(self.records / SPLITS)

    def labels_by_risk(self, *, turned: bool = False, **site: Any) -> None:
        """Labels of tuning and held-out patients drawn from the model's risks, spread and shifted, or turned round."""
        found = self.predict("--split", "tuning", "--split", "held_out", name="first", **site)
        risk = found["predicted_boolean_probability"].to_numpy()
        logit = np.log(risk / (1 - risk))
        wanted = 3 * (logit - np.median(logit)) / logit.std() * (-1 if turned else 1)
        label = np.random.default_rng(5).random(len(risk)) < 1 / (1 + np.exp(-wanted))
        drawn = found.select("subject_id", "prediction_time", pl.Series("boolean_value", label))
        others = pl.read_parquet(self.records / LABELS).join(drawn, on="subject_id", how="anti")
        pl.concat([others, drawn.select(others.columns)]).write_parquet(self.records / LABELS)
