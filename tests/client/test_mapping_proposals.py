"""Which entries are proposed for a code, and that they follow from the code alone."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.mapping_icd import icd
from client.mapping_proposals import About, Targets, read_about
from common.errors import DataError

NINE = ["DIAG//250", "DIAG//8", "DIAG//V58", "DIAG//E888", "LAB//250", "VITAL//HeartRate", "SEX//F", "RARE//CODE"]
TEN = ["ICD10//E11", "ICD10//I50", "ICD10//I50.9", "ICD10//B12"]
VALUES = {"LAB//250", "VITAL//HeartRate", "SEX//F"}
SITE = About(
    means={"LOCAL//7": "Rate, heart", "LOCAL//8": "hypertensión", "LOCAL//10": "Heart rate"},
    parents={
        "LOCAL//1": ("LOCAL//2",),
        "LOCAL//2": ("DIAG//250", "LOCAL//1"),
        "LOCAL//3": ("DIAG//250", "DIAG//8"),
        "LOCAL//4": ("VITAL//HeartRate",),
        "LOCAL//5": ("ICD9CM/250.83",),
        "LOCAL//6": ("LOCAL//6",),
    },
)


@pytest.mark.parametrize(
    ("study", "code", "expected"),
    [
        (NINE, "diag//250", ("exact", "DIAG//250")),
        (NINE, "ICD9CM//250", ("exact", "DIAG//250")),
        (NINE, "DIAGNOSIS//ICD//9//V58", ("exact", "DIAG//V58")),
        (NINE, "DIAGNOSIS//ICD//9//008", ("exact", "DIAG//8")),
        (NINE, "DIAGNOSIS//ICD//9//25083", ("parent", "DIAG//250")),
        (NINE, "DX//250.83", ("parent", "DIAG//250")),
        (NINE, "CONDITION//SOURCE//25083", ("parent", "DIAG//250")),
        (NINE, "CONDITION//25083", None),  # a concept of OMOP
        (TEN, "CONDITION//E11.9", ("parent", "ICD10//E11")),
        (NINE, "DX//E888.1", ("parent", "DIAG//E888")),
        (NINE, "DIAGNOSIS//ICD//10//E888", None),  # another version: other things have these names
        (NINE, "DIAGNOSIS//ICD//10//V58", None),
        (NINE, "GLUCOSE//250", None),  # digits alone say nothing without a heading for diagnoses
        (NINE, "BEDSIDE//Heart rate", ("exact", "VITAL//HeartRate")),
        (NINE, "LOCAL//7", ("text", "VITAL//HeartRate")),
        (NINE, "LOCAL//8", None),
        (NINE, "LOCAL//1", ("parent", "DIAG//250")),  # over two levels, in a circle
        (NINE, "LOCAL//3", None),  # two parents: a person decides
        (NINE, "LOCAL//4", None),  # a number's unit may change with the finer code
        (NINE, "LOCAL//5", ("parent", "DIAG//250")),
        (NINE, "LOCAL//6", None),
        (TEN, "DIAG//E119", ("parent", "ICD10//E11")),
        (TEN, "DIAG//i50.9", ("exact", "ICD10//I50.9")),
        (TEN, "DIAG//I50.91", ("parent", "ICD10//I50.9")),  # the nearest
        (TEN, "DIAG//ICD9//250", None),
        (TEN, "VITAMIN//B12", None),
        (TEN, "E11.9", ("parent", "ICD10//E11")),
        ([*NINE, *TEN], "MY//Code", ("exact", "RARE//CODE")),
        (["A//X1", "B//X1"], "C//X1", None),  # two codes of the study would fit
    ],
)
def test_what_is_proposed(study: list[str], code: str, expected: tuple[str, str] | None) -> None:
    """Each rule, and each case that is left to a person."""
    found = Targets(study, [one for one in study if one not in VALUES], About()).propose(code, SITE)
    assert (found and (found.how, found.study)) == expected
    assert found is None or not found.confirmed


def test_the_consortiums_descriptions_and_parents_count_too() -> None:
    """A table of codes beside the study: its descriptions match the site's, its parents those of a finer code."""
    study = About(means={"Q//1": "Hypertension"}, parents={"LOCAL//9": ("Q//1",)})
    targets = Targets(["Q//1"], ["Q//1"], study)
    for code, how in (("LOCAL//8", "text"), ("LOCAL//9", "parent")):
        found = targets.propose(code, About(means={"LOCAL//8": "hypertension"}))
        assert found is not None
        assert (found.how, found.study) == (how, "Q//1")
    assert targets.propose("LOCAL//8", About(means={"LOCAL//8": "hypotension"})) is None


names = st.text("AEIVX0123459.", min_size=1, max_size=6)
codes = st.builds("//".join, st.tuples(st.sampled_from(["DIAG", "ICD9", "ICD10", "LAB", "X"]), names)) | names


@settings(deadline=None, max_examples=150)
@given(study=st.lists(codes, min_size=1, max_size=8), code=codes, data=st.data())
def test_any_code_gets_one_of_the_studys_codes_or_nothing(study: list[str], code: str, data: st.DataObject) -> None:
    """Nothing is raised, targets are codes of the study, parents listed ones; the order of lists does not matter."""
    listed = data.draw(st.lists(st.sampled_from(study), unique=True))
    found = Targets(study, listed, About()).propose(code, SITE)
    assert found is None or found.study in study
    assert found is None or found.how != "parent" or found.study in listed
    again = Targets(data.draw(st.permutations(study)), listed, About()).propose(code, SITE)
    assert again == found


@settings(deadline=None, max_examples=150)
@given(code=codes)
def test_an_icd_code_is_contained_in_shorter_ones(code: str) -> None:
    """Names have no dot; what contains one is a beginning of it of at least three characters."""
    one = icd(code)
    if one is not None:
        assert "." not in one.name
        for version in one.versions:
            for short in one.containing(version):
                assert one.name.startswith(short)
                assert 3 <= len(short) < len(one.name)


def test_a_table_of_codes_is_read_or_refused(tmp_path: Path) -> None:
    """Columns that are missing or empty say nothing; other types are one error."""
    path = tmp_path / "codes.parquet"
    pl.DataFrame({"code": ["A", None], "parent_codes": [None, None]}).write_parquet(path)
    assert read_about(path) == About()
    pl.DataFrame({"code": ["A"], "description": ["a"], "parent_codes": [["B"]]}).write_parquet(path)
    assert read_about(path) == About({"A": "a"}, {"A": ("B",)})
    pl.DataFrame({"code": [1]}).write_parquet(path)
    with pytest.raises(DataError, match="column `code` is Int64"):
        read_about(path)
    pl.DataFrame({"code": ["A"], "parent_codes": ["B"]}).write_parquet(path)
    with pytest.raises(DataError, match="column `parent_codes` is String"):
        read_about(path)
    path.write_bytes(b"no parquet")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        read_about(path)
