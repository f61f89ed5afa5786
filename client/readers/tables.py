"""CSV, CSV.gz and Parquet files, a block at a time: memory is one block, however large the file.

CSV comes as text: what a library says of a cell that it cannot convert quotes the cell, so conversion is done by
client/readers/columns.py, which counts instead.

Decisions a reader would question:

- pyarrow's reader, not polars': it streams compressed files, knows encodings, and its errors can be kept apart.
- A line with an odd number of quotation marks is refused unless `multiline` is set. Otherwise a stray `"` swallows
  the rows up to the next one, and everything after that looks well.
- NUL bytes are refused wherever they stand: a table that has them was cut or is UTF-16.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import polars as pl
import pyarrow as pa  # type: ignore[import-untyped]  # pyarrow ships no types
import pyarrow.csv as pc  # type: ignore[import-untyped]  # same
import pyarrow.parquet as pq  # type: ignore[import-untyped]  # same

from client.readers.columns import Columns
from client.readers.formats import Csv, Files
from common.errors import DataError

BLOCK_BYTES = 1 << 24  # of text; also the longest line that can be read
BLOCK_ROWS = 1 << 18  # of Parquet
_FAULTS = (pa.ArrowException, OSError, EOFError, ValueError, csv.Error, zlib.error)  # ValueError: also UnicodeError


def found(terms: Files, base: Path) -> list[Path]:
    """The files that `terms.files` names, each once, in order; relative ones below `base`.

    Raises:
        DataError: a name or pattern without any file.
    """
    return list(dict.fromkeys(path for name in terms.files for path in _matches(name, base)))


def _matches(name: str, base: Path) -> list[Path]:
    plain = base / Path(name).expanduser()
    if plain.is_file():
        return [plain]
    pattern = Path(name).expanduser()
    root = Path(pattern.anchor) if pattern.is_absolute() else base  # whose own name is no pattern
    matches = sorted(path for path in root.glob(str(pattern.relative_to(pattern.anchor))) if path.is_file())
    if not matches:
        raise DataError(f"{plain}: no such file; correct `files`")
    return matches


def blocks(path: Path, columns: list[str], terms: Csv) -> Iterator[pl.DataFrame]:
    """The columns of a file, each once, a block of rows at a time: text from CSV, typed from Parquet.

    Raises:
        DataError: a column that is missing or there twice, or a file that cannot be read. Never quotes its content.
    """
    wanted = list(dict.fromkeys(columns))
    return _parquet(path, wanted) if path.suffix == ".parquet" else _csv(path, wanted, terms)


def rows(path: Path, columns: list[str], terms: Files) -> Iterator[pl.DataFrame]:
    """As `blocks`, of the rows that `terms.only` asks for. Raises DataError."""
    cells = Columns()
    for block in blocks(path, [*columns, *terms.only], terms):
        yield block.filter(
            *(cells.codes(block[name], f"{path}, column `{name}`") == value for name, value in terms.only.items())
        )


def names_of(path: Path, terms: Csv) -> list[str]:
    """The columns of a file. Raises DataError if it cannot be read."""
    try:
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                return list(file.schema_arrow.names)
        with _open(path) as raw:
            return _header(path, raw, terms)
    except _FAULTS as error:
        raise DataError(f"{path}: cannot be read ({type(error).__name__}); write the file again") from None


def _parquet(path: Path, columns: list[str]) -> Iterator[pl.DataFrame]:
    try:
        with pq.ParquetFile(path) as file:
            _require(path, file.schema_arrow.names, columns, "")
            for batch in file.iter_batches(batch_size=BLOCK_ROWS, columns=columns):
                yield cast(pl.DataFrame, pl.from_arrow(batch))
    except (*_FAULTS, pl.exceptions.PolarsError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({type(error).__name__}); write the file again") from None


def _csv(path: Path, columns: list[str], terms: Csv) -> Iterator[pl.DataFrame]:
    try:
        names = names_of(path, terms)
        hint = f"; is `{terms.separator}` the separator?" if len(names) == 1 else ""
        _require(path, names, columns, hint)
        with _open(path) as raw:
            yield from parse(raw, str(path), names, columns, terms)
    except _FAULTS as error:
        raise DataError(f"{path}: cannot be read ({type(error).__name__}); write the file again") from None


def parse(raw: IO[bytes], source: str, names: list[str], columns: list[str], terms: Csv) -> Iterator[pl.DataFrame]:
    """The columns of CSV text with a header line, as text, a block at a time.

    Args:
        raw: the text.
        source: what to call it in an error.
        names: of its header.
        columns: those of `names` that are wanted.
        terms: separator, encoding and so on.

    Raises:
        DataError: text that is not what `terms` says.
    """
    watched = _Watched(raw, source, terms)
    try:
        reader = pc.open_csv(
            pa.PythonFile(watched, mode="r"),
            read_options=pc.ReadOptions(
                block_size=BLOCK_BYTES, encoding=terms.encoding, column_names=names, skip_rows=1
            ),
            parse_options=pc.ParseOptions(
                delimiter=terms.separator,
                quote_char='"' if terms.quote == "double" else False,
                newlines_in_values=terms.multiline,
            ),
            convert_options=pc.ConvertOptions(
                column_types={name: pa.string() for name in names}, include_columns=columns
            ),
        )
        for batch in reader:
            yield cast(pl.DataFrame, pl.from_arrow(batch))
    except DataError:  # from `watched`
        raise
    except _FAULTS as error:
        watched.check()
        if "CSV parse error: Empty" in str(error):  # only the header line, without an end
            return
        raise DataError(f"{source}: {_fault(str(error), terms)}") from None
    watched.check()


def _fault(said: str, terms: Csv) -> str:
    """What pyarrow found, without what it quotes."""
    if "UTF8" in said or "decode" in said:
        return f"is not {terms.encoding} text; set `encoding`, such as latin-1"
    if "Expected" in said:
        return "a row has another number of columns than the header; check separator and quotation marks"
    if "straddling" in said:
        return f"a line is longer than {BLOCK_BYTES} bytes; check quotation marks"
    return "cannot be read as CSV; check separator and encoding"


class _Watched(io.RawIOBase):
    """A stream of bytes that is looked at while it is read: NUL bytes, and quotation marks that are not closed."""

    def __init__(self, raw: IO[bytes], source: str, terms: Csv) -> None:
        super().__init__()
        self._raw, self._source, self._terms = raw, source, terms
        self._open = False  # inside of quotation marks, where the last piece ended
        self._fault = ""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        piece = self._raw.read(size)
        if b"\0" in piece:
            self._fault = "has NUL bytes; write it as text in one of the known encodings"
        if self._terms.quote == "double":
            self._count(piece)
        self.check()
        return piece

    def _count(self, piece: bytes) -> None:
        marks = piece.count(b'"')
        if (marks or self._open) and not self._terms.multiline:
            letters = np.frombuffer(piece, np.uint8)
            before = np.cumsum(letters == ord('"')) + self._open
            if (before[letters == ord("\n")] % 2).any():
                self._fault = _UNCLOSED
        self._open ^= bool(marks % 2)
        if not piece and self._open:
            self._fault = _UNCLOSED

    def check(self) -> None:
        """Raise what was seen."""
        if self._fault:
            raise DataError(f"{self._source}: {self._fault}")


_UNCLOSED = (
    "a line has an odd number of quotation marks; set `multiline: true` if fields hold line breaks, "
    '`quote: none` if `"` is an ordinary character, or correct the file'
)


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    return bz2.open(path, "rb") if path.suffix == ".bz2" else path.open("rb")


def _header(path: Path, raw: IO[bytes], terms: Csv) -> list[str]:
    """The names in the first line."""
    encoding = "utf-8-sig" if terms.encoding == "utf-8" else terms.encoding
    line = raw.readline(BLOCK_BYTES)
    if not line.strip():
        raise DataError(f"{path}: is empty, or begins with an empty line; the first line must name the columns")
    if b"\0" in line:
        raise DataError(f"{path}: has NUL bytes; write it as text in one of the known encodings")
    try:
        text = line.decode(encoding).rstrip("\r\n")
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not {terms.encoding} text; set `encoding`, such as latin-1") from None
    options: dict[str, Any] = {} if terms.quote == "double" else {"quoting": csv.QUOTE_NONE}
    return [name.strip() for name in next(csv.reader([text], delimiter=terms.separator, **options))]


def _require(path: Path, names: list[str], columns: list[str], hint: str) -> None:
    """The found names are not shown: a file without a header line begins with a patient."""
    for column in columns:
        count = names.count(column)
        if count == 0:
            raise DataError(
                f"{path}: has no column `{column}` among its {len(names)}{hint or '; correct the name in the YAML'}"
            )
        if count > 1:
            raise DataError(f"{path}: column `{column}` is there {count} times; keep one")
