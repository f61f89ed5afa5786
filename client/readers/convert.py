"""A raw extract -> a MEDS 0.4 folder: all of it, or nothing.

    OUT/data/0.parquet ..                patient by patient, sorted by time, facts without a time first
    OUT/labels/TASK.parquet              labels that the extract or the YAML names, carried over
    OUT/metadata/{dataset.json, codes.parquet, subject_splits.parquet}

Blocks of any order go to one of BUCKETS files by a hash of the patient, so that each patient is in one; then bucket
after bucket is sorted and written as a shard. Memory is one shard, disk is the extract once more.

Decisions a reader would question:

- Everything is written into a folder beside OUT and renamed at the end: a folder that is there is whole. What a kill
  leaves behind begins with a dot and ends in `.partial`, and nothing reads it.
- Events at the same time keep the order of the source. A fact without a time that repeats word for word counts once:
  wide tables repeat it in every row.
- Other repeated events are kept: that a drug was given twice is not for a reader to deny.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import cast

import numpy as np
import polars as pl
import pyarrow as pa  # type: ignore[import-untyped]  # pyarrow ships no types
import pyarrow.parquet as pq  # type: ignore[import-untyped]  # same
from meds.schema import (
    CodeMetadataSchema,
    DataSchema,
    LabelSchema,
    SubjectSplitSchema,
    code_metadata_filepath,
    data_subdirectory,
    dataset_metadata_filepath,
    subject_splits_filepath,
)

from client.durable import sync_folder
from client.readers.formats import Format
from client.readers.given import given_labels, given_splits
from client.readers.meds import LABELS as LABELS_FOLDER
from client.readers.reader import EVENTS, LABELS, Reader, open_reader
from common.errors import ConfigurationError, DataError
from common.events import checked_labels
from common.schema import CODE, SUBJECT_ID, TIME

SHARD_EVENTS = 2_000_000  # buckets are put together up to this many events, some 700 MiB while a shard is sorted
BUCKETS = 256  # so that half a billion events still make shards of this size
BATCH_EVENTS = 1_000_000  # blocks are put together up to this before they are divided
_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing (Knuth, TAOCP 3, 6.4): neighbours go to distant buckets


@dataclass(frozen=True)
class Converted:
    """What was written, and what was not. True counts, for the site's own eyes."""

    events: int
    patients: int
    codes: int
    shards: int
    labels: dict[str, int]
    left_out: dict[str, int]


def convert(terms: Format, base: Path, out: Path) -> Converted:
    """Write the extract that `terms` describes as MEDS folder `out`; see the module docstring.

    Args:
        terms: the `format:` of a site file.
        base: the folder that relative paths in it count from.
        out: a folder that is absent or empty.

    Raises:
        DataError: the extract cannot be used, or holds no event.
        ConfigurationError: `out` is not empty or cannot be written; a package is missing.
    """
    _require_empty(out)
    reader = open_reader(terms, base)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise ConfigurationError(f"{out}: cannot be written ({error.strerror}); choose another folder") from None
    try:
        done = _write(reader, terms, base, fresh)
        if out.exists():
            out.rmdir()
        fresh.rename(out)
        sync_folder(out.parent)
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise ConfigurationError(f"{out}: cannot be written ({why}); make room, or choose another") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return done


def _require_empty(out: Path) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigurationError(f"{out}: is no folder; name one that is absent or empty")
    if out.is_dir() and any(out.iterdir()):
        raise ConfigurationError(f"{out}: is not empty and nothing is overwritten; name another folder, or remove it")


def _write(reader: Reader, terms: Format, base: Path, folder: Path) -> Converted:
    for name in (data_subdirectory, LABELS_FOLDER, "metadata"):
        (folder / name).mkdir()
    codes: set[str] = set()
    events = patients = shards = 0
    for number, shard in enumerate(_shards(reader, folder)):
        events, patients, shards = events + len(shard), patients + shard[SUBJECT_ID].n_unique(), number + 1
        codes.update(shard[CODE].unique().to_list())
        _write_table(_arrow(shard), DataSchema, folder / data_subdirectory / f"{number}.parquet")
    if not events:
        raise DataError("the extract holds no event; check its files, and `only` if it is set")
    labels = _write_labels(reader, terms, base, folder)
    if terms.splits is not None:
        splits = given_splits(terms.splits, base)
        _write_table(_plain(splits), SubjectSplitSchema, folder / subject_splits_filepath)
    listed = {
        CODE: pa.array(sorted(codes), pa.string()),
        "description": pa.nulls(len(codes), pa.string()),
        "parent_codes": pa.nulls(len(codes), pa.list_(pa.string())),
    }
    _write_table(pa.table(listed), CodeMetadataSchema, folder / code_metadata_filepath)
    about = {
        "dataset_name": f"{terms.kind} extract",
        "etl_name": "wardround client convert",
        "etl_version": version("wardround"),
        "meds_version": version("meds"),
    }
    (folder / dataset_metadata_filepath).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    left_out = {reason: count for reason, count in sorted(reader.left_out.items()) if count}
    return Converted(events, patients, len(codes), shards, labels, left_out)


def _shards(reader: Reader, folder: Path) -> Iterator[pl.DataFrame]:
    """All events, a patient in one shard, sorted."""
    batches = _batches(reader.events())
    first = next(batches, EVENTS.to_frame())
    second = next(batches, None)
    if second is None:
        yield _sorted(first)
        return
    with tempfile.TemporaryDirectory(prefix="buckets", dir=folder) as place:
        sizes = _divide(_chain(first, second, batches), Path(place))
        for group in _grouped(sizes):
            yield _sorted(pl.concat([_bucket(Path(place) / f"{bucket}.arrow") for bucket in group]))


def _batches(blocks: Iterator[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    """The same events in blocks of BATCH_EVENTS or somewhat more, checked."""
    held: list[pl.DataFrame] = []
    rows = 0
    for block in blocks:
        held.append(_checked(block))
        rows += len(block)
        if rows >= BATCH_EVENTS:
            yield pl.concat(held)
            held, rows = [], 0
    if rows:
        yield pl.concat(held)


def _chain(first: pl.DataFrame, second: pl.DataFrame, rest: Iterator[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    yield first
    yield second
    yield from rest


def _divide(batches: Iterator[pl.DataFrame], place: Path) -> Counter[int]:
    """Write each event to the file of its patient's bucket; how many each has."""
    sizes: Counter[int] = Counter()
    schema = EVENTS.to_frame().to_arrow().schema
    writers: dict[int, pa.RecordBatchFileWriter] = {}
    try:
        for batch in batches:
            bucket = bucket_of(batch[SUBJECT_ID])
            for (key,), part in batch.group_by(pl.Series("bucket", bucket), maintain_order=True):
                number = int(cast(int, key))
                if number not in writers:
                    writers[number] = pa.ipc.new_file(str(place / f"{number}.arrow"), schema)
                writers[number].write_table(part.select(EVENTS.names()).to_arrow().cast(schema))
                sizes[number] += len(part)
    finally:
        for writer in writers.values():
            writer.close()
    return sizes


def _bucket(path: Path) -> pl.DataFrame:
    with pa.OSFile(str(path)) as file:
        return cast(pl.DataFrame, pl.from_arrow(pa.ipc.open_file(file).read_all()))


def bucket_of(subjects: pl.Series) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """The bucket [n] in [0, BUCKETS) of each patient number [n] (Int64)."""
    return cast(
        "np.ndarray[tuple[int], np.dtype[np.uint64]]",
        (subjects.to_numpy().view(np.uint64) * _SPREAD) >> np.uint64(64 - BUCKETS.bit_length() + 1),
    )


def _grouped(sizes: Counter[int]) -> Iterator[list[int]]:
    """Buckets put together up to SHARD_EVENTS."""
    group: list[int] = []
    events = 0
    for bucket in sorted(sizes):
        if group and events + sizes[bucket] > SHARD_EVENTS:
            yield group
            group, events = [], 0
        group.append(bucket)
        events += sizes[bucket]
    if group:
        yield group


def _checked(block: pl.DataFrame) -> pl.DataFrame:
    """What no later reader could use is refused here, whichever format it came from."""
    time = block[TIME]
    wild = int((~time.dt.year().is_between(1, 9999)).sum())
    if wild:
        raise DataError(f"{wild} times lie outside years 1 to 9999; correct them in the extract")
    assert block.schema == EVENTS
    assert not block[SUBJECT_ID].null_count()
    assert not block[CODE].null_count()
    return block


def _sorted(events: pl.DataFrame) -> pl.DataFrame:
    """By patient and time, facts first; a fact that repeats counts once."""
    timed = pl.col(TIME).is_not_null()
    facts = events.filter(~timed).unique(maintain_order=True)
    kept = pl.concat([facts, events.filter(timed)]) if len(facts) else events
    return kept.sort(SUBJECT_ID, TIME, nulls_last=False, maintain_order=True)


def _write_labels(reader: Reader, terms: Format, base: Path, folder: Path) -> dict[str, int]:
    parts: dict[str, list[pl.DataFrame]] = {}
    for task, frame in reader.labels():
        parts.setdefault(task, []).append(frame)
    for task, files in terms.labels.items():
        if task in parts:
            raise ConfigurationError(f"labels of task {task} are in the extract and under `labels`; remove one")
        parts[task] = list(given_labels(files, base, terms.timezone))
    counts = {}
    for task, frames in parts.items():
        rows = checked_labels(pl.concat([LABELS.to_frame(), *frames]), f"labels of task {task}")
        counts[task] = len(rows)
        _write_table(_plain(rows), LabelSchema, folder / LABELS_FOLDER / f"{task}.parquet")
    return counts


def _arrow(events: pl.DataFrame) -> pa.Table:
    """With `text_value` only where there is any, and in the types of MEDS: polars writes large strings everywhere."""
    kept = events if events["text_value"].null_count() < len(events) else events.drop("text_value")
    table = kept.to_arrow()
    return table.set_column(table.schema.get_field_index(CODE), CODE, table[CODE].cast(pa.string()))


def _plain(frame: pl.DataFrame) -> pa.Table:
    table = frame.to_arrow()
    strings = [name for name in table.column_names if pa.types.is_large_string(table.schema.field(name).type)]
    for name in strings:
        table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(pa.string()))
    return table


def _write_table(table: pa.Table, schema: type, path: Path) -> None:
    """After the `meds` package has found nothing to object to."""
    schema.validate(table)  # type: ignore[attr-defined]  # flexible_schema adds it
    with path.open("wb") as file:
        pq.write_table(table, file, compression="zstd")
        file.flush()
        os.fsync(file.fileno())
