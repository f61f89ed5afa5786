"""Writing virtual hospitals: a folder of MEDS directories that appears whole or not at all.

Files are written through pyarrow, not polars: `meds.DataSchema.validate` refuses polars' large strings, and a virtual
hospital should be as valid as a real one.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl
import pyarrow as pa  # type: ignore[import-untyped]  # ships no types
import pyarrow.parquet as pq  # type: ignore[import-untyped]  # ships no types
from meds.schema import CodeMetadataSchema, DataSchema, LabelSchema, SubjectSplitSchema

from common.errors import ConfigurationError

TRUTH = "truth.parquet"
_MEDS_TYPES = {
    field.name: field.type
    for table in (DataSchema, LabelSchema, SubjectSplitSchema, CodeMetadataSchema)
    for field in table.schema()
}


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into; it becomes `out` when the block ends well, and is gone when it does not.

    Raises:
        ConfigurationError: `out` holds something already or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigurationError(f"{out}: exists and is not an empty folder; name another or remove it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        workshop = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise ConfigurationError(f"{out}: cannot be written ({error.strerror}); name another folder") from None
    try:
        folder = workshop / "folder"  # mkdtemp's own folder is closed to others, this one is as umask says
        folder.mkdir()
        yield folder
        if out.exists():
            out.rmdir()
        folder.rename(out)
    except OSError as error:
        raise ConfigurationError(f"{out}: cannot be written ({error.strerror}); name another folder") from None
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def write_table(table: pa.Table, path: Path) -> None:
    """One parquet file, its folder made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd")


def write_frame(frame: pl.DataFrame, path: Path) -> None:
    """One parquet file with the columns that MEDS names in MEDS's own types, all others as they are."""
    table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
    wanted = [pa.field(f.name, _MEDS_TYPES.get(f.name, f.type)) for f in table.schema]
    write_table(table.cast(pa.schema(wanted)), path)
