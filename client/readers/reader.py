"""What every reader of raw extracts is: a source of MEDS events, a block at a time.

    open_reader(format, base).events()  ->  polars frames with the columns of EVENTS, rows in any order

Grouping by patient, sorting and writing are the same for all of them: client/readers/convert.py.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, cast

import polars as pl

from client.readers.columns import MICROSECONDS
from client.readers.formats import Format
from common.schema import BOOLEAN_VALUE, CODE, NUMERIC_VALUE, PREDICTION_TIME, SUBJECT_ID, TIME

TEXT_VALUE = "text_value"
EVENTS = pl.Schema(
    [
        (SUBJECT_ID, pl.Int64()),
        (TIME, MICROSECONDS),
        (CODE, pl.String()),
        (NUMERIC_VALUE, pl.Float32()),
        (TEXT_VALUE, pl.String()),
    ]
)
LABELS = pl.Schema([(SUBJECT_ID, pl.Int64()), (PREDICTION_TIME, MICROSECONDS), (BOOLEAN_VALUE, pl.Boolean())])

_READERS = {  # kind -> where its reader is; imported when asked for
    "events": "client.readers.event_tables:EventTablesReader",
    "wide": "client.readers.wide_tables:WideTablesReader",
    "code_sequences": "client.readers.code_sequences:CodeSequencesReader",
    "physionet2012": "client.readers.physionet:PhysioNet2012Reader",
    "physionet2019": "client.readers.physionet:PhysioNet2019Reader",
    "omop": "client.readers.omop:OmopReader",
}


class Reader(Protocol):
    """One raw extract, found but not read yet.

    Attributes:
        left_out: reason -> number of events that were left out so far, for the site's own eyes.
    """

    left_out: Counter[str]

    def events(self) -> Iterator[pl.DataFrame]:
        """Frames of schema EVENTS, each of bounded size, in the order of the source. A fact's time is null.

        Raises:
            DataError: names file, column, count and remedy; never a patient's value, nor a file named after one.
        """

    def labels(self) -> Iterator[tuple[str, pl.DataFrame]]:
        """(task, frame of schema LABELS) for labels that are part of the extract itself; often none."""


def open_reader(terms: Format, base: Path) -> Reader:
    """The reader of an extract; relative paths count from `base`.

    Raises:
        DataError: no such file or folder.
        ConfigurationError: a package that this kind needs is not installed.
    """
    module, _, name = _READERS[terms.kind].partition(":")
    return cast(Reader, getattr(importlib.import_module(module), name)(terms, base))
