"""The groups of an evaluation: as a file says, else sex and age as far as the study's schema names them.

A schema has no field that says "this is the sex". What is found by name is shown under the schema's own name, so that
nobody takes a guess for a fact; a file of groups says it in words.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field

from common.groups import Grouping, check_groupings
from common.schema import FeatureSchema, NumericFeature, PresenceFeature
from common.terms import Terms, load

BANDS = (45.0, 60.0, 75.0)
SEX, AGE = {"sex", "gender"}, {"age"}


class GroupsFile(Terms):
    """`subgroups:` as in a sweep file: attribute -> how patients fall into groups by it."""

    version: Literal[1]
    subgroups: dict[str, Grouping] = Field(min_length=1)


def groupings(schema: FeatureSchema, file: Path | None) -> dict[str, Grouping]:
    """Attribute -> its groups, from `file` or by name.

    Raises:
        ConfigurationError: the file cannot be used, or asks for what the study does not read.
    """
    if file is None:
        return by_name(schema)
    found = load(file, GroupsFile).subgroups
    check_groupings(schema, found, str(file))
    return found


def by_name(schema: FeatureSchema) -> dict[str, Grouping]:
    """Sex and age band, by the first word of a static's or code's name."""
    found: dict[str, Grouping] = {}
    for name, static in schema.statics.items():
        word = _first_word(name)
        if word in AGE and isinstance(static, NumericFeature) and not static.log:
            found.setdefault("age", Grouping(static=name, bands=BANDS))
        elif word in SEX and isinstance(static, PresenceFeature):
            found.setdefault("sex", Grouping(static=name, levels={name: 1, f"not {name}": 0}))
        elif word in SEX and isinstance(static, NumericFeature) and (static.min, static.max) == (0, 1):
            levels = {f"{name} {level} ({static.unit})": float(level) for level in (0, 1)}
            found.setdefault("sex", Grouping(static=name, levels=levels))
    codes = {code: code for code in schema.codes if _first_word(code) in SEX}
    if codes:
        found.setdefault("sex", Grouping(codes=codes))
    return dict(sorted(found.items(), reverse=True))


def _first_word(name: str) -> str:
    return re.split(r"[^a-z]", name.lower(), maxsplit=1)[0]
