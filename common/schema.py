"""What a study reads from a record: codes, units, fixed clinical ranges, and how each becomes a model input.

A feature schema is public and the same at every site. Nothing in it may be computed from patients: a
vocabulary, a mean or a percentile of private records is itself a release. `source` and each feature's `basis`
say where the numbers come from instead.

Prediction-time rule: for a label at `prediction_time`, events up to and including that time may be used, none
after it; an event without a time is a fact that was always true (`meds.LabelSchema`, same rule).

Decisions a reader would question:

- Table and column names are MEDS 0.4. They are written out here, and a test compares them with the `meds`
  package; `meds.DataSchema.validate` is not used, because it refuses the parquet files that polars writes
  ("code: want string, got large_string").
- One code, one use: a code that is both a value and a listed code would enter the model twice.
- Columns follow the codes' alphabetical order, not the file's: two files with the same content have the same
  digest (`common.terms`), so they must also mean the same model.
- Braces in `codes` list many codes at once, as in a shell, and are written out when the file is read: two files
  that list the same codes have the same digest, however compactly they say it.
- A site may record finer codes than a study lists (`DIAG//250.83` for `DIAG//250`). `shorten` says in the public
  schema what they count as, the same at every site, instead of a mapping at each hospital that nobody else sees.
  It leads to listed codes only, never to a value or static: a number may change its unit with the finer code.
- A static that was never recorded is 0 on the scaled axis (the centre), like a value never measured. Statics
  have no mask of their own: it would cost every private model one more column of noised weights per fact.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Discriminator, Field, StringConstraints, Tag, field_validator, model_validator

from common.terms import Terms

SUBJECT_ID = "subject_id"
TIME = "time"
CODE = "code"
NUMERIC_VALUE = "numeric_value"
PREDICTION_TIME = "prediction_time"
BOOLEAN_VALUE = "boolean_value"
SPLIT = "split"

TRAIN = "train"
TUNING = "tuning"
HELD_OUT = "held_out"
SPLITS = (TRAIN, TUNING, HELD_OUT)

MAX_CODES = 100_000  # after braces are written out: a short file must not describe an embedding beyond memory
SCALED_LIMIT = 4.0  # one typing error must not own a patient's clipped gradient

MAX_CODE_LENGTH = 256
_CODE = r"^\S(.*\S)?$"
Code = Annotated[str, StringConstraints(min_length=1, max_length=MAX_CODE_LENGTH, pattern=_CODE)]
CodePattern = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=_CODE)]  # with braces
Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
Number = Annotated[float, Field(ge=-1e12, le=1e12)]  # float32 inputs; also keeps every scaled value finite


class NumericFeature(Terms):
    """A number with a fixed clinical scale: scaled = (f(x) - centre) / scale, cut to [-4, 4].

    f(x) = ln(x + 1) where `log`, else x; `centre` and `scale` are on the axis of f. Outside [min, max] a
    number is a recording error (not a clinical limit) and is dropped as if it had not been recorded.
    """

    centre: Number
    scale: Annotated[float, Field(ge=1e-9, le=1e12)]
    unit: Text
    min: Number
    max: Number
    log: bool = False
    basis: Text
    rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Rough share of hours in which a stay has this value (charting habit); for made-up cohorts only."""

    @model_validator(mode="after")
    def _consistent(self) -> NumericFeature:
        if self.min >= self.max:
            raise ValueError(f"min {self.min:g} is not below max {self.max:g}; swap or correct them")
        if self.log and self.min <= -1:
            raise ValueError(f"log needs min > -1 (ln(x + 1)), min is {self.min:g}; raise min or remove log")
        low, high = (math.log1p(self.min), math.log1p(self.max)) if self.log else (self.min, self.max)
        if not low <= self.centre <= high:
            axis = " on the log scale" if self.log else ""
            raise ValueError(f"centre {self.centre:g} is outside [{low:.4g}, {high:.4g}]{axis}; correct centre")
        return self


class LevelsFeature(Terms):
    """A static number that names a category: one column per level, 1 where the level is recorded."""

    levels: Annotated[tuple[Number, ...], Field(min_length=1)]
    basis: Text

    @model_validator(mode="after")
    def _distinct(self) -> LevelsFeature:
        if len({np.float32(level) for level in self.levels}) < len(self.levels):
            raise ValueError("levels repeat a number; list each level once")
        return self


class PresenceFeature(Terms):
    """A static code without a number, such as `SEX//F`: 1 where the record has it, else 0."""

    present: Literal[True]
    basis: Text


def _kind(static: Any) -> str:
    """Which of the three kinds of static a mapping (or an already built feature) describes."""
    if isinstance(static, LevelsFeature) or (isinstance(static, dict) and "levels" in static):
        return "levels"
    if isinstance(static, PresenceFeature) or (isinstance(static, dict) and "present" in static):
        return "presence"
    return "numeric"


StaticFeature = Annotated[
    Annotated[NumericFeature, Tag("numeric")]
    | Annotated[LevelsFeature, Tag("levels")]
    | Annotated[PresenceFeature, Tag("presence")],
    Discriminator(_kind),
]


class TimeGap(Terms):
    """How the time since the previous step becomes an input: ln(1 + gap_hours / unit_hours) - centre."""

    unit_hours: Annotated[float, Field(ge=1e-6, le=1e9)]
    centre: Annotated[float, Field(ge=-100, le=100)]

    def scaled(self, hours: NDArray[np.float64]) -> NDArray[np.float32]:
        """Gap inputs [N] for gaps [N] in hours (0 for the first step of a record)."""
        return (np.log1p(hours / self.unit_hours) - self.centre).astype(np.float32)


class Shorten(Terms):
    """What an unlisted code with a certain prefix counts as: the part that is kept, if that is a listed code.

    Give one of the two. `before`: keep what stands before this text, searched after the prefix (`.`:
    `DIAG//250.83` counts as `DIAG//250`). `characters`: keep so many characters after the prefix
    (3 after `DIAG//`: `DIAG//25083` counts as `DIAG//250`).
    """

    before: Annotated[str, StringConstraints(min_length=1, max_length=16)] | None = None
    characters: Annotated[int, Field(ge=0, le=MAX_CODE_LENGTH)] | None = None

    @model_validator(mode="after")
    def _one_rule(self) -> Shorten:
        if (self.before is None) == (self.characters is None):
            raise ValueError("give one of `before` and `characters`")
        return self

    def apply(self, code: str, prefix: str) -> str:
        """What is kept of `code`, which begins with `prefix`."""
        rest = code[len(prefix) :]
        return prefix + (rest[: self.characters] if self.before is None else rest.split(self.before, 1)[0])


def expand(pattern: str) -> list[str]:
    """The codes that a pattern stands for, the leftmost braces changing slowest.

    `{a,b}` is each of the alternatives, `{1..999}` each whole number from the first to the last, `{01..91}` the
    same with as many digits as written. A pattern without braces is one code.

    Raises:
        ValueError: braces that are nested, empty, open or neither of the two; more than MAX_CODES codes.
    """
    pieces = re.split(r"\{([^{}]*)\}", pattern)  # text, inside of braces, text, inside of braces, .., text
    if any(brace in text for text in pieces[::2] for brace in "{}"):
        raise ValueError(f"`{pattern:.60}`: a brace is nested, or its partner is missing")
    choices = [_choices(piece) if index % 2 else [piece] for index, piece in enumerate(pieces)]
    if math.prod(len(choice) for choice in choices) > MAX_CODES:
        raise ValueError(f"`{pattern:.60}` stands for more than {MAX_CODES} codes; list fewer")
    return ["".join(parts) for parts in itertools.product(*choices)]


def _choices(inside: str) -> list[str]:
    """What the inside of a pair of braces stands for."""
    ends = re.fullmatch(r"([0-9]{1,12})\.\.([0-9]{1,12})", inside)
    if ends is None:
        choices = inside.split(",")
        if len(choices) < 2 or "" in choices:
            raise ValueError(f"`{{{inside:.60}}}`: braces hold a range, as in {{1..9}}, or a list, as in {{a,b}}")
        return choices
    first, last = ends.groups()
    padded = any(len(end) > 1 and end[0] == "0" for end in (first, last))
    if padded and len(first) != len(last):
        raise ValueError(f"`{{{inside}}}`: with a leading zero both ends need as many digits, as in {{001..999}}")
    if not 0 <= int(last) - int(first) < MAX_CODES:
        raise ValueError(f"`{{{inside}}}`: a range rises, over at most {MAX_CODES} numbers; correct its ends")
    return [str(number).zfill(len(first) if padded else 0) for number in range(int(first), int(last) + 1)]


@dataclass(frozen=True)
class Scaling:
    """Numeric features as columns, so that a flat list of (column, number) is scaled at once."""

    centre: NDArray[np.float64]
    scale: NDArray[np.float64]
    log: NDArray[np.bool_]

    @classmethod
    def of(cls, features: list[NumericFeature]) -> Scaling:
        """Columns in the order of `features`."""
        return cls(
            centre=np.array([feature.centre for feature in features], dtype=np.float64),
            scale=np.array([feature.scale for feature in features], dtype=np.float64),
            log=np.array([feature.log for feature in features], dtype=np.bool_),
        )

    def scaled(self, numbers: NDArray[np.float64], column: NDArray[np.int64]) -> NDArray[np.float32]:
        """Scaled inputs [n] of in-range `numbers` [n], the i-th belonging to feature `column[i]`."""
        axis = np.where(self.log[column], np.log1p(np.where(self.log[column], numbers, 0.0)), numbers)
        scaled = (axis - self.centre[column]) / self.scale[column]
        return np.clip(scaled, -SCALED_LIMIT, SCALED_LIMIT).astype(np.float32)


class FeatureSchema(Terms):
    """The inputs of a study, read from `configs/features/*.yaml` with `common.terms.load`.

    A step's dense input is [values, mask, gap, statics]: 2 * n_values + 1 + n_statics numbers; its codes are
    a set.

    Attributes:
        values: code -> number measured over time; columns in alphabetical order of the codes.
        codes: public list of codes that count when they occur, braces written out (`expand`); any other code is
            ignored, unless `shorten` makes it one of these.
        shorten: prefix -> what an unlisted code that begins with it counts as; of several prefixes the longest.
        statics: code -> fact about the patient (a number, a category by number, or the presence of a code);
            columns in alphabetical order of the codes.
        time_gap: scale of the time between steps.
        source: where the numbers come from, and how far they were checked.

    """

    version: Literal[1]
    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
    source: Text
    values: dict[Code, NumericFeature] = Field(default_factory=dict)
    codes: tuple[CodePattern, ...] = ()
    shorten: dict[Code, Shorten] = Field(default_factory=dict)
    statics: dict[Code, StaticFeature] = Field(default_factory=dict)
    time_gap: TimeGap

    @field_validator("codes", mode="after")
    @classmethod
    def _written_out(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        codes: list[str] = []
        for pattern in patterns:
            codes += expand(pattern)
            if len(codes) > MAX_CODES:
                raise ValueError(f"codes stands for more than {MAX_CODES} codes; list fewer")
        wrong = next((c for c in codes if len(c) > MAX_CODE_LENGTH or not re.fullmatch(_CODE, c)), None)
        if wrong is not None:
            raise ValueError(f"`{wrong:.60}` is empty, has blanks at an end or over {MAX_CODE_LENGTH} characters")
        return tuple(codes)

    @field_validator("values", "statics", "shorten", mode="after")
    @classmethod
    def _alphabetical(cls, features: dict[str, Any]) -> dict[str, Any]:
        return dict(sorted(features.items()))

    @model_validator(mode="after")
    def _one_use_per_code(self) -> FeatureSchema:
        if not self.values and not self.codes:
            raise ValueError("neither values nor codes are listed, so no step could ever exist; list at least one")
        twice = [code for code, count in Counter(self.codes).items() if count > 1]
        if twice:
            raise ValueError(f"codes lists `{twice[0]}` twice ({len(twice)} such codes); keep one")
        groups = {"values": set(self.values), "codes": set(self.codes), "statics": set(self.statics)}
        for one, other in (("values", "codes"), ("values", "statics"), ("codes", "statics")):
            shared = sorted(groups[one] & groups[other])
            if shared:
                raise ValueError(f"`{shared[0]}` is in both {one} and {other}; a code has one use, keep one of them")
        return self

    @model_validator(mode="after")
    def _braces_under_codes_alone(self) -> FeatureSchema:
        for group in ("values", "statics", "shorten"):
            braced = [code for code in getattr(self, group) if "{" in code or "}" in code]
            if braced:
                raise ValueError(f"`{braced[0]}` in {group}: braces are for codes only; write each one out")
        return self

    @model_validator(mode="after")
    def _shorten_reaches_a_code(self) -> FeatureSchema:
        for prefix, rule in self.shorten.items():
            if not any(code.startswith(prefix) and rule.apply(code, prefix) == code for code in self.codes):
                raise ValueError(f"shorten.{prefix} leads to none of the listed codes; correct the prefix or the rule")
        return self

    def counts_as(self, codes: Iterable[str]) -> dict[str, str]:
        """Code -> the listed code as which it counts, for those of `codes` that `shorten` leads to one.

        A code that is listed itself, anywhere in the schema, stays what it is.
        """
        listed = set(self.codes)
        used = listed.union(self.values, self.statics)
        found: dict[str, str] = {}
        for code in codes:
            prefix = max((prefix for prefix in self.shorten if code.startswith(prefix)), key=len, default=None)
            if prefix is not None and code not in used:
                short = self.shorten[prefix].apply(code, prefix)
                if short in listed:
                    found[code] = short
        return found

    @property
    def value_codes(self) -> tuple[str, ...]:
        """Codes of the value columns, in column order."""
        return tuple(self.values)

    @property
    def n_values(self) -> int:
        """Number of value columns V."""
        return len(self.values)

    @property
    def n_codes(self) -> int:
        """Number of listed codes; a code's index is its place in `codes`."""
        return len(self.codes)

    @cached_property
    def static_columns(self) -> tuple[str, ...]:
        """Names of the K static columns: the code, or `code=level` for each level."""
        columns: list[str] = []
        for code, static in self.statics.items():
            if isinstance(static, LevelsFeature):
                columns += [f"{code}={level:g}" for level in static.levels]
            else:
                columns.append(code)
        return tuple(columns)

    @property
    def n_statics(self) -> int:
        """Number of static columns K (a category counts one per level)."""
        return len(self.static_columns)

    @property
    def n_dense(self) -> int:
        """Width of a step's dense input: values, mask, gap, statics."""
        return 2 * self.n_values + 1 + self.n_statics
