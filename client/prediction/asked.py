"""Which predictions are asked for: rows of patient and time, with the label where it is known.

Rows come from the task's label file, or from a file of the same form in which the label may be missing. A patient
without any row may be predicted at the last event of the record, where that is a sensible time for the task; the
program cannot know, so a person asks for it.

Decisions a reader would question:

- A label that is not known is null in what is written and False in what is read into sequences: the network does not
  look at it, and one way of reading records is easier to trust than two.
- A split decides about rows with a label alone. A row without one is predicted whoever the patient is, and never
  judged: there is nothing to judge it by.
- The split key is read and never made here: with a fresh key, "held out" would be a new draw, and most of those
  patients would have trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from meds.schema import subject_splits_filepath
from numpy.typing import NDArray

from client.readers.meds import LABELS, MedsDirectory
from client.readers.optouts import read_optouts
from client.readers.own import open_records
from client.site_file import SiteFile
from client.state import SPLIT_KEY, StateFolder
from common.errors import ConfigurationError, DataError
from common.events import checked_labels
from common.schema import BOOLEAN_VALUE, HELD_OUT, PREDICTION_TIME, SPLIT, SPLITS, SUBJECT_ID, TIME
from common.sequences import Sequences, build

if TYPE_CHECKING:
    from common.study import Study

OTHER_LABELS = ("integer_value", "float_value", "categorical_value")  # the other kinds of label that MEDS knows


@dataclass(frozen=True, eq=False, repr=False)
class Asked:
    """S sequences to predict for.

    Attributes:
        sequences: S sequences; `label` means something only where `known`.
        known: [S] bool: the label is known.
        held_out: [S] bool: the label is known, and the patient is held out.
    """

    sequences: Sequences
    known: NDArray[np.bool_]
    held_out: NDArray[np.bool_]

    def __repr__(self) -> str:
        return "Asked(records of patients, not printed)"


def ask(
    site: SiteFile,
    study: Study,
    state: StateFolder,
    *,
    splits: tuple[str, ...] = (HELD_OUT,),
    rows: Path | None = None,
    unlabelled: bool = False,
) -> Asked:
    """Read what is asked for, without the patients who opted out.

    Args:
        site, study, state: this hospital's.
        splits: rows with a label are taken from these.
        rows: a Parquet file with subject_id, prediction_time and, if known, boolean_value; None: the label file.
        unlabelled: also every patient without a row, at the last event of the record.

    Raises:
        DataError: records, rows or splits that cannot be used, a task that is no yes or no, or nothing is left.
        ConfigurationError: an unknown split, a code map that cannot be used, or nobody can tell which patients were
            held out.
    """
    for name in splits:
        if name not in SPLITS:
            raise ConfigurationError(f"split {name!r} is unknown; use {', '.join(SPLITS)}")
    directory = open_records(site, study.features)
    source = directory.root / LABELS / f"{study.task.name}.parquet" if rows is None else rows
    _require_yes_or_no(source, study.task.name)
    if rows is None:
        asked = directory.labels(study.task.name)
    else:
        asked = _read_rows(rows)
        if site.exclude is not None:
            asked = asked.filter(~pl.col(SUBJECT_ID).is_in(read_optouts(Path(site.exclude)).implode()))
    asked = asked.join(_splits(directory, asked, state), on=SUBJECT_ID, how="left", maintain_order="left")
    coverage = directory.coverage(study.features)  # first: it refuses ids and times that cannot be used
    if unlabelled:
        others = _last_events(directory, study).join(asked, on=SUBJECT_ID, how="anti")
        asked = pl.concat([asked, others], how="diagonal")
    known = pl.col(BOOLEAN_VALUE).is_not_null()
    asked = asked.filter(~known | pl.col(SPLIT).is_in(splits)).sort(SUBJECT_ID, PREDICTION_TIME)
    if asked.is_empty():
        raise DataError(f"{source}: no row of split {' or '.join(splits)} and none without a label; nothing to predict")
    sequences = build(
        directory.events(study.features),
        asked.select(SUBJECT_ID, PREDICTION_TIME, pl.col(BOOLEAN_VALUE).fill_null(False)),
        study.features,
        max_steps=study.records.max_steps,
        bin_hours=study.records.bin_hours,
        source=str(directory.data),
        label_source=str(source),
        coverage=coverage,
    )
    held_out = asked.select((known & (pl.col(SPLIT) == HELD_OUT)).fill_null(False)).to_series()
    return Asked(sequences, asked.select(known).to_series().to_numpy(), held_out.to_numpy())


def _require_yes_or_no(source: Path, task: str) -> None:
    """Refuse a label file of another kind of task; a file that cannot be read is somebody else's error.

    A time to an event comes with a yes or no beside it, whether it was seen, which is not what a study predicts.
    """
    try:
        scan = pl.scan_parquet(source, glob=False)
        others = [name for name in OTHER_LABELS if name in scan.collect_schema()]
        filled = scan.select(pl.col(others).count()).collect().row(0, named=True) if others else {}
    except (pl.exceptions.PolarsError, OSError):
        return
    other = next((name for name, count in filled.items() if count), None)
    if other is not None:
        raise DataError(
            f"{source}: task {task} has `{other}`; predictions are probabilities of a yes or no, so times to an event, "
            "numbers and categories are refused: make a yes or no of it, such as `within 30 days`, and a study for that"
        )


def _read_rows(path: Path) -> pl.DataFrame:
    """Rows of a person's own file, the label null where it is not known; sorted as `checked_labels` sorts."""
    try:
        table = pl.read_parquet(path, glob=False)
    except (pl.exceptions.PolarsError, OSError) as error:  # its text may quote the file's content
        raise DataError(f"{path}: cannot be read as parquet ({type(error).__name__}); write the file again") from None
    if BOOLEAN_VALUE not in table.columns or table[BOOLEAN_VALUE].dtype == pl.Null:
        table = table.with_columns(pl.lit(None, pl.Boolean).alias(BOOLEAN_VALUE))
    label = table[BOOLEAN_VALUE]
    if label.dtype != pl.Boolean:
        raise DataError(
            f"{path}: column `{BOOLEAN_VALUE}` is {label.dtype}, expected boolean; write true, false or null"
        )
    checked_labels(table.with_columns(label.fill_null(False)), str(path))  # ids, times and repeated rows
    time = pl.col(PREDICTION_TIME).cast(pl.Datetime("us"))
    return table.select(SUBJECT_ID, time, BOOLEAN_VALUE).sort(SUBJECT_ID, PREDICTION_TIME)


def _splits(directory: MedsDirectory, asked: pl.DataFrame, state: StateFolder) -> pl.DataFrame:
    """The split of each patient who has a label; others need none, and a split file may lack them."""
    labelled = asked.filter(pl.col(BOOLEAN_VALUE).is_not_null())[SUBJECT_ID].unique(maintain_order=True)
    if labelled.is_empty():
        return pl.DataFrame(schema={SUBJECT_ID: pl.Int64, SPLIT: pl.String})
    key = state.split_key() if (state / SPLIT_KEY).exists() else None
    if key is None and not (directory.root / subject_splits_filepath).is_file():
        raise ConfigurationError(
            f"{state / SPLIT_KEY}: no such file, and the records have no split file, so nobody can tell who was held "
            "out; name the state folder that trained, or run `wardround client check` if this hospital never did"
        )
    return directory.splits(labelled, key)


def _last_events(directory: MedsDirectory, study: Study) -> pl.DataFrame:
    """Every patient at the time of the last event."""
    last = directory.events(study.features).group_by(SUBJECT_ID).agg(pl.col(TIME).max().alias(PREDICTION_TIME))
    try:
        return last.drop_nulls(PREDICTION_TIME).collect(engine="streaming")
    except pl.exceptions.PolarsError as error:  # its text may quote the file's content
        raise DataError(f"{directory.data}: cannot be read ({type(error).__name__}); write the files again") from None
