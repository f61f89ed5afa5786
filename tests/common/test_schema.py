"""Feature schemas: what is accepted, what is refused and in which words, and the scaling they define."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from meds import schema as meds

from common import schema as names
from common.errors import ConfigurationError
from common.schema import FeatureSchema, NumericFeature, Scaling, TimeGap, expand
from common.terms import load, parse

FEATURES = Path(__file__).parents[2] / "configs" / "features"


def terms(**changes: Any) -> dict[str, Any]:
    """A small valid schema as plain data, with top-level keys replaced."""
    plain: dict[str, Any] = {
        "version": 1,
        "name": "small",
        "source": "made up",
        "values": {"HR": number(), "LACTATE": number(centre=1.1, min=0.2, max=35, log=True)},
        "codes": ["A", "B"],
        "statics": {
            "AGE": number(centre=60, scale=15, min=0, max=120),
            "UNIT": {"levels": [1, 2, 4], "basis": "flag"},
            "SEX//F": {"present": True, "basis": "flag"},
        },
        "time_gap": {"unit_hours": 2, "centre": 0.7},
    }
    return {**plain, **changes}


def number(**changes: Any) -> dict[str, Any]:
    """A valid numeric feature as plain data, with keys replaced."""
    plain = {"centre": 85, "scale": 18, "unit": "bpm", "min": 15, "max": 250, "basis": "icu"}
    return {**plain, **changes}


def refusal(plain: dict[str, Any]) -> str:
    """The message with which `plain` is refused."""
    with pytest.raises(ConfigurationError) as caught:
        parse(plain, FeatureSchema, "small.yaml")
    return str(caught.value)


def test_widths_count_every_column() -> None:
    """A step's dense input is values, mask, gap and statics, where a category counts once per level."""
    schema = parse(terms(), FeatureSchema, "small.yaml")
    assert schema.value_codes == ("HR", "LACTATE")
    assert (schema.n_values, schema.n_codes, schema.n_statics) == (2, 2, 5)
    assert schema.static_columns == ("AGE", "SEX//F", "UNIT=1", "UNIT=2", "UNIT=4")
    assert schema.n_dense == 2 * 2 + 1 + 5


def test_equal_digests_mean_equal_columns() -> None:
    """Two files that list the same features in another order have one digest and one column order."""
    one = parse(terms(), FeatureSchema, "one")
    turned = terms(values=dict(reversed(terms()["values"].items())), statics=dict(reversed(terms()["statics"].items())))
    other = parse(turned, FeatureSchema, "other")
    assert one.digest() == other.digest()
    assert one.value_codes == other.value_codes
    assert one.static_columns == other.static_columns


def test_order_of_codes_is_part_of_the_digest() -> None:
    """The list of codes numbers the embedding rows, so another order is another schema."""
    one = parse(terms(codes=["A", "B"]), FeatureSchema, "one")
    other = parse(terms(codes=["B", "A"]), FeatureSchema, "other")
    assert one.digest() != other.digest()


def test_schema_survives_pickling() -> None:
    """A schema reaches worker processes unchanged, also after its cached columns were used."""
    schema = parse(terms(), FeatureSchema, "small.yaml")
    assert schema.n_statics == 5
    assert pickle.loads(pickle.dumps(schema)) == schema


@pytest.mark.parametrize(
    ("plain", "words"),
    [
        (terms(values={"HR": number(min=300)}), ["values.HR", "min 300", "max 250"]),
        (terms(values={"HR": number(min=250)}), ["values.HR", "min 250", "max 250"]),
        (terms(values={"HR": number(scale=0)}), ["values.HR.scale"]),
        (terms(values={"HR": number(scale=-1)}), ["values.HR.scale"]),
        (terms(values={"HR": number(scal=1)}), ["values.HR.scal", "did you mean `scale`"]),
        (terms(values={"HR": number(max=math.inf)}), ["values.HR.max", "finite"]),
        (terms(values={"HR": number(log=True, min=-1)}), ["values.HR", "log needs min > -1", "-1"]),
        (terms(values={"HR": number(log=True)}), ["values.HR", "centre 85", "log scale"]),
        (terms(values={"HR": number(centre=300)}), ["values.HR", "centre 300", "[15, 250]"]),
        (terms(values={"HR": number(rate=1.5)}), ["values.HR.rate"]),
        (terms(values={"HR": number(basis=" ")}), ["values.HR.basis"]),
        (terms(values={" HR": number()}), ["values"]),
        (terms(codes=["A", "A"]), ["codes", "`A` twice"]),
        (terms(codes=["A", 250]), ["codes.1", "string"]),
        (terms(codes=["A", "{A,B}"]), ["codes", "`A` twice"]),
        (terms(codes=["A{1..9"]), ["codes", "`A{1..9`", "partner is missing"]),
        (terms(codes=["A}"]), ["codes", "`A}`", "partner is missing"]),
        (terms(codes=["{a,{b,c}}"]), ["codes", "nested"]),
        (terms(codes=["A{}"]), ["codes", "`{}`", "range", "list"]),
        (terms(codes=["A{x}"]), ["codes", "`{x}`", "range", "list"]),
        (terms(codes=["A{a,}"]), ["codes", "`{a,}`", "range", "list"]),
        (terms(codes=["A{1..}"]), ["codes", "`{1..}`", "range", "list"]),
        (terms(codes=["A{-1..3}"]), ["codes", "`{-1..3}`", "range", "list"]),
        (terms(codes=["A{9..1}"]), ["codes", "`{9..1}`", "rises"]),
        (terms(codes=["A{01..100}"]), ["codes", "`{01..100}`", "as many digits"]),
        (terms(codes=["A{1..09}"]), ["codes", "`{1..09}`", "as many digits"]),
        (terms(codes=["A{1..100001}"]), ["codes", "`{1..100001}`", "100000"]),
        (terms(codes=["A{1..999999999999}"]), ["codes", "100000"]),
        (terms(codes=["{1..400}{1..400}"]), ["codes", "`{1..400}{1..400}`", "100000"]),
        (terms(codes=["{a,b}" * 800]), ["codes", "100000"]),
        (terms(codes=["A{1..60000}", "B{1..60000}"]), ["codes", "100000"]),
        (terms(codes=["A{ ,b}"]), ["codes", "blanks at an end"]),
        (terms(codes=["A" * 200 + "{" + "a" * 100 + ",b}"]), ["codes", "256 characters"]),
        (terms(values={"LAB{1..3}": number()}), ["`LAB{1..3}` in values", "codes only"]),
        (terms(statics={"SEX//{F,M}": {"present": True, "basis": "flag"}}), ["`SEX//{F,M}` in statics"]),
        (terms(codes=["A"], shorten={"{A,B}": {"before": "."}}), ["`{A,B}` in shorten"]),
        (terms(codes=["A"], shorten={"A": {}}), ["shorten.A", "one of `before` and `characters`"]),
        (terms(codes=["A"], shorten={"A": {"before": ".", "characters": 1}}), ["shorten.A", "one of"]),
        (terms(codes=["A"], shorten={"A": {"befor": "."}}), ["shorten.A.befor", "did you mean `before`"]),
        (terms(codes=["A"], shorten={"A": {"characters": -1}}), ["shorten.A.characters"]),
        (terms(codes=["A"], shorten={"A": {"characters": True}}), ["shorten.A.characters"]),
        (terms(codes=["A"], shorten={"B": {"before": "."}}), ["shorten.B", "none of the listed codes"]),
        (terms(codes=["A.1"], shorten={"A": {"before": "."}}), ["shorten.A", "none of the listed codes"]),
        (terms(codes=["AGEX"], shorten={"AGE": {"characters": 0}}), ["shorten.AGE", "none of the listed codes"]),
        (terms(codes=["HR"]), ["`HR`", "values", "codes"]),
        (terms(values={"AGE": number()}), ["`AGE`", "values", "statics"]),
        (terms(codes=["SEX//F"]), ["`SEX//F`", "codes", "statics"]),
        (terms(values={}, codes=[]), ["neither values nor codes"]),
        (terms(statics={"UNIT": {"levels": [1, 1], "basis": "flag"}}), ["statics.UNIT", "repeat"]),
        (terms(statics={"UNIT": {"levels": [], "basis": "flag"}}), ["statics.UNIT"]),
        (terms(statics={"SEX//F": {"present": False, "basis": "flag"}}), ["statics.SEX//F"]),
        (terms(statics={"AGE": 3}), ["statics.AGE"]),
        (terms(time_gap={"unit_hours": 0, "centre": 0}), ["time_gap.unit_hours"]),
        (terms(version=2), ["version"]),
        (terms(name="Not A Name"), ["name"]),
        (terms(vlaues={}), ["vlaues", "did you mean `values`"]),
    ],
)
def test_refusal_names_file_key_and_fault(plain: dict[str, Any], words: list[str]) -> None:
    """A schema that cannot be meant is refused with the file, the key and what is wrong with it."""
    message = refusal(plain)
    assert "small.yaml" in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("pattern", "codes"),
    [
        ("DIAG//250.83", ["DIAG//250.83"]),
        ("A{8..11}", ["A8", "A9", "A10", "A11"]),
        ("A{0..2}", ["A0", "A1", "A2"]),
        ("A{0..10}B", [f"A{n}B" for n in range(11)]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{00..02}", ["00", "01", "02"]),
        ("{7..7}", ["7"]),
        ("M//{a,b-c}//{Up,>8}", ["M//a//Up", "M//a//>8", "M//b-c//Up", "M//b-c//>8"]),
        ("{x,y}{1..2}", ["x1", "x2", "y1", "y2"]),
        ("{1..2,5}", ["1..2", "5"]),
    ],
)
def test_braces_are_written_out(pattern: str, codes: list[str]) -> None:
    """A range or a list in braces stands for each of its members, the leftmost changing slowest, as in a shell."""
    assert expand(pattern) == codes


def test_compact_and_written_out_codes_are_the_same_schema() -> None:
    """Braces are a way of writing: the codes, the digest and a dump that is read again do not depend on it."""
    compact = parse(terms(codes=["A{1..3}", "B{x,y}"]), FeatureSchema, "compact")
    plain = parse(terms(codes=["A1", "A2", "A3", "Bx", "By"]), FeatureSchema, "plain")
    assert compact == plain
    assert compact.digest() == plain.digest()
    assert parse(compact.model_dump(mode="json"), FeatureSchema, "dump") == compact


def test_finer_codes_count_as_what_remains_of_them() -> None:
    """Of the prefixes that fit the longest decides, and only its result counts, if it is a listed code."""
    schema = parse(
        terms(
            codes=["D//250", "D//250.1", "D//E812", "D//V1", "S//x"],
            shorten={"D//": {"before": "."}, "D//E": {"characters": 3}, "S//": {"before": "-"}},
        ),
        FeatureSchema,
        "small.yaml",
    )
    counts_as = {
        "D//250.83": "D//250",
        "D//250.": "D//250",
        "D//250.8.3": "D//250",
        "D//E8120": "D//E812",
        "D//E812.0": "D//E812",
        "D//V1.x-y": "D//V1",
        "S//x-y": "S//x",
    }
    stay = [
        "D//250",
        "D//250.1",
        "D//2501",
        "D//251.1",
        "D//E81",
        "D//E813.1",
        "D//",
        "D//.5",
        "X//250.83",
        "HR",
        "HR.1",
    ]
    assert schema.counts_as([*counts_as, *stay]) == counts_as


def test_nothing_counts_as_a_value_or_static() -> None:
    """A finer code never becomes a number or a fact, whose unit might differ; and a listed use is never shortened."""
    rule = {"before": "."}
    schema = parse(terms(codes=["HX", "AX", "H.1"], shorten={"H": rule, "A": rule}), FeatureSchema, "small.yaml")
    assert schema.counts_as(["HR.fine", "HR", "AGE.fine", "HX.fine", "H.1"]) == {"HX.fine": "HX"}


def test_shorten_is_part_of_the_digest() -> None:
    """What finer codes count as is a term of the study, whatever the order in which it is written."""
    rules = {"A": {"before": "."}, "B": {"characters": 0}}
    one = parse(terms(shorten=rules), FeatureSchema, "one")
    assert one.digest() == parse(terms(shorten=dict(reversed(rules.items()))), FeatureSchema, "other").digest()
    assert one.digest() != parse(terms(shorten={**rules, "B": {"characters": 1}}), FeatureSchema, "third").digest()
    assert one.digest() != parse(terms(), FeatureSchema, "none").digest()


@settings(deadline=None, max_examples=100)
@given(
    numbers=st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 1)), max_size=20),
)
def test_scaling_is_the_formula(numbers: list[tuple[float, int]]) -> None:
    """Scaled = (f(x) - centre) / scale cut to [-4, 4], f = ln(x + 1) for log features, column by column."""
    plain = NumericFeature(centre=85, scale=18, unit="bpm", min=0, max=1e6, basis="icu")
    logged = NumericFeature(centre=1.1, scale=0.5, unit="mmol/L", min=0, max=1e6, log=True, basis="icu")
    scaled = Scaling.of([plain, logged]).scaled(
        np.array([x for x, _ in numbers], np.float64), np.array([column for _, column in numbers], np.int64)
    )
    assert scaled.dtype == np.float32
    for (x, column), got in zip(numbers, scaled, strict=True):
        want = (math.log(x + 1) - 1.1) / 0.5 if column else (x - 85) / 18
        assert got == pytest.approx(max(-4.0, min(4.0, want)), abs=1e-5)


def test_gap_is_zero_at_the_usual_gap() -> None:
    """A gap of one unit is ln 2 - centre, no gap is -centre."""
    gap = TimeGap(unit_hours=2, centre=0.7).scaled(np.array([0.0, 2.0]))
    assert gap.dtype == np.float32
    assert gap.tolist() == pytest.approx([-0.7, math.log(2) - 0.7], abs=1e-6)


@pytest.mark.parametrize("path", sorted(FEATURES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_schema_loads_under_its_file_name(path: Path) -> None:
    """Every shipped feature file is a valid schema named like its file."""
    assert load(path, FeatureSchema).name == path.stem


def test_physionet_schema_has_the_challenge_variables() -> None:
    """37 numbers (ventilation among them), age, sex, height, four ICU types, and a source that is honest."""
    schema = load(FEATURES / "physionet2012.yaml", FeatureSchema)
    assert (schema.n_values, schema.n_codes, schema.n_statics) == (37, 0, 7)
    assert {"MechVent", "Lactate", "GCS"} <= set(schema.values)
    assert "no clinician has checked" in schema.source
    assert all(feature.rate for feature in schema.values.values())


def test_synthetic_schema_has_the_generators_codes() -> None:
    """Six vitals on the unit scale, 400 codes, age and sex."""
    schema = load(FEATURES / "synthetic.yaml", FeatureSchema)
    assert schema.value_codes == tuple(f"VITAL//{i}" for i in range(6))
    assert schema.codes == tuple(f"CODE//{i}" for i in range(1, 401))
    assert schema.static_columns == ("AGE", "SEX//F")


def test_diabetes_schema_lists_whole_published_lists() -> None:
    """All ICD-9 categories, valid or not in some year, and all values of the attributes: 2,246 codes, none left out."""
    schema = load(FEATURES / "diabetes130.yaml", FeatureSchema)
    by_kind = Counter(code.split("//")[0] for code in schema.codes)
    assert by_kind["DIAG"] == 999 + 91 + 1000
    assert by_kind["MED"] == 24 * 3
    assert [by_kind[f"ADMISSION_{kind}"] for kind in ("TYPE", "SOURCE")] == [8, 26]
    assert by_kind["DISCHARGE_DISPOSITION"] == 30
    assert (schema.n_values, schema.n_codes, schema.n_statics) == (7, 2246, 1)
    assert schema.counts_as(
        ["DIAG//250.83", "DIAG//E849", "SPECIALTY//Surgery-Vascular", "SPECIALTY//Pediatrics-X"]
    ) == {
        "DIAG//250.83": "DIAG//250",
        "SPECIALTY//Surgery-Vascular": "SPECIALTY//Surgery",
    }
    assert "not fitted to patients" in schema.source


def test_names_are_those_of_meds() -> None:
    """Column and split names written out here equal those of the `meds` package."""
    assert tuple(meds.DataSchema.schema().names[:4]) == (
        names.SUBJECT_ID,
        names.TIME,
        names.CODE,
        names.NUMERIC_VALUE,
    )
    labels = meds.LabelSchema.schema().names
    assert labels[:3] == [names.SUBJECT_ID, names.PREDICTION_TIME, names.BOOLEAN_VALUE]
    assert meds.SubjectSplitSchema.schema().names == [names.SUBJECT_ID, names.SPLIT]
    assert (meds.train_split, meds.tuning_split, meds.held_out_split) == names.SPLITS


def test_reading_records_needs_no_deep_learning_library() -> None:
    """A site can check its records on a machine without torch, opacus and flwr."""
    code = (
        "import sys, common.schema, common.sequences, client.readers.meds;"
        "print(sorted({'torch', 'opacus', 'flwr'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=FEATURES.parents[1]
    )
    assert done.stdout.strip() == "[]"
