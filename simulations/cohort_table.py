"""What is known about a cohort that was written, as a table for a person."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
from meds.schema import data_subdirectory, subject_splits_filepath
from rich.box import SIMPLE_HEAD
from rich.table import Table

from client.readers.meds import LABELS
from common.schema import BOOLEAN_VALUE, SPLIT, TRAIN
from simulations.cohort import read_truth
from simulations.optimum import optimum

POOLED = "pooled"


def table(folders: list[Path], task: str, title: str) -> Table:
    """Patients, events, prevalence and the best possible scores of each folder, and of all together.

    Args:
        folders: Of `write_cohort`.
        task: A binary one.
        title: Of the table.
    """
    out = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    out.add_column("site", overflow="fold")
    for column in ("training", "patients", "events", "prevalence", "AUROC", "AUPRC", "Brier"):
        out.add_column(column, justify="right", no_wrap=True)
    training, events, label, probability = [], [], [], []
    for folder in folders:
        training.append(int((pl.read_parquet(folder / subject_splits_filepath)[SPLIT] == TRAIN).sum()))
        events.append(pl.scan_parquet(folder / data_subdirectory / "*.parquet").select(pl.len()).collect().item())
        label.append(pl.read_parquet(folder / LABELS / f"{task}.parquet")[BOOLEAN_VALUE].to_numpy())
        probability.append(read_truth(folder, task)["probability"].to_numpy())
    for folder, *facts in zip(folders, training, events, label, probability, strict=True):
        out.add_row(folder.name, *_cells(*facts))
    out.add_section()
    out.add_row(POOLED, *_cells(sum(training), sum(events), np.concatenate(label), np.concatenate(probability)))
    return out


def _cells(training: int, events: int, label: npt.NDArray[np.bool_], probability: npt.NDArray[np.float64]) -> list[str]:
    best = optimum(probability)
    return [
        f"{training:,}",
        f"{len(label):,}",
        f"{events:,}",
        f"{label.mean():.3f}",
        f"{best.auroc:.3f}",
        f"{best.auprc:.3f}",
        f"{best.brier:.3f}",
    ]
