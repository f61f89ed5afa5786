"""A site's code map: by which of its own codes count as the study's. Private, local, confirmed by a person.

The consortium ships the study's codes, each site its map. `wardround client map-codes` proposes entries
(`client.mapping_proposals`); an entry that nobody has confirmed is not applied, and what is not mapped stays what it
was: a code that the study does not read.

Decisions a reader would question:

- Unconfirmed entries are left aside instead of refusing the file: a hospital confirms a few hundred frequent codes and
  takes part, and the rest stays unread, as without a map. `client check` says how many are confirmed.
- A confirmed entry that leads to no code of the study is refused: it is a slip of the pen, or a map for another study.
- All entries apply at once. A code that the study lists may itself be mapped: if `CODE//12` means something else here,
  only this hospital can say so.
- Codes that only a task's label asks about stand apart (`labels`): the study's inputs do not list them, so they could
  not be told from a slip of the pen. What stands under `codes` counts in labels, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import polars as pl
from pydantic import model_validator

from common.errors import ConfigurationError
from common.events import features
from common.schema import CODE, Code, FeatureSchema
from common.terms import Terms, load

if TYPE_CHECKING:
    from collections.abc import Iterable

    from client.site_file import SiteFile

How = Literal["exact", "parent", "text", "person"]


class Entry(Terms):
    """One code of the site, and the code of the study as which it counts.

    Attributes:
        site, study: the two codes.
        how: why it was proposed: the same code written otherwise, its parent, the same description; or a person's own.
        confirmed: a person said yes.
        means: the site's description of its code, for that person.
    """

    site: Code
    study: Code
    how: How = "person"
    confirmed: bool = False
    means: str | None = None


class CodeMap(Terms):
    """The file that `code_map:` of the site file names.

    Attributes:
        codes: for everything that a study reads.
        labels: for the code sets of task files alone.
    """

    version: Literal[1]
    codes: tuple[Entry, ...] = ()
    labels: tuple[Entry, ...] = ()

    @model_validator(mode="after")
    def _one_meaning(self) -> Self:
        for name in ("codes", "labels"):
            sites = [entry.site for entry in getattr(self, name)]
            if len(set(sites)) < len(sites):
                raise ValueError(f"{name}: {len(sites) - len(set(sites))} entries repeat a code of the site; keep one")
        return self

    @property
    def of_records(self) -> dict[str, str]:
        """Code of the site -> code as which it is read, as far as confirmed."""
        return {entry.site: entry.study for entry in self.codes if entry.confirmed}

    @property
    def of_labels(self) -> dict[str, str]:
        """The same for the code sets of a task: both lists."""
        return self.of_records | {entry.site: entry.study for entry in self.labels if entry.confirmed}

    @property
    def said(self) -> str:
        """How many entries are confirmed, as the end of a sentence; nothing without entries."""
        if not self.codes:
            return ""
        return f"; {len(self.of_records):,} of {len(self.codes):,} entries of the code map are confirmed"

    def check(self, schema: FeatureSchema, source: str) -> None:
        """Raise ConfigurationError if confirmed entries of `codes` lead to no code of the study."""
        targets = set(self.of_records.values())
        lost = targets - known(targets, schema)
        wrong = sum(entry.confirmed and entry.study in lost for entry in self.codes)
        if wrong:
            raise ConfigurationError(
                f"{source}: {wrong} confirmed entries under `codes` lead to no code of schema {schema.name}; correct "
                "or remove them (codes that only a label asks about stand under `labels`)"
            )


def known(codes: Iterable[str], schema: FeatureSchema) -> set[str]:
    """Those of `codes` that the study reads, also as a finer code of a listed one."""
    codes = set(codes)
    return codes & set(features(schema)[CODE].to_list()) | set(schema.counts_as(codes))


def renamed(code: pl.Expr, counts_as: dict[str, str]) -> pl.Expr:
    """The code as which each counts."""
    return code.replace(counts_as) if counts_as else code


def code_map_of(site: SiteFile, schema: FeatureSchema) -> CodeMap:
    """The map that the site file names, or one without entries.

    Raises:
        ConfigurationError: the file cannot be read, says two things of one code, or does not fit the study.
    """
    if site.code_map is None:
        return CodeMap(version=1)
    found = load(Path(site.code_map), CodeMap)
    found.check(schema, site.code_map)
    return found
