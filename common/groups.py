"""Groups of patients by what a study reads of them: a static column of the schema, or codes of the record."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Annotated, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from common.errors import ConfigurationError
from common.schema import FeatureSchema, NumericFeature
from common.sequences import Sequences
from common.terms import Terms


class Grouping(Terms):
    """How patients fall into groups: by a static column of the schema, or by codes of the record.

    static: column name; with `bands` (their inner bounds, in the static's unit) or `levels` (group -> number).
    codes: group -> code that stands in the record.

    A static that was never recorded lies at the schema's centre and is counted there.
    """

    static: str | None = None
    bands: tuple[float, ...] = ()
    levels: dict[str, float] = Field(default_factory=dict)
    codes: dict[str, Annotated[str, Field(min_length=1)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if sum(map(bool, (self.bands, self.levels, self.codes))) != 1 or (self.static is None) != bool(self.codes):
            raise ValueError("give `static` with one of `bands` and `levels`, or `codes` alone")
        if list(self.bands) != sorted(set(self.bands)):
            raise ValueError("bands must rise")
        return self


def check_groupings(schema: FeatureSchema, groupings: Mapping[str, Grouping], where: str) -> None:
    """Refuse a grouping by what the schema does not read. Raises ConfigurationError."""
    for attribute, grouping in groupings.items():
        if grouping.static is not None and grouping.static not in schema.static_columns:
            known = ", ".join(schema.static_columns) or "none"
            raise ConfigurationError(
                f"{where}: subgroups.{attribute}.static = {grouping.static}: the static columns of {schema.name} are "
                f"{known}"
            )
        unknown = sorted(set(grouping.codes.values()) - set(schema.codes))
        if unknown:
            raise ConfigurationError(f"{where}: subgroups.{attribute}.codes: {unknown[0]} is not listed in the schema")


def members(schema: FeatureSchema, grouping: Grouping, parts: list[Sequences]) -> dict[str, NDArray[np.bool_]]:
    """Group -> which sequences [S] are in it; `parts` are several sites' records, one after another."""
    if grouping.codes:
        return {name: _with_code(schema.codes.index(code), parts) for name, code in grouping.codes.items()}
    assert grouping.static is not None
    column = schema.static_columns.index(grouping.static)
    number = np.concatenate([part.statics[:, column] for part in parts]).astype(np.float64)
    feature = schema.statics.get(grouping.static)
    if isinstance(feature, NumericFeature):
        number = number * feature.scale + feature.centre
        number = np.expm1(number) if feature.log else number
    if grouping.levels:
        return {name: np.isclose(number, level, atol=1e-3) for name, level in grouping.levels.items()}
    bounds = (-math.inf, *grouping.bands, math.inf)
    return {
        # Scaled in float32, 60 may come back as 59.9999.
        _band(low, high): (number >= low - 1e-3) & (number < high - 1e-3)
        for low, high in itertools.pairwise(bounds)
    }


def _band(low: float, high: float) -> str:
    if math.isinf(low):
        return f"< {high:g}"
    return f">= {low:g}" if math.isinf(high) else f"{low:g} to < {high:g}"


def _with_code(index: int, parts: list[Sequences]) -> NDArray[np.bool_]:
    """Whether each sequence has the code in one of its steps, [S]."""
    found = []
    for part in parts:
        before = np.concatenate([[0], np.cumsum(part.codes == index)])
        bounds = before[part.code_start[part.start]]
        found.append(np.diff(bounds) > 0)
    return np.concatenate(found)
