"""Studies: what is refused and in which words, what the digest pins, and the plan that follows."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common.errors import ConfigurationError, PlanError
from common.privacy.accounting import epsilon_of
from common.privacy.plan import Plan
from common.study import Study, load_study
from common.terms import parse

NUMBER = {"centre": 4, "scale": 2, "unit": "mmol/L", "min": 0, "max": 100, "basis": "made up", "rate": 0.5}
TERMS: dict[str, Any] = {
    "version": 1,
    "name": "small",
    "task": {"name": "diagnosis", "prevalence": 0.1},
    "features": {
        "version": 1,
        "name": "few",
        "source": "made up",
        "values": {"HR": NUMBER},
        "codes": ["A", "B"],
        "statics": {"SEX//F": {"present": True, "basis": "made up"}, "UNIT": {"levels": [1, 2], "basis": "made up"}},
        "time_gap": {"unit_hours": 24, "centre": 0.7},
    },
    "records": {"max_steps": 10},
    "privacy": {"epsilon": 3.0, "delta": 1e-5, "clip": 2.0},
    "training": {"rounds": 40, "learning_rate": 0.02},
    "sites": {"north": {"declared_patients": 4000}, "east": {"declared_patients": 1000}},
    "quorum": 2,
}


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """The small valid terms with values replaced at dotted keys."""
    terms = copy.deepcopy(TERMS)
    for key, value in changes.items():
        *path, last = key.split(".")
        node = terms
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return terms


def study(changes: dict[str, Any] | None = None) -> Study:
    return parse(changed(changes or {}), Study, "study.yaml")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"privacy.epsilon": 0}, ("privacy.epsilon", "greater than 0", "got 0")),
        ({"privacy.epsilon": -1.5}, ("privacy.epsilon", "greater than 0", "got -1.5")),
        ({"privacy.epsilon": math.inf}, ("privacy.epsilon", "finite", "got inf")),
        ({"privacy.epsilon": math.nan}, ("privacy.epsilon", "finite", "got nan")),
        ({"privacy.epsilon": True}, ("privacy.epsilon", "got True")),
        ({"metrics": {"noise_multiplier": 0}}, ("metrics.noise_multiplier", "greater than or equal to 0.25", "got 0")),
        ({"metrics": {"noise_multiplier": 5, "bins": 3}}, ("metrics.bins", "greater than or equal to 4", "got 3")),
        ({"metrics": {"bins": 10}}, ("metrics.noise_multiplier", "is missing")),
        ({"privacy.delta": 0}, ("privacy.delta", "greater than 0", "got 0")),
        ({"privacy.delta": 1}, ("privacy.delta", "less than 1", "got 1")),
        ({"privacy.delta": 0.00025}, ("privacy.delta = 0.00025", "< 0.00025", "largest site `north` (4000)", "lower")),
        ({"privacy.delta": 0.0005}, ("privacy.delta = 0.0005", "largest site `north` (4000)")),
        ({"privacy.sampling_rate": 1.01}, ("privacy.sampling_rate", "less than or equal to 1", "got 1.01")),
        ({"privacy.sampling_rate": 0}, ("privacy.sampling_rate", "greater than 0", "got 0")),
        ({"privacy.clip": 0}, ("privacy.clip", "greater than or equal to 0.000001", "got 0")),
        ({"privacy.clip": -2}, ("privacy.clip", "greater than or equal to 0.000001", "got -2")),
        ({"privacy.clip": 1e-20}, ("privacy.clip", "greater than or equal to 0.000001", "got 1e-20")),
        ({"privacy.clip": 1e10}, ("privacy.clip", "less than or equal to 1000000000", "got 10000000000")),
        ({"privacy.clip": math.inf}, ("privacy.clip", "finite")),
        ({"privacy.spare_rounds": -1}, ("privacy.spare_rounds", "greater than or equal to 0", "got -1")),
        ({"privacy.noise_multiplier": 0}, ("unknown key `privacy.noise_multiplier`", "known keys", "sampling_rate")),
        ({"training.rounds": 0}, ("training.rounds", "greater than or equal to 1", "got 0")),
        ({"training.rounds": 2.5}, ("training.rounds", "got 2.5")),
        ({"training.local_steps": 2}, ("local_steps = 2 must be 1 in fedavg-one-step", "fedavg-local")),
        ({"training.recipe": "fedsgd"}, ("training.recipe", "fedavg-one-step", "got 'fedsgd'")),
        ({"training.seed": 1}, ("unknown key `training.seed`",)),
        ({"quorum": 3}, ("quorum = 3 must be <= 2", "lower it or add sites")),
        ({"quorum": 0}, ("quorum", "greater than or equal to 1", "got 0")),
        ({"sites": {}}, ("sites", "at least 1")),
        ({"sites.North": {"declared_patients": 4}}, ("sites.North", "pattern")),
        (
            {"sites.north.declared_patients": 1},
            ("sites.north.declared_patients", "greater than or equal to 2", "got 1"),
        ),
        ({"sites.north.patients": 1}, ("unknown key `sites.north.patients`; did you mean `declared_patients`?",)),
        ({"task.prevalence": 0}, ("task.prevalence", "greater than 0")),
        ({"model.pooling": []}, ("model.pooling", "at least one pooling")),
        ({"model.pooling": ["last_state", "last_state"]}, ("model.pooling", "at most once")),
        ({"model.cell": "none", "model.pooling": ["last_state"]}, ("cell: none", "mean_input or last_input")),
        ({"model.cell": "transformer"}, ("model.cell", "'gru'", "got 'transformer'")),
        ({"model.hiden": 32}, ("unknown key `model.hiden`; did you mean `hidden`?",)),
        ({"simulation.cohort": "a", "simulation.data": "b"}, ("simulation", "not both")),
        ({"simulation.seed": -1}, ("simulation.seed", "got -1")),
        ({"device": "gpu"}, ("device", "'cuda'", "got 'gpu'")),
        ({"version": 2}, ("version 2", "reads 1", "upgrade")),
        ({"version": True}, ("version", "got True")),
        ({"records.max_steps": 0}, ("records.max_steps", "got 0")),
        ({"features.values.HR.scale": 0}, ("features.values.HR.scale", "got 0")),
        ({"features.statics.UNIT.level": 0}, ("unknown key `features.statics.UNIT.level`; did you mean `levels`?",)),
    ],
)
def test_an_impossible_study_is_refused(changes: dict[str, Any], says: tuple[str, ...]) -> None:
    """A value out of its bounds is one error that names file, key, value and bound."""
    with pytest.raises(ConfigurationError) as caught:
        study(changes)
    for part in ("study.yaml", *says):
        assert part in str(caught.value)


def test_epsilon_must_be_written() -> None:
    """Training without noise is said (`epsilon: null`), never the result of a forgotten line."""
    terms = changed({})
    del terms["privacy"]["epsilon"]
    with pytest.raises(ConfigurationError, match=r"key `privacy\.epsilon` is missing"):
        parse(terms, Study, "study.yaml")
    assert study({"privacy.epsilon": None}).plan().noise_multiplier == 0


def test_metrics_are_a_plan_of_one_step_on_everybody() -> None:
    """Held-out patients are scored once, all of them, at the study's noise and delta, with no spare; or not at all."""
    asked = study({"metrics": {"noise_multiplier": 5.0}})
    assert asked.metrics_plan() == Plan(1.0, 5.0, 1.0, asked.privacy.delta, 1, 0)
    assert study().metrics_plan() is None
    assert asked.plan() == study().plan()
    assert asked.digest() != study().digest()
    assert study().epsilon(with_metrics=True) == study().epsilon(with_metrics=False) == epsilon_of(study().plan())


@given(sizes=st.lists(st.integers(2, 10**6), min_size=1, max_size=5), delta=st.floats(1e-9, 0.9))
@settings(deadline=None, max_examples=50)
def test_delta_lies_below_one_over_every_cohort(sizes: list[int], delta: float) -> None:
    """A study is accepted exactly if delta is below 1 / declared_patients at each of its sites."""
    sites = {f"site{k}": {"declared_patients": size} for k, size in enumerate(sizes)}
    terms = changed({"sites": sites, "quorum": 1, "privacy.delta": delta})
    if all(delta < 1 / size for size in sizes):
        assert parse(terms, Study, "study.yaml").privacy.delta == delta
    else:
        with pytest.raises(ConfigurationError, match="delta"):
            parse(terms, Study, "study.yaml")


def leaves(terms: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The path of every single value in plain data."""
    inside = terms.items() if isinstance(terms, dict) else enumerate(terms) if isinstance(terms, list) else None
    if inside is None:
        return [path]
    return [leaf for key, value in inside for leaf in leaves(value, (*path, key))]


WHOLE = study(
    {
        "records.bin_hours": 2.0,
        "training.recipe": "fedavg-local",
        "metrics": {"noise_multiplier": 5.0, "bins": 10},
    }
).model_dump(mode="json")
LEAVES = leaves(WHOLE)
words = st.sampled_from(
    [
        "gru",
        "lstm",
        "none",
        "random",
        "last_state",
        "fedavg-local",
        "declared",
        "uniform",
        "cuda",
        "other",
        "train",
        "tuning",
    ]
)
values = st.none() | st.booleans() | st.integers(1, 10**5) | st.floats(1e-8, 1e5, exclude_min=True) | words


@given(leaf=st.sampled_from(LEAVES), value=values)
@settings(deadline=None, max_examples=400)
def test_the_digest_pins_everything_but_simulation_and_sites(leaf: tuple[str | int, ...], value: Any) -> None:
    """Any single value that changes, anywhere in the terms, changes the digest, except in `simulation` and `sites`."""
    terms = copy.deepcopy(WHOLE)
    node: Any = terms
    for part in leaf[:-1]:
        node = node[part]
    assume(node[leaf[-1]] != value or isinstance(value, bool) != isinstance(node[leaf[-1]], bool))
    node[leaf[-1]] = value
    try:
        other = parse(terms, Study, "study.yaml")
    except ConfigurationError:
        return
    same = parse(WHOLE, Study, "study.yaml").digest() == other.digest()
    assert same == (leaf[0] in ("simulation", "sites"))


CONSTANT = [("version",), ("features", "version"), ("features", "statics", "SEX//F", "present")]  # one valid value


@pytest.mark.parametrize(
    "leaf", [x for x in LEAVES if x[0] not in ("simulation", "sites") and x not in CONSTANT], ids=str
)
def test_every_value_is_in_the_digest(leaf: tuple[str | int, ...]) -> None:
    """No field is left out of the digest: of some other values for it, at least one is valid and changes it."""
    base = parse(WHOLE, Study, "study.yaml").digest()
    digests = []
    node: Any = WHOLE
    for part in leaf:
        node = node[part]
    options: list[Any] = [not node] if isinstance(node, bool) else []
    options += [node * 1.01, node + 1, node - 1] if isinstance(node, int | float) else []
    options += ["b", "lstm", "random", "none", "declared", "fedavg-one-step", "cuda", "last_state"]
    for option in options:
        terms = copy.deepcopy(WHOLE)
        inner: Any = terms
        for part in leaf[:-1]:
            inner = inner[part]
        if isinstance(inner, list) and leaf[1] == "pooling":
            inner.pop()
        else:
            inner[leaf[-1]] = option
        try:
            digests.append(parse(terms, Study, "study.yaml").digest())
        except ConfigurationError:
            continue
    assert any(digest != base for digest in digests)


def test_a_new_hospital_leaves_the_pins_of_the_others() -> None:
    """A site more, and the digest that every site has pinned is what it was."""
    terms = copy.deepcopy(WHOLE)
    terms["sites"]["newcomer"] = {"declared_patients": 700}
    assert parse(terms, Study, "study.yaml").digest() == parse(WHOLE, Study, "study.yaml").digest()


@given(data=st.data(), flow=st.sampled_from([True, False, None]))
@settings(deadline=None, max_examples=25)
def test_layout_does_not_change_the_digest(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, flow: bool | None
) -> None:
    """Order of keys, style, comments and features in a file of their own leave digest and study as they are."""

    def shuffled(terms: Any) -> Any:
        if not isinstance(terms, dict):
            return terms
        keys = data.draw(st.permutations(list(terms)))
        return {key: shuffled(terms[key]) for key in keys}

    folder = tmp_path_factory.getbasetemp()
    terms = shuffled(TERMS)
    (folder / "features.yaml").write_text(yaml.safe_dump(terms["features"], sort_keys=False, default_flow_style=flow))
    if data.draw(st.booleans()):
        terms["features"] = "features.yaml"
    path = folder / "study.yaml"
    path.write_text("# a comment\n" + yaml.safe_dump(terms, sort_keys=False, default_flow_style=flow))
    loaded = load_study(path)
    assert loaded.digest() == study().digest()
    assert (
        loaded.model_dump_json() == study().model_dump_json()
    )  # the same order of sites too, wherever they are summed


def test_a_fault_in_the_feature_file_names_that_file(tmp_path: Path) -> None:
    """An error in the feature file is reported there, with its own key; a missing one is named."""
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(changed({"features": "inputs.yaml"})))
    with pytest.raises(ConfigurationError, match=r"inputs\.yaml: no such file"):
        load_study(tmp_path / "study.yaml")
    (tmp_path / "inputs.yaml").write_text("- 1")
    with pytest.raises(ConfigurationError, match=r"inputs\.yaml: expected a mapping"):
        load_study(tmp_path / "study.yaml")
    (tmp_path / "inputs.yaml").write_text(yaml.safe_dump(TERMS["features"] | {"code": ["A"]}))
    with pytest.raises(ConfigurationError, match=r"inputs\.yaml: unknown key `code`; did you mean `codes`\?"):
        load_study(tmp_path / "study.yaml")


@pytest.mark.parametrize("features", [None, 3, ["a"], True])
def test_features_of_another_type_are_refused(tmp_path: Path, features: Any) -> None:
    """`features` is a file or the features themselves."""
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(changed({"features": features})))
    with pytest.raises(ConfigurationError, match="`features`"):
        load_study(tmp_path / "study.yaml")


def test_the_plan_prices_all_steps_and_spares() -> None:
    """Steps are rounds x local steps; spare rounds are priced like planned ones; the price keeps to epsilon."""
    terms = study(
        {"training.recipe": "fedavg-local", "training.local_steps": 3, "privacy.spare_rounds": 2, "privacy.clip": 1.5}
    )
    plan = terms.plan()
    assert plan == Plan(0.25, plan.noise_multiplier, 1.5, 1e-5, 120, 6)
    assert 2.99 < epsilon_of(plan) <= 3.0
    without = study(
        {"training.recipe": "fedavg-local", "training.local_steps": 3, "privacy.spare_rounds": 0, "privacy.clip": 1.5}
    )
    assert plan.noise_multiplier > without.plan().noise_multiplier


def test_a_budget_that_no_noise_reaches_is_a_plan_error() -> None:
    """An epsilon out of reach is refused with what to change."""
    with pytest.raises(PlanError, match="take fewer steps, a smaller q or a larger epsilon"):
        study({"privacy.epsilon": 1e-9, "privacy.sampling_rate": 1.0}).plan()


@pytest.mark.parametrize(("aggregation", "north"), [("precision", 16 / 17), ("declared", 4 / 5), ("uniform", 1 / 2)])
def test_aggregation_weights_follow_from_declared_patients(aggregation: str, north: float) -> None:
    """Weights sum to 1 and are functions of the published cohort sizes alone."""
    weights = study({"training.aggregation": aggregation}).aggregation_weights()
    assert weights["north"] == pytest.approx(north)
    assert sum(weights.values()) == pytest.approx(1)


def test_the_learning_rate_decays_linearly_or_not_at_all() -> None:
    """Round 1 has the full rate; linear decay loses one rounds-th of it each round and stays positive."""
    rates = [study().learning_rate(number) for number in range(1, 41)]
    assert rates[0] == 0.02
    assert rates[-1] == pytest.approx(0.02 / 40)
    assert all(a - b == pytest.approx(0.02 / 40) for a, b in itertools.pairwise(rates))
    assert study({"training.decay": "none"}).learning_rate(40) == 0.02
