"""What the tests of readers share: terms of an extract -> MEDS folder -> its events, checked by the `meds` package.

The same by the command as a person types it, with a look at all that it prints.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq  # type: ignore[import-untyped]  # pyarrow ships no types
import pytest
import yaml
from meds.schema import DataSchema

import wardround
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


def typed(*words: str | Path) -> tuple[int, str]:
    """`wardround WORDS` as it is typed, in this process: its exit status, and all that it prints."""
    said, before = io.StringIO(), os.umask(0o077)
    try:
        with redirect_stdout(said), redirect_stderr(said), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["wardround", *map(str, words)])
            with pytest.raises(SystemExit) as ended:
                wardround.main()
    finally:
        os.umask(before)
    return int(ended.value.code or 0), said.getvalue()


def read_or_refused(place: Path, secrets: Sequence[str], **keys: Any) -> bool:
    """`wardround client convert` of the extract in `place`: whether it was read, else it was refused.

    Asserts that either a MEDS folder is there, or one line of ours was said and nothing is left on the disk; and that
    nothing that was said holds one of `secrets`.
    """
    before = sorted(place.rglob("*"))
    terms = place / "terms.yaml"
    terms.write_text(yaml.safe_dump({"version": 1, "format": keys}))
    status, said = typed("client", "convert", terms, place / "out")
    terms.unlink()
    plain = said.replace(str(place), "")
    assert not [secret for secret in secrets if secret in plain]
    assert status in (0, 2), said  # 1 is a defect of ours
    if status == 0:
        events_of(place / "out")
        return True
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert sorted(place.rglob("*")) == before
    return False
