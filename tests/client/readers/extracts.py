"""What the tests of readers share: terms of an extract -> MEDS folder -> its events, checked by the `meds` package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq  # type: ignore[import-untyped]  # pyarrow ships no types
from meds.schema import DataSchema

from client.readers.convert import Converted, convert
from client.readers.formats import Extract, Format
from client.readers.meds import MedsDirectory
from common.terms import parse


def terms_of(**keys: Any) -> Format:
    """The `format:` with these keys."""
    return parse({"version": 1, "format": keys}, Extract, "extract").format


def convert_to(out: Path, **keys: Any) -> Converted:
    """Convert; relative paths count from the folder of `out`."""
    return convert(terms_of(**keys), out.parent, out)


def events_of(folder: Path) -> pl.DataFrame:
    """All events, after MEDS' rules were checked: types, each patient in one shard, contiguous, sorted."""
    parts, seen = [], set[int]()
    for shard in MedsDirectory(folder).shards:
        DataSchema.validate(pq.read_table(shard))
        part = pl.read_parquet(shard, glob=False)
        subjects = part["subject_id"].rle().struct.field("value").to_list()
        assert len(subjects) == len(set(subjects))
        assert not seen & set(subjects)
        seen |= set(subjects)
        order = part.select(pl.col("time").to_physical().fill_null(-(2**62)).diff().over("subject_id"))["time"]
        assert (order.drop_nulls() >= 0).all()
        parts.append(part if "text_value" in part.columns else part.with_columns(text_value=pl.lit(None, pl.String)))
    return pl.concat(parts).sort("subject_id", maintain_order=True)
