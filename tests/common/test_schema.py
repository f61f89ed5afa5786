"""Feature schemas: what is accepted, what is refused and in which words, and the scaling they define."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from meds import schema as meds

from common import schema as names
from common.errors import ConfigurationError
from common.schema import FeatureSchema, NumericFeature, Scaling, TimeGap
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
