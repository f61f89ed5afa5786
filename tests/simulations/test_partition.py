"""Virtual sites from any records: everybody once, whole, in the same split; skew where asked and nowhere else."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq  # type: ignore[import-untyped]  # ships no types
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from meds.schema import CodeMetadataSchema, DataSchema, DatasetMetadataSchema, LabelSchema, SubjectSplitSchema
from polars.testing import assert_frame_equal

from common.errors import ConfigurationError, DataError
from common.terms import parse
from simulations.cohort import read_truth, true_tasks
from simulations.partition import PartitionSpec, SiteReport, find_sources, partition, site_terms
from simulations.sources import SPLIT_KEY
from tests.simulations.meds_cases import TASK, made_up_source, subjects_of

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "physionet2012" / "meds"
SPECS: list[dict[str, Any]] = [
    {"by": "column"},
    {"by": "column", "column": "hospital"},
    {"by": "code", "code": "WARD"},
    {"by": "code", "code": "WARD_NAME"},
    {"by": "code", "code": "WARD_NUMBER"},
    {"by": "iid", "sites": 4},
    {"by": "label", "sites": 3, "alpha": 1.0},
    {"by": "size", "sites": 3, "sigma": 0.7},
    {"by": "covariate", "sites": 3, "code": "AGE"},
    {"by": "time", "sites": 3},
]
CODED = [spec for spec in SPECS if spec["by"] in ("column", "code")]


def spec_of(**terms: Any) -> PartitionSpec:
    return PartitionSpec(**{"minimum_patients": 2, **terms})


def everything(sites: list[Path], table: str) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(site / table) for site in sites])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up_source(tmp_path_factory.mktemp("source") / "s", rows_per_patient=2)


@pytest.mark.parametrize("terms", SPECS, ids=lambda spec: "-".join(map(str, spec.values())))
def test_every_labelled_patient_is_at_one_site_whole(terms: dict[str, Any], source: Path, tmp_path: Path) -> None:
    """Whatever the way: no patient at two sites or at none; its events, labels and split are there, unchanged."""
    reports = partition(source, tmp_path / "out", spec_of(**terms), TASK, 3)
    sites = [report.directory for report in reports]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [report.site for report in reports]
    found = [subject for site in sites for subject in subjects_of(site)]
    wanted = set(subjects_of(source, f"labels/{TASK}.parquet"))
    assert len(found) == len(set(found)) == 58
    assert set(found) == wanted
    for table in (
        "data/0.parquet",
        f"labels/{TASK}.parquet",
        "labels/every_day.parquet",
        "metadata/subject_splits.parquet",
    ):
        before = pl.read_parquet(source / table).filter(pl.col("subject_id").is_in(list(wanted)))
        assert_frame_equal(everything(sites, table), before, check_row_order=False)
        for site in sites:
            assert subjects_of(site, table) == subjects_of(site)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    patients=st.integers(30, 90),
    sites=st.integers(1, 4),
    way=st.sampled_from(["iid", "label", "size", "covariate", "time"]),
    knob=st.floats(0.3, 3),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_partition_is_disjoint_complete_and_repeatable(
    patients: int, sites: int, way: str, knob: float, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """For any size, number of sites, way, seed: each patient once, splits kept, the minimum held, the same again."""
    root = tmp_path_factory.mktemp("any")
    source = made_up_source(root / "s", patients=patients, seed=seed % 1000)
    knobs = {"label": {"alpha": knob}, "size": {"sigma": knob}, "covariate": {"code": "AGE"}}.get(way, {})
    spec = spec_of(by=way, sites=sites, **knobs)
    try:
        reports = partition(source, root / "out", spec, TASK, seed)
    except ConfigurationError as error:
        assert "fewer than minimum_patients" in str(error)  # noqa: PT017 (only some of the cases are refused)
        assert not (root / "out").exists()
        return
    assert len(reports) == sites
    assert sum(report.patients for report in reports) == patients - 2
    assert min(report.training_patients for report in reports) >= 2
    folders = [report.directory for report in reports]
    splits = everything(folders, "metadata/subject_splits.parquet").sort("subject_id")
    assert_frame_equal(splits, pl.read_parquet(source / "metadata" / "subject_splits.parquet").head(patients - 2))
    again = partition(source, root / "again", spec, TASK, seed)
    for one, other in zip(folders, [report.directory for report in again], strict=True):
        for path in (path for path in one.rglob("*") if path.is_file()):
            assert path.read_bytes() == (other / path.relative_to(one)).read_bytes()


def test_another_seed_deals_otherwise(source: Path, tmp_path: Path) -> None:
    """The random ways follow the seed; those that read the records do not."""
    for terms in SPECS:
        one, other = (
            [
                subjects_of(r.directory)
                for r in partition(
                    source,
                    tmp_path / f"{terms['by']}{terms.get('code')}{terms.get('column')}{seed}",
                    spec_of(**terms),
                    TASK,
                    seed,
                )
            ]
            for seed in (1, 2)
        )
        assert (one == other) == (terms["by"] in ("column", "code", "time"))


@pytest.mark.parametrize("terms", CODED, ids=lambda spec: "-".join(map(str, spec.values())))
def test_a_hospital_column_or_code_gives_back_the_hospitals(
    terms: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    """Column, text, code suffix and number name the same three groups, as words that a study can use."""
    reports = partition(source, tmp_path / "out", spec_of(**terms), TASK, 0)
    number = "ward_number" if terms.get("code") == "WARD_NUMBER" else None
    kind = terms.get("code", "hospital").lower()
    names = sorted([f"{number}-{k}" for k in range(3)] if number else ["st-mary", "st-anne", f"{kind}-7"])
    assert [report.site for report in reports] == names
    assert sorted(report.patients for report in reports) == [19, 19, 20]
    for report in reports:
        assert {(subject - 1) // 10 % 3 for subject in subjects_of(report.directory)} == {
            (subjects_of(report.directory)[0] - 1) // 10 % 3
        }


def test_every_table_is_valid_meds(tmp_path: Path) -> None:
    """All tables and the description of each site pass the schemas of the `meds` package; subjects are contiguous."""
    source = made_up_source(tmp_path / "s")
    codes = pl.DataFrame({"code": ["AGE"], "description": ["age"], "parent_codes": [["FACTS"]]})
    codes.write_parquet(source / "metadata" / "codes.parquet")  # polars' own strings: large
    for report in partition(source, tmp_path / "out", spec_of(by="iid", sites=2), TASK, 0):
        folder = report.directory
        DataSchema.validate(pq.read_table(folder / "data" / "0.parquet"))
        for file in (folder / "labels").iterdir():
            LabelSchema.validate(pq.read_table(file))
        SubjectSplitSchema.validate(pq.read_table(folder / "metadata" / "subject_splits.parquet"))
        CodeMetadataSchema.validate(pq.read_table(folder / "metadata" / "codes.parquet"))
        DatasetMetadataSchema.validate(json.loads((folder / "metadata" / "dataset.json").read_text()))
        data = pl.read_parquet(folder / "data" / "0.parquet")
        assert data.equals(data.sort("subject_id", "time", nulls_last=False, maintain_order=True))


def test_the_truth_of_synthetic_patients_is_carried(cohort: dict[str, Path], tmp_path: Path) -> None:
    """A partition of virtual hospitals still knows every patient's exact probabilities, whatever the task."""
    reports = partition(list(cohort.values()), tmp_path / "out", spec_of(by="iid", sites=3), "phenotype_2", 0)
    before = pl.concat([pl.read_parquet(folder / "truth.parquet") for folder in cohort.values()])
    assert_frame_equal(everything([r.directory for r in reports], "truth.parquet"), before, check_row_order=False)
    assert true_tasks(reports[0].directory) == true_tasks(cohort["north"])
    assert len(read_truth(reports[0].directory, "phenotype_2")) == reports[0].patients


def test_one_source_without_truth_leaves_the_pool_without(cohort: dict[str, Path], tmp_path: Path) -> None:
    """Truth for some of the patients is none: a best possible score of a part would be read as the whole's."""
    other = made_up_source(tmp_path / "s")
    (other / "labels" / f"{TASK}.parquet").rename(other / "labels" / "diagnosis.parquet")
    reports = partition([cohort["north"], other], tmp_path / "out", spec_of(by="iid", sites=2), "diagnosis", 0)
    assert all(true_tasks(report.directory) == () for report in reports)


def test_equal_ids_of_two_sources_are_two_patients(tmp_path: Path) -> None:
    """Sources that share ids are numbered anew, source after source; nobody's records are mixed with another's."""
    sources = [made_up_source(tmp_path / name, patients=30, seed=k) for k, name in enumerate("ab")]
    (report,) = partition(sources, tmp_path / "out", spec_of(by="iid", sites=1), TASK, 0)
    assert subjects_of(report.directory) == list(range(1, 57))
    data = pl.read_parquet(report.directory / "data" / "0.parquet")
    for source, shift in zip(sources, (0, 28), strict=True):
        before = pl.read_parquet(source / "data" / "0.parquet").filter(pl.col("subject_id") < 281)
        mine = data.filter(pl.col("subject_id").is_between(shift + 1, shift + 28))
        renumbered = mine.with_columns((pl.col("subject_id") - shift - 1) * 10 + 1)
        assert_frame_equal(renumbered, before)


def test_ids_that_two_sources_do_not_share_stay(tmp_path: Path) -> None:
    """Without a clash every patient keeps its id, so that it can be found again in its source."""
    sources = [made_up_source(tmp_path / "a"), made_up_source(tmp_path / "b", first_id=5)]
    (report,) = partition(sources, tmp_path / "out", spec_of(by="iid", sites=1), TASK, 0)
    wanted = [subject for source in sources for subject in subjects_of(source, f"labels/{TASK}.parquet")]
    assert subjects_of(report.directory) == sorted(wanted)


def test_without_a_split_file_the_simulations_own_split_is_written(tmp_path: Path) -> None:
    """Records without splits get those that a simulation on the source would use, also when ids are numbered anew."""
    from client.readers.meds import split_by_key

    sources = [made_up_source(tmp_path / name, patients=40, splits=False) for name in "ab"]
    (report,) = partition(sources, tmp_path / "out", spec_of(by="iid", sites=1), TASK, 0)
    ids = pl.Series("subject_id", subjects_of(sources[0], f"labels/{TASK}.parquet"))
    expected = split_by_key(ids, SPLIT_KEY)["split"].to_list()
    assert pl.read_parquet(report.directory / "metadata" / "subject_splits.parquet")["split"].to_list() == expected * 2


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 patients."""
    return made_up_source(tmp_path_factory.mktemp("many") / "s", patients=1002)


def positives(reports: list[SiteReport]) -> list[int]:
    return [
        int(pl.read_parquet(report.directory / "labels" / f"{TASK}.parquet")["boolean_value"].sum())
        for report in reports
    ]


def test_iid_has_no_skew_beyond_chance(many: Path, tmp_path: Path) -> None:
    """Over 40 seeds sizes are equal, and positives per site vary as when dealt without looking (hypergeometric)."""
    seen = []
    for seed in range(40):
        reports = partition(many, tmp_path / str(seed), spec_of(by="iid", sites=4), TASK, seed)
        assert max(r.training_patients for r in reports) - min(r.training_patients for r in reports) <= 1
        assert max(r.patients for r in reports) - min(r.patients for r in reports) <= 2
        assert all(report.shift < 3 * report.chance_shift for report in reports)
        seen.append(positives(reports))
    total, share = sum(seen[0]), sum(seen[0]) / 1000
    variance = 250 * share * (1 - share) * 750 / 999
    first = np.array(seen, dtype=float)[:, 0]
    assert abs(first.mean() - total / 4) < 4 * math.sqrt(variance / 40)
    # the variance of a sample variance of n normals is 2 v^2 / (n - 1)
    assert abs(first.var(ddof=1) - variance) < 4 * variance * math.sqrt(2 / 39)


def test_a_large_alpha_gives_small_skew_and_a_small_one_large(many: Path, tmp_path: Path) -> None:
    """Label skew falls as alpha rises: at 10,000 prevalences are equal, at .3 they are far apart."""
    spread = {}
    for alpha in (0.3, 3.0, 1e4):
        reports = partition(many, tmp_path / str(alpha), spec_of(by="label", sites=4, alpha=alpha), TASK, 5)
        prevalence = [float(report.prevalence or 0) for report in reports]
        spread[alpha] = max(prevalence) - min(prevalence)
        assert sum(positives(reports)) == sum(
            positives(partition(many, tmp_path / f"all{alpha}", spec_of(by="iid", sites=1), TASK, 0))
        )
    assert spread[1e4] < 0.02
    assert spread[0.3] > spread[3.0] > spread[1e4]
    assert spread[0.3] > 0.15


def test_label_shares_are_the_same_in_every_split(many: Path, tmp_path: Path) -> None:
    """A site's held-out patients have the prevalence of its training patients, up to rounding."""
    for report in partition(many, tmp_path / "out", spec_of(by="label", sites=3, alpha=0.5), TASK, 1):
        labels = pl.read_parquet(report.directory / "labels" / f"{TASK}.parquet")
        splits = pl.read_parquet(report.directory / "metadata" / "subject_splits.parquet")
        counted = labels.join(splits, on="subject_id").group_by("split", "boolean_value").len()
        number = {(split, value): n for split, value, n in counted.iter_rows()}
        for value in (False, True):
            of_all = pl.read_parquet(many / "labels" / f"{TASK}.parquet").join(
                pl.read_parquet(many / "metadata" / "subject_splits.parquet"), on="subject_id"
            )
            sizes = {
                s: of_all.filter((pl.col("split") == s) & (pl.col("boolean_value") == value)).height
                for s in ("train", "held_out")
            }
            shares = [number.get((s, value), 0) / sizes[s] for s in ("train", "held_out")]
            assert abs(shares[0] - shares[1]) <= 1 / sizes["train"] + 1 / sizes["held_out"]


def test_sigma_spreads_the_sizes(many: Path, tmp_path: Path) -> None:
    """Size skew: sigma 0 gives equal sites; at 1 the logarithm of the sizes has standard deviation about 1."""
    equal = partition(many, tmp_path / "equal", spec_of(by="size", sites=5, sigma=0), TASK, 0)
    assert {report.training_patients for report in equal} == {150}
    logs = [
        np.log([r.patients for r in partition(many, tmp_path / str(s), spec_of(by="size", sites=5, sigma=1), TASK, s)])
        for s in range(20)
    ]
    sd = math.sqrt(np.mean([np.var(one, ddof=1) for one in logs]))
    assert 0.75 < sd < 1.2  # 80 degrees of freedom: 1 +- 3 x .08, cut a little by the minimum


def test_covariate_and_time_order_the_sites(many: Path, tmp_path: Path) -> None:
    """By covariate and by time a site is a range of ages or of times, patients of equal value together."""
    by_age = partition(many, tmp_path / "age", spec_of(by="covariate", sites=3, code="AGE"), TASK, 0)
    ages = [
        pl.read_parquet(r.directory / "data" / "0.parquet").filter(pl.col("code") == "AGE")["numeric_value"].to_numpy()
        for r in by_age
    ]
    assert all(one.max() < other.min() for one, other in itertools.pairwise(ages))
    assert all(300 < report.patients < 367 for report in by_age)
    by_time = partition(many, tmp_path / "time", spec_of(by="time", sites=3), TASK, 0)
    times = [pl.read_parquet(r.directory / "labels" / f"{TASK}.parquet")["prediction_time"].to_numpy() for r in by_time]
    assert all(one.max() < other.min() for one, other in itertools.pairwise(times))


def test_the_report_counts_what_is_on_disk(source: Path, tmp_path: Path) -> None:
    """Sizes, events and prevalence are those of the site's files."""
    for report in partition(source, tmp_path / "out", spec_of(by="size", sites=3, sigma=0.5), TASK, 2):
        splits = pl.read_parquet(report.directory / "metadata" / "subject_splits.parquet")["split"]
        labels = pl.read_parquet(report.directory / "labels" / f"{TASK}.parquet")["boolean_value"]
        assert (report.patients, report.training_patients) == (len(splits), int((splits == "train").sum()))
        assert report.events == pl.read_parquet(report.directory / "data" / "0.parquet").height
        assert report.prevalence == pytest.approx(float(labels.cast(pl.Float64).to_numpy().mean()))


def test_labels_of_other_kinds(tmp_path: Path) -> None:
    """Classes of an integer label are dealt out as positives are; a number has no classes, and no prevalence."""
    classes = made_up_source(tmp_path / "classes", label="integer_value", patients=200)
    reports = partition(classes, tmp_path / "a", spec_of(by="label", sites=2, alpha=1.0), TASK, 0)
    assert [report.prevalence for report in reports] == [None, None]
    numbers = made_up_source(tmp_path / "numbers", label="float_value")
    partition(numbers, tmp_path / "b", spec_of(by="iid", sites=2), TASK, 0)
    with pytest.raises(DataError, match="has no classes"):
        partition(numbers, tmp_path / "c", spec_of(by="label", sites=2, alpha=1.0), TASK, 0)


def test_a_site_below_the_minimum_is_refused(source: Path, tmp_path: Path) -> None:
    """The refusal names the site, its training patients, the minimum and what to do; nothing is written."""
    for terms in ({"by": "iid", "sites": 5}, {"by": "time", "sites": 6}, {"by": "column"}):
        spec = PartitionSpec(**terms, minimum_patients=30)
        with pytest.raises(ConfigurationError, match=r"has \d+ training patients.*minimum_patients = 30; take fewer"):
            partition(source, tmp_path / "out", spec, TASK, 0)
    assert not (tmp_path / "out").exists()


def test_small_sites_are_drawn_again(many: Path, tmp_path: Path) -> None:
    """A random way takes its first draw in which every site has the minimum, not an error for the first draw."""
    for seed in range(10):
        spec = PartitionSpec(by="label", sites=4, alpha=0.3, minimum_patients=40)
        assert min(r.training_patients for r in partition(many, tmp_path / str(seed), spec, TASK, seed)) >= 40


def test_site_terms_are_rounded_down_to_two_digits() -> None:
    """Declared patients are training patients, rounded down: 1,234 -> 1,200, 87 -> 87."""
    reports = [
        SiteReport(f"site-{n}", Path(), 9 * n, n, 0, None, 0.0, 0.0) for n in (2, 9, 87, 100, 109, 1234, 1299, 70_518)
    ]
    declared = {name: site.declared_patients for name, site in site_terms(reports).items()}
    assert list(declared.values()) == [2, 9, 87, 100, 100, 1200, 1200, 70_000]
    assert list(declared) == [report.site for report in reports]


@pytest.mark.parametrize(
    ("terms", "fault"),
    [
        ({"by": "iid"}, "a partition by iid needs `sites`"),
        ({"by": "label", "sites": 3}, "needs `alpha`"),
        ({"by": "size", "sites": 3}, "needs `sigma`"),
        ({"by": "covariate", "sites": 3}, "needs `code`"),
        ({"by": "code"}, "needs `code`"),
        ({"by": "code", "code": "A", "sites": 3}, "`sites` says nothing in a partition by code"),
        ({"by": "iid", "sites": 3, "alpha": 1}, "`alpha` says nothing in a partition by iid"),
        ({"by": "time", "sites": 3, "column": "A"}, "`column` says nothing"),
        ({"by": "label", "sites": 3, "alpha": 0}, "alpha"),
        ({"by": "iid", "sites": 0}, "sites"),
        ({"by": "iid", "sites": 3, "minimum_patients": 1}, "minimum_patients"),
        ({"by": "luck", "sites": 3}, "by"),
        ({"by": "iid", "site": 3}, "did you mean `sites`"),
    ],
)
def test_a_spec_holds_what_its_way_needs_and_no_more(terms: dict[str, Any], fault: str) -> None:
    """A missing, a useless, an unknown key and a value out of range are refused with the key's name."""
    with pytest.raises(ConfigurationError, match=fault):
        parse(terms, PartitionSpec, "sweep.yaml")


def test_records_that_cannot_be_dealt_are_refused(source: Path, tmp_path: Path) -> None:
    """Seed, sources, task, column, code and output folder: each fault is one line with the remedy."""
    iid = spec_of(by="iid", sites=2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    for wrong, fault, kind in (
        (lambda: partition(source, tmp_path / "o", iid, TASK, -1), "seed=-1", ConfigurationError),
        (lambda: partition([], tmp_path / "o", iid, TASK, 0), "0 sources", ConfigurationError),
        (lambda: partition(source, tmp_path / "o", iid, "nothing", 0), "found: every_day, outcome", DataError),
        (lambda: partition(source, tmp_path / "full", iid, TASK, 0), "not an empty folder", ConfigurationError),
        (lambda: partition(tmp_path / "full", tmp_path / "o", iid, TASK, 0), "no .*parquet", DataError),
        (
            lambda: partition(source, tmp_path / "o", spec_of(by="column", column="x"), TASK, 0),
            "no column `x`",
            DataError,
        ),
        (
            lambda: partition(source, tmp_path / "o", spec_of(by="code", code="AGE"), TASK, 0),
            "of 58 patients have no",
            DataError,
        ),
        (
            lambda: partition(source, tmp_path / "o", spec_of(by="covariate", sites=2, code="WARD"), TASK, 0),
            "0 patients have a number",
            DataError,
        ),
    ):
        with pytest.raises(kind, match=fault) as error:
            wrong()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "o").exists()


def test_a_data_set_that_names_no_hospital_column_needs_one(source: Path, tmp_path: Path) -> None:
    """Without `column`, dataset.json must name exactly one site_id_columns; hospitals must differ as folder names."""
    root = made_up_source(tmp_path / "s")
    (root / "metadata" / "dataset.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="names 0 site_id_columns"):
        partition(root, tmp_path / "o", spec_of(by="column"), TASK, 0)
    (root / "metadata" / "dataset.json").write_text("[")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        partition(root, tmp_path / "o", spec_of(by="column"), TASK, 0)
    data = pl.read_parquet(source / "data" / "0.parquet")
    (root / "metadata" / "dataset.json").unlink()
    data.with_columns(pl.col("hospital").replace("St. Mary", "ST ANNE")).write_parquet(root / "data" / "0.parquet")
    with pytest.raises(ConfigurationError, match="3 hospitals would share 2 folder names"):
        partition(root, tmp_path / "o", spec_of(by="column", column="hospital"), TASK, 0)


def test_sources_are_found_below_a_folder(source: Path, tmp_path: Path) -> None:
    """A MEDS directory is itself; a folder of some is all of them in alphabetical order; anything else is refused."""
    assert find_sources(source) == [source]
    for name in ("b", "a"):
        made_up_source(tmp_path / name)
    (tmp_path / "notes").mkdir()
    assert find_sources(tmp_path) == [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(ConfigurationError, match="neither a MEDS directory"):
        find_sources(tmp_path / "notes")


@pytest.mark.skipif(not REAL.is_dir(), reason=f"PhysioNet 2012 as MEDS is not at {REAL}")
def test_physionet_by_icu_type_is_its_own_four_sites(tmp_path: Path) -> None:
    """Pooled and dealt out by ICUType, the 8,000 real stays come back as the four units they came from."""
    reports = partition(
        find_sources(REAL), tmp_path / "out", PartitionSpec(by="code", code="ICUType"), "in_hospital_death", 0
    )
    for report, unit in zip(reports, ("ccu", "csru", "micu", "sicu"), strict=True):
        for table in (
            "data/0.parquet",
            "labels/in_hospital_death.parquet",
            "labels/length_of_stay_days.parquet",
            "metadata/subject_splits.parquet",
        ):
            mine, theirs = (pl.read_parquet(folder / table) for folder in (report.directory, REAL / unit))
            order = [
                name
                for name in ("subject_id", "time", "code", "numeric_value", "prediction_time")
                if name in mine.columns
            ]
            assert_frame_equal(mine.sort(order), theirs.sort(order), check_column_order=False)
        assert report.shift > 5 * report.chance_shift
