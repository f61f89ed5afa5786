"""Where the tables of an OMOP CDM are: a folder of files, or a database that DuckDB attaches. Names in any case."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, cast

import polars as pl

from client.readers.formats import Omop
from client.readers.tables import BLOCK_ROWS, blocks, names_of
from common.errors import ConfigurationError, DataError

_SUFFIXES = (".csv", ".csv.gz", ".csv.bz2", ".parquet")


class Source(Protocol):
    """The tables of one CDM."""

    def columns(self, table: str) -> list[str]:
        """Lower-case names of a table's columns; none if there is no such table."""

    def blocks(self, table: str, columns: list[str]) -> Iterator[pl.DataFrame]:
        """These columns under their lower-case names, a block of rows at a time."""


class FolderSource:
    """`person.csv`, `PERSON.csv.gz`, `person.parquet`, or a folder `person/` with parts of it."""

    def __init__(self, folder: Path, terms: Omop) -> None:
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; it should hold a CSV or Parquet file per table of the CDM")
        self._terms = terms
        self._paths: dict[str, list[Path]] = {}
        for path in sorted(folder.iterdir()):
            name, suffix = _split(path)
            if path.is_dir():
                parts = [part for part in sorted(path.rglob("*")) if _split(part)[1] and part.is_file()]
            else:
                parts = [path] if suffix else []
            if parts and name in self._paths:
                raise DataError(
                    f"{folder}: table {name} is there as {self._paths[name][0].name} and {path.name}; keep one"
                )
            if parts:
                self._paths[name] = parts

    def columns(self, table: str) -> list[str]:
        """See `Source.columns`."""
        return [] if table not in self._paths else [n.lower() for n in names_of(self._paths[table][0], self._terms)]

    def blocks(self, table: str, columns: list[str]) -> Iterator[pl.DataFrame]:
        """See `Source.blocks`."""
        for path in self._paths[table]:
            actual = {name.lower(): name for name in names_of(path, self._terms)}
            wanted = [actual.get(column, column) for column in columns]
            for block in blocks(path, wanted, self._terms):
                yield block.select(pl.col(name).alias(column) for name, column in zip(wanted, columns, strict=True))


class DatabaseSource:
    """A database, opened read-only. DuckDB's own messages are not passed on: they may quote a cell, or a password."""

    def __init__(self, terms: Omop, base: Path) -> None:
        assert terms.database is not None
        try:
            self._duckdb: Any = importlib.import_module("duckdb")
        except ModuleNotFoundError:
            raise ConfigurationError(
                "format.database needs DuckDB, which is not installed; run pip install 'wardround[omop]'"
            ) from None
        at = str(base / Path(terms.database).expanduser()) if terms.database_type != "postgres" else terms.database
        if terms.database_type != "postgres" and not Path(at).is_file():
            raise DataError(f"{at}: no such file; correct format.database")
        self._schema = terms.database_schema
        self._connection = self._duckdb.connect()
        try:
            # nothing is downloaded, and nothing of the patients is spilled to a temporary file
            for setting in ("autoinstall_known_extensions = false", "temp_directory = ''"):
                self._connection.execute(f"SET {setting}")
            if terms.database_type != "duckdb":
                self._connection.execute(f"LOAD {terms.database_type}")
            kind = "" if terms.database_type == "duckdb" else f"TYPE {terms.database_type}, "
            self._connection.execute(f"ATTACH {_text(at)} AS cdm ({kind}READ_ONLY)")
            found = self._connection.execute(
                "SELECT table_name, column_name FROM information_schema.columns "
                "WHERE table_catalog = 'cdm' AND lower(table_schema) = lower(?) ORDER BY table_name, ordinal_position",
                [self._schema],
            ).fetchall()
        except self._duckdb.Error as error:
            raise DataError(
                f"format.database cannot be attached ({type(error).__name__}); check it, and that DuckDB's extension "
                f"for {terms.database_type} is installed"
            ) from None
        self._names: dict[str, tuple[str, dict[str, str]]] = {}
        for table, column in found:
            self._names.setdefault(table.lower(), (table, {}))[1][column.lower()] = column

    def columns(self, table: str) -> list[str]:
        """See `Source.columns`."""
        return list(self._names[table][1]) if table in self._names else []

    def blocks(self, table: str, columns: list[str]) -> Iterator[pl.DataFrame]:
        """See `Source.blocks`."""
        actual, names = self._names[table]
        wanted = ", ".join(f"{_name(names[column])} AS {_name(column)}" for column in columns)
        query = f"SELECT {wanted} FROM cdm.{_name(self._schema)}.{_name(actual)}"  # noqa: S608 (quoted names)
        try:
            cursor = self._connection.cursor()  # kept: a relation of a forgotten connection cannot be read
            rows = cursor.sql(query)  # a relation streams; an executed query would be copied first
            read = getattr(rows, "to_arrow_reader", None) or rows.fetch_arrow_reader  # the name before DuckDB 1.5
            for batch in read(BLOCK_ROWS):
                yield cast(pl.DataFrame, pl.from_arrow(batch))
        except self._duckdb.Error as error:
            raise DataError(f"format.database, table {table}: cannot be read ({type(error).__name__})") from None


def _split(path: Path) -> tuple[str, str]:
    """(table, suffix); the suffix is empty where the file is of no known kind."""
    lower = path.name.lower()
    suffix = next((suffix for suffix in _SUFFIXES if lower.endswith(suffix)), "")
    return lower.removesuffix(suffix), suffix


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _name(value: str) -> str:
    return '"' + value.replace('"', '""') + '"'
