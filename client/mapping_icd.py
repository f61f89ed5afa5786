"""ICD-9-CM and ICD-10 codes as hospitals write them -> version and name, and the shorter codes that contain them.

`DIAG//250.83`, `ICD9CM//25083` and `DIAGNOSIS//ICD//9//25083` are the same code. ICD-9-CM has three digits before the
dot (`V` and two, `E` and three), ICD-10 a letter and two: WHO, ICD-10 volume 2, 2.4; CDC/NCHS, ICD-9-CM guidelines.
`V58` and `E119` are codes of both; which is meant is known only where the code's heading says 9 or 10.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

NINE, TEN = 9, 10
_DIAGNOSES = re.compile("icd|diag|dx|cim|condition/source", re.IGNORECASE)
_OF_LETTERS = re.compile("(condition)?", re.IGNORECASE)  # below CONDITION, OMOP has concept ids, which are digits
_STATED = re.compile(r"(?<!\d)(9|10)(?!\d)")
_NINTH = re.compile(r"[0-9]{3,5}|V[0-9]{2,4}|E[0-9]{3,4}")
_TENTH = re.compile(r"[A-Z][0-9][0-9A-Z]{1,5}")


@dataclass(frozen=True)
class Icd:
    """A code of ICD: `name` without its dot, in capitals, digits filled to three; `versions` that it may be of."""

    name: str
    versions: frozenset[int]

    def containing(self, version: int) -> list[str]:
        """Names of the shorter codes that contain this one, the longest first, down to the category."""
        category = 4 if version == NINE and self.name[0] == "E" else 3
        return [self.name[:length] for length in range(len(self.name) - 1, category - 1, -1)]


def icd(code: str) -> Icd | None:
    """What a code is in ICD; None if it is not one, or does not say that it is a diagnosis.

    Without such a heading, a name alone or below CONDITION counts if it begins with a letter.
    """
    *parts, last = re.split("/+", code)
    heading = "/".join(parts)
    before, _, after = last.strip().upper().partition(".")
    name = (before.zfill(3) if before.isdigit() else before) + after
    if not (_DIAGNOSES.search(heading) or (_OF_LETTERS.fullmatch(heading) and before[:1].isalpha())):
        return None
    stated = {int(version) for version in _STATED.findall(heading)}
    shapes = {version for version, shape in ((NINE, _NINTH), (TEN, _TENTH)) if shape.fullmatch(name)}
    versions = shapes & stated if stated else shapes
    return Icd(name, frozenset(versions)) if versions else None


def icd_of(codes: Iterable[str]) -> dict[str, Icd]:
    """Those of a study's codes that are of ICD; what stands below one heading is of one version, if that is possible.

    A study that lists `DIAG//250` means ICD-9-CM by `DIAG//V58`, too.
    """
    found = {code: one for code in codes if (one := icd(code)) is not None}
    together: dict[str, frozenset[int]] = {}
    for code, one in found.items():
        together[_heading(code)] = together.get(_heading(code), one.versions) & one.versions
    return {code: Icd(one.name, together[_heading(code)] or one.versions) for code, one in found.items()}


def _heading(code: str) -> str:
    return code.rpartition("/")[0]
