"""A MEDS 0.4 directory -> the records of one split.

    ROOT/data/**/*.parquet               events, in any number of shards
    ROOT/labels/TASK.parquet             one row per (patient, prediction time), or
    ROOT/labels/TASK/**/*.parquet        the same in any number of shards, as ACES writes it
    ROOT/metadata/subject_splits.parquet optional: patient -> train, tuning or held_out

Nothing is written. Every fault of the directory is one `DataError` naming file, column, count and remedy.

Decisions a reader would question:

- Without a split file the split follows from a keyed hash of the patient id. The key is the site's secret:
  with a plain hash, whoever knows an id could tell whether that patient was trained on. The same key always
  gives the same split, and a patient who arrives later moves nobody else.
- Splits other than the three of MEDS are refused, although MEDS allows them: patients in "test" or "Train"
  would silently belong to no split.
- A labelled patient who is missing in the split file is refused for the same reason.
- MEDS asks that a patient's events lie in one shard, sorted. Neither is needed here, so neither is checked.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import polars as pl
from meds.schema import data_subdirectory, subject_splits_filepath

from client.mapping import renamed
from common.errors import ConfigurationError, DataError
from common.events import Coverage, checked_labels, survey, typed_events
from common.schema import CODE, HELD_OUT, SPLIT, SPLITS, SUBJECT_ID, TRAIN, TUNING, FeatureSchema
from common.sequences import Sequences, build

LABELS = "labels"  # MEDS leaves the place of label files open; ACES and MEDS-DEV write them here
PARQUETS = "**/*.parquet"
MIN_KEY_BYTES = 16
_SHARES = ((TRAIN, 0.70), (TUNING, 0.85), (HELD_OUT, 1.0))  # cumulative


def split_by_key(subjects: pl.Series, key: bytes) -> pl.DataFrame:
    """Each patient's split (70 % train, 15 % tuning, 15 % held_out) from a keyed hash of the id.

    Args:
        subjects: [P] Int64 distinct patient ids.
        key: 16 to 64 secret bytes of the site; keep it, or every later run splits differently.

    Returns:
        Columns subject_id and split, in the order given.

    Raises:
        ConfigurationError: a key of another length.

    """
    if not MIN_KEY_BYTES <= len(key) <= hashlib.blake2b.MAX_KEY_SIZE:
        raise ConfigurationError(
            f"split key has {len(key)} bytes, expected {MIN_KEY_BYTES} to {hashlib.blake2b.MAX_KEY_SIZE}; "
            "make one with `secrets.token_bytes(32)`"
        )
    keyed = hashlib.blake2b(key=key, digest_size=8, person=b"wardround-split")

    def place(subject: int) -> float:
        digest = keyed.copy()
        digest.update(subject.to_bytes(8, "little", signed=True))
        return int.from_bytes(digest.digest(), "little") / 2**64

    places = np.array([place(subject) for subject in subjects.to_list()], dtype=np.float64)
    bound = np.array([upper for _, upper in _SHARES[:-1]])
    names = np.array([name for name, _ in _SHARES])
    return pl.DataFrame(
        {SUBJECT_ID: subjects, SPLIT: names[np.searchsorted(bound, places, side="right")]},
        schema={SUBJECT_ID: pl.Int64, SPLIT: pl.String},
    )


class MedsDirectory:
    """A MEDS directory that was found to have event files; their content is checked when it is read.

    Args:
        root: the folder.
        counts_as: code of the site -> code as which it is read, everywhere; all at once, so nothing is renamed twice.
    """

    def __init__(self, root: Path, counts_as: Mapping[str, str] | None = None) -> None:
        self.root, self._counts_as = root, dict(counts_as or {})
        self.data = root / data_subdirectory
        self.shards = sorted(self.data.glob(PARQUETS))
        if not self.shards:
            raise DataError(f"{self.data}: no *.parquet file; a MEDS directory keeps its events there, check the path")

    @property
    def tasks(self) -> list[str]:
        """Tasks that have a label file, or a folder of them."""
        files = {path.stem for path in (self.root / LABELS).glob("*.parquet")}
        return sorted(files | {path.name for path in (self.root / LABELS).glob("*/") if any(path.glob(PARQUETS))})

    def events(self, schema: FeatureSchema) -> pl.LazyFrame:
        """All events, lazily. Raises DataError where a shard's columns are missing or of another type."""
        return pl.concat([self._shard_events(shard, schema) for shard in self.shards])

    def coverage(self, schema: FeatureSchema) -> Coverage:
        """What becomes of the events under `schema` (for the site's eyes). Reads every shard once.

        Raises DataError naming the shard whose ids, codes, numbers or times cannot be used.
        """
        return reduce(add, (self._shard_coverage(shard, schema) for shard in self.shards))

    def labels(self, task: str) -> pl.DataFrame:
        """The task's label rows, checked and sorted by patient and prediction time."""
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", task):
            raise ConfigurationError(f"task {task!r} is not a plain name; use letters, digits, `_`, `-` and `.`")
        place, shards = self._label_files(task)
        if place.is_file():
            return checked_labels(_read(place), str(place))
        read = [(shard, _read(shard)) for shard in shards]
        parts = [checked_labels(part, str(shard)) for shard, part in read if len(part)]  # a shard may hold nobody
        if not parts:
            raise DataError(
                f"{place}: no label row in {len(shards)} files; write at least one per patient of the study"
            )
        return checked_labels(pl.concat(parts), str(place))

    def _label_files(self, task: str) -> tuple[Path, list[Path]]:
        """Where the labels of a task are, and their files: the file alone, or all of a folder."""
        file, folder = self.root / LABELS / f"{task}.parquet", self.root / LABELS / task
        shards = sorted(folder.glob(PARQUETS))
        if file.is_file() and shards:
            raise DataError(f"{file}: task {task} has this file and the folder {folder}; keep the one that is meant")
        if not file.is_file() and not shards:
            here = ", ".join(self.tasks) or "none"
            raise DataError(f"{file}: no label file for task {task}; tasks found: {here}; add the file")
        return (file, [file]) if file.is_file() else (folder, shards)

    def splits(self, subjects: pl.Series, split_key: bytes | None = None) -> pl.DataFrame:
        """The split of each of `subjects` (Int64 ids): columns subject_id and split.

        From metadata/subject_splits.parquet where it exists (`split_key` is not used), else `split_by_key`.
        """
        path = self.root / subject_splits_filepath
        if path.is_file():
            return _from_file(path, subjects)
        if split_key is None:
            raise DataError(f"{path}: no such file and no split key given; add the file, or set a split key")
        return split_by_key(subjects, split_key)

    def read(
        self,
        task: str,
        schema: FeatureSchema,
        split: str | tuple[str, ...],
        *,
        max_steps: int,
        bin_hours: float | None,
        split_key: bytes | None = None,
    ) -> Sequences:
        """The records of all labelled patients of one or more splits, as `common.sequences.build` makes them.

        Raises:
            DataError: files, columns, rows or splits that cannot be used, or no patient in the split.
            ConfigurationError: an unknown split, or a task, key, max_steps or bin_hours that cannot be.

        """
        wanted = (split,) if isinstance(split, str) else split
        for name in wanted:
            if name not in SPLITS:
                raise ConfigurationError(f"split {name!r} is unknown; use {', '.join(SPLITS)}")
        rows = self.labels(task)
        subjects = rows[SUBJECT_ID].unique(maintain_order=True)
        chosen = self.splits(subjects, split_key).filter(pl.col(SPLIT).is_in(wanted))
        if chosen.is_empty():
            raise DataError(
                f"{self.root}: 0 of {len(subjects)} patients of task {task} are in split "
                f"{' or '.join(wanted)}; check the split file and the label file"
            )
        return build(
            self.events(schema),
            rows.join(chosen, on=SUBJECT_ID, how="semi"),
            schema,
            max_steps=max_steps,
            bin_hours=bin_hours,
            source=str(self.data),
            label_source=str(self._label_files(task)[0]),
            coverage=self.coverage(schema),
        )

    def _shard_events(self, shard: Path, schema: FeatureSchema) -> pl.LazyFrame:
        typed = typed_events(_scan(shard), schema, str(shard))
        return typed.with_columns(renamed(pl.col(CODE), self._counts_as))

    def _shard_coverage(self, shard: Path, schema: FeatureSchema) -> Coverage:
        typed = self._shard_events(shard, schema)
        try:
            return survey(typed, schema, str(shard))
        except pl.exceptions.PolarsError as error:
            raise _unreadable(shard, error) from None


def read(
    root: Path,
    task: str,
    schema: FeatureSchema,
    split: str | tuple[str, ...],
    *,
    max_steps: int,
    bin_hours: float | None,
    split_key: bytes | None = None,
) -> Sequences:
    """`MedsDirectory(root).read(...)`: the whole way from a folder to sequences."""
    return MedsDirectory(root).read(task, schema, split, max_steps=max_steps, bin_hours=bin_hours, split_key=split_key)


def _from_file(path: Path, subjects: pl.Series) -> pl.DataFrame:
    """The split of each of `subjects` as the file has it."""
    table = _read(path)
    for column, kind in ((SUBJECT_ID, pl.Int64), (SPLIT, pl.String)):
        if column not in table.columns:
            raise DataError(f"{path}: column `{column}` is missing; add it, or remove the file to split by key")
        if table.schema[column] != kind:
            raise DataError(f"{path}: column `{column}` is {table.schema[column]}, expected {kind}; convert it")
        missing = table[column].null_count()
        if missing:
            raise DataError(f"{path}: column `{column}` is null in {missing} of {len(table)} rows; remove them")
    other = int((~table[SPLIT].is_in(SPLITS)).sum())
    if other:
        raise DataError(
            f"{path}: column `{SPLIT}` is none of {', '.join(SPLITS)} in {other} of {len(table)} rows; rename them"
        )
    distinct = table.select(SUBJECT_ID, SPLIT).unique()
    twice = distinct.filter(pl.col(SUBJECT_ID).is_duplicated())[SUBJECT_ID].n_unique()
    if twice:
        raise DataError(f"{path}: {twice} patients are in more than one split; keep each in one")
    found = subjects.to_frame(SUBJECT_ID).join(distinct, on=SUBJECT_ID, how="left", maintain_order="left")
    absent = found[SPLIT].null_count()
    if absent:
        raise DataError(
            f"{path}: {absent} of {len(found)} labelled patients have no split; "
            "add them, or remove the file to split by key"
        )
    return found


def _scan(path: Path) -> pl.LazyFrame:
    """The file's events, lazily, after its columns could be read."""
    try:
        frame = pl.scan_parquet(path, glob=False)
        frame.collect_schema()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise _unreadable(path, error) from None
    return frame


def _read(path: Path) -> pl.DataFrame:
    try:
        return pl.read_parquet(path, glob=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> DataError:
    """What a library says of a broken file may quote its content, so only the kind of fault is passed on."""
    return DataError(f"{path}: cannot be read as parquet ({type(error).__name__}); write the file again")
