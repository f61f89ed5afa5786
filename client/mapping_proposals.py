"""Codes of a site that a study does not read -> entries of a code map for a person to confirm.

In this order, the first that finds exactly one code of the study:

1. exact: the same code written otherwise (`Diag//e11.9`, `ICD10CM//E119`, `DIAG//E11.9`).
2. parent: the nearest code of the study that contains it, by `parent_codes` of codes.parquet, else by ICD.
3. text: the same words, in any order, in the descriptions or names.

What would fit several codes of the study is left to the person.

Guarantee:
    A proposal is a function of the code itself and of lists that exist without patients (the study's codes, the
    descriptions and parents of codes). One patient more or less adds or removes entries for that patient's own codes,
    and changes how nobody else is read. What a person confirms should likewise follow from what a code means.

Decisions a reader would question:

- A parent leads to listed codes only, never to a value or a static, as `shorten` does: a number may change its unit
  with the finer code.
- Digits alone match only as ICD, below a heading that says diagnosis: 250 is also a laboratory's number.
- No distance between words: `hypertension` and `hypotension` are near.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import polars as pl

from client.mapping import Entry, How
from client.mapping_icd import icd, icd_of
from common.errors import DataError
from common.schema import CODE, FeatureSchema

K = TypeVar("K")
MOST_LEVELS = 20  # of parents; a table of parents may contain a circle


@dataclass(frozen=True)
class About:
    """What a codes.parquet says: code -> description, code -> parents."""

    means: Mapping[str, str] = field(default_factory=dict)
    parents: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def read_about(path: Path) -> About:
    """A MEDS table of codes. Raises DataError where it cannot be read; columns that are missing say nothing."""
    try:
        table = pl.read_parquet(path, glob=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path}: cannot be read as parquet ({type(error).__name__}); write the file again") from None
    kinds: dict[str, pl.DataType] = {CODE: pl.String(), "description": pl.String(), "parent_codes": pl.List(pl.String)}
    for column, kind in kinds.items():
        have = table.schema.get(column, kind if column != CODE else None)
        if have not in (kind, pl.Null, pl.List(pl.Null)):
            raise DataError(f"{path}: column `{column}` is {have}, expected {kind}; write it as MEDS has it")
    table = table.select(
        pl.col(name).cast(kind) if name in table.columns else pl.lit(None, kind).alias(name)
        for name, kind in kinds.items()
    ).drop_nulls(CODE)
    means, parents = {}, {}
    for code, description, above in table.iter_rows():
        if description and description.strip():
            means[code] = description
        if above:
            parents[code] = tuple(parent for parent in above if parent)
    return About(means, parents)


class Targets:
    """The codes of a study, to be found by how a code is written, by its place in ICD, or by words.

    Args:
        codes: all that may be a target.
        containing: those of them that may stand for a finer code.
        study: what the consortium's own table of codes says.
    """

    def __init__(self, codes: Iterable[str], containing: Iterable[str], study: About) -> None:
        every, listed = list(dict.fromkeys(codes)), list(dict.fromkeys(containing))
        self._codes, self._listed, self._study = set(every), set(listed), study
        of_icd = icd_of(every)  # these need a heading: B12 is also a vitamin
        self._written = _unique((_written(code), code) for code in every)
        self._named = _unique((_written(_parts(code)[-1]), code) for code in every if code not in of_icd)
        self._worded = _unique((key, code) for code in every for key in _keys(code, study.means.get(code)))
        self._icd = _unique(((version, one.name), code) for code, one in of_icd.items() for version in one.versions)

    @classmethod
    def of(cls, schema: FeatureSchema, study: About) -> Targets:
        """All codes of a feature schema."""
        return cls([*schema.values, *schema.codes, *schema.statics], schema.codes, study)

    def propose(self, code: str, site: About) -> Entry | None:
        """An entry for a code of the site, or None."""
        rules: tuple[tuple[How, Callable[[str, About], str | None]], ...] = (
            ("exact", lambda code, _site: self._exact(code)),
            ("parent", self._parent),
            ("text", self._text),
        )
        for how, rule in rules:
            target = rule(code, site)
            if target is not None:
                return Entry(site=code, study=target, how=how, means=site.means.get(code))
        return None

    def _exact(self, code: str) -> str | None:
        if code in self._codes:
            return code
        whole = self._written.get(_written(code))
        if whole is not None:
            return whole
        one = icd(code)
        if one is not None:
            return _only(self._icd.get((version, one.name)) for version in one.versions)
        names = [_written(part) for part in _parts(code)[1:] or [code]]
        return _only(self._named.get(name) for name in names if not name.isdigit())

    def _parent(self, code: str, site: About) -> str | None:
        level, seen = [code], {code}
        for _ in range(MOST_LEVELS):
            level = [up for one in level for about in (site, self._study) for up in about.parents.get(one, ())]
            level = [up for up in dict.fromkeys(level) if up not in seen]
            seen.update(level)
            found = {target for up in level for target in (self._exact(up) or self._contains(up),) if target}
            if found or not level:
                break
        listed = found & self._listed
        return next(iter(listed)) if len(listed) == 1 else None if listed else self._contains(code)

    def _contains(self, code: str) -> str | None:
        one = icd(code)
        if one is None:
            return None
        found = (
            next(
                (target for name in one.containing(version) if (target := self._icd.get((version, name)))),
                None,
            )
            for version in one.versions
        )
        target = _only(found)
        return target if target in self._listed else None

    def _text(self, code: str, site: About) -> str | None:
        return _only(self._worded.get(key) for key in _keys(code, site.means.get(code)))


def _parts(code: str) -> list[str]:
    return [part for part in code.split("//") if part] or [code]


def _written(code: str) -> str:
    """A code without what differs from one hand to another: case, blanks, `_` and `-`."""
    return re.sub(r"[\s_\-]+", "", code.casefold())


def _keys(code: str, description: str | None) -> set[str]:
    """What a code is called: its description, and the parts of its name after the heading, each as sorted words."""
    keys = {_words(text) for text in (description or "", *(_parts(code)[1:] or [code]))}
    return {key for key in keys if re.search("[a-z]{3}", key)}


def _words(text: str) -> str:
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)
    plain = unicodedata.normalize("NFKD", apart).encode("ascii", "ignore").decode().lower()
    return " ".join(sorted(re.findall("[a-z0-9]+", plain)))


def _unique(pairs: Iterable[tuple[K, str]]) -> dict[K, str]:
    """Key -> code, for keys that lead to one code alone."""
    found: dict[K, str] = {}
    several: set[K] = set()
    for key, code in pairs:
        if found.setdefault(key, code) != code:
            several.add(key)
    return {key: code for key, code in found.items() if key not in several}


def _only(targets: Iterable[str | None]) -> str | None:
    """The one target, if there is exactly one."""
    found = {target for target in targets if target is not None}
    return found.pop() if len(found) == 1 else None
