"""Any MEDS records -> virtual sites: the patients are dealt out, the records stay what they are.

    spec = PartitionSpec(by="label", sites=4, alpha=0.3)
    reports = partition(Path("mimic"), Path("mimic-by-label"), spec, "in_hospital_death", seed=0)
    study.model_copy(update={"sites": site_terms(reports)})

Each site becomes a MEDS directory below the output folder, with every label file, the splits, the code table and, where
the source has one, `truth.parquet`. Who goes where is decided in `dealing.py`, how far the sites differ is measured in
`shift.py`.

Decisions a reader would question:

- The patients are those with a label of the task. Others can take no part in a study of it, and a site's size would
  count people whom nobody trains on.
- A patient keeps its split (train, tuning, held_out). Where the source has no split file, the splits that the
  simulation would use on the source are written down, so that pooling and partitioning move nobody.
- The random ways deal out each split by the same shares, so that a site's held-out patients are like its own training
  patients: the label skew of a site should not be a difference between its two splits.
- Several sources are pooled first. Ids stay as they are if no two sources share one, else all patients are numbered
  anew: the same number at two hospitals is two people.
- The minimum is one of training patients: it is they who are hidden by the noise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import numpy.typing as npt
import polars as pl
from meds.schema import (
    code_metadata_filepath,
    data_subdirectory,
    dataset_metadata_filepath,
    subject_splits_filepath,
)
from pydantic import Field, StringConstraints, model_validator

from client.readers.meds import LABELS
from common.errors import ConfigurationError, DataError
from common.schema import BOOLEAN_VALUE, PREDICTION_TIME, SPLIT, SUBJECT_ID, TRAIN
from common.study import SiteTerms
from common.terms import Terms
from simulations import dealing
from simulations.meds_folder import TRUTH, new_folder, write_frame
from simulations.pool import CLASS, Pool, read_pool
from simulations.shift import chance_shift, code_counts, total_variation

STREAM = 2**32  # of Philox beside the seed; sites of cohorts have keys below 2**31
MOST_SITES = 1000
TRIES = 200

Kind = Literal["column", "code", "iid", "label", "size", "covariate", "time"]
_Word = Annotated[str, StringConstraints(min_length=1, max_length=256)]

_NEEDS: dict[str, tuple[str, ...]] = {
    "column": (),
    "code": ("code",),
    "iid": ("sites",),
    "label": ("sites", "alpha"),
    "size": ("sites", "sigma"),
    "covariate": ("sites", "code"),
    "time": ("sites",),
}
_MAY = {"column": ("column",)}


class PartitionSpec(Terms):
    """How patients are dealt out to virtual sites.

    by: the way.
        `column`: the hospital stands in a column of the events (`column`, or the one of `site_id_columns` in
        dataset.json). `code`: it stands in a code, as `code//NAME`, or as the text or number of an event `code`.
        `iid`: at random, equal sizes. `label`: each class of the label in shares of its own, Dirichlet(alpha).
        `size`: at random, sizes log-normal(sigma). `covariate`: by quantiles of the number of `code`.
        `time`: by quantiles of the last prediction time, the earliest at the first site.
    sites: how many virtual sites; not for `column` and `code`, which find theirs.
    alpha: below 1 most patients of a class are at few sites; 100 is nearly IID.
    sigma: standard deviation of the logarithm of the sizes; 0 gives equal sizes.
    minimum_patients: training patients that every site must have.
    """

    by: Kind
    sites: int | None = Field(default=None, ge=1, le=MOST_SITES)
    column: _Word | None = None
    code: _Word | None = None
    alpha: float | None = Field(default=None, ge=1e-3, le=1e6)
    sigma: float | None = Field(default=None, ge=0, le=10)
    minimum_patients: int = Field(default=10, ge=2)

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        needed = _NEEDS[self.by]
        for name in ("sites", "column", "code", "alpha", "sigma"):
            given = getattr(self, name) is not None
            if given and name not in (*needed, *_MAY.get(self.by, ())):
                raise ValueError(f"`{name}` says nothing in a partition by {self.by}; remove it")
            if not given and name in needed:
                raise ValueError(f"a partition by {self.by} needs `{name}`; add it")
        return self


@dataclass(frozen=True)
class SiteReport:
    """What a virtual site came to be. True counts: the records were treated as public.

    Attributes:
        site: Name, also of its folder.
        directory: Its MEDS directory.
        patients: In all splits.
        training_patients: In split train.
        events: Of all its patients.
        prevalence: Share of label rows that are positive; None where the label is not boolean.
        shift: Total variation distance of its code frequencies to the pooled ones, 0 to 1 (`shift.py`).
        chance_shift: The same, on average, of as many patients taken at random: what a shift of 0 looks like here.
    """

    site: str
    directory: Path
    patients: int
    training_patients: int
    events: int
    prevalence: float | None
    shift: float
    chance_shift: float


def partition(source: Path | Sequence[Path], out: Path, spec: PartitionSpec, task: str, seed: int) -> list[SiteReport]:
    """Write the virtual sites below `out` and return a report for each, sites in alphabetical order.

    All or nothing, as `write_cohort`. Equal arguments give equal records. The sources are read into memory whole.

    Args:
        source: One MEDS directory, or several, which are pooled.
        out: A new folder.
        spec: How to deal.
        task: Whose labelled patients are dealt out; all label files are carried.
        seed: 0 .. 2**63 - 1.

    Raises:
        ConfigurationError: an unusable folder, a seed out of range, a way of dealing that the records do not allow, or
            a site below the minimum.
        DataError: records that cannot be read, or lack what the dealing needs.
    """
    if not 0 <= seed < 2**63:
        raise ConfigurationError(f"seed={seed}: must be at least 0 and below 2**63")
    pool = read_pool([source] if isinstance(source, Path) else list(source), task)
    names, place = _deal(pool, spec, np.random.Generator(np.random.Philox(key=[seed, STREAM])))
    _check_minimum(pool, names, place, spec)
    with new_folder(out) as folder:
        for number, name in enumerate(names):
            _write_site(folder / name, pool, place == number, f"partition by {spec.by}, seed {seed}")
    return _reports(pool, out, names, place)


def site_terms(reports: Sequence[SiteReport]) -> dict[str, SiteTerms]:
    """The `sites` of a study over a partition: training patients, rounded down to two significant digits."""
    return {report.site: SiteTerms(declared_patients=_rounded_down(report.training_patients)) for report in reports}


def find_sources(data: Path) -> list[Path]:
    """`data` itself if it is a MEDS directory, else the MEDS directories right below it, in alphabetical order.

    Raises:
        ConfigurationError: neither.
    """
    if (data / data_subdirectory).is_dir():
        return [data]
    found = sorted(path.parent for path in data.glob(f"*/{data_subdirectory}") if path.is_dir())
    if not found:
        raise ConfigurationError(f"{data}: neither a MEDS directory nor a folder of some; check the path")
    return found


def _deal(pool: Pool, spec: PartitionSpec, random: np.random.Generator) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Names of the sites, and the number of each patient's site [P]."""
    subjects = pool.patients[SUBJECT_ID]
    if spec.by == "column":
        column = spec.column or _site_column(pool)
        return _named(dealing.home_by_column(pool.events, subjects, column), column)
    if spec.by == "code":
        return _named(dealing.home_by_code(pool.events, subjects, str(spec.code)), str(spec.code))
    sites = spec.sites or 1
    names = [f"site-{number:0{len(str(sites))}}" for number in range(1, sites + 1)]
    if spec.by == "covariate":
        return names, dealing.by_quantile(dealing.first_number(pool.events, subjects, str(spec.code)), sites, random)
    if spec.by == "time":
        last = pool.patients[PREDICTION_TIME].to_physical().to_numpy().astype(np.float64)
        return names, dealing.by_quantile(last, sites, random)
    for _ in range(TRIES):  # small sites are possible by chance; the first draw without one is taken (Li et al. 2022)
        place = _draw(pool, spec, sites, random)
        if _training(pool, place, sites).min() >= spec.minimum_patients:
            break
    return names, place


def _draw(pool: Pool, spec: PartitionSpec, sites: int, random: np.random.Generator) -> npt.NDArray[np.int64]:
    """One random way to deal the patients out; every split by the same shares."""
    split, splits = _numbered(pool.patients[SPLIT])
    if spec.by != "label":
        row = dealing.equal_shares(sites)
        if spec.sigma is not None:
            row = dealing.log_normal_shares(sites, spec.sigma, random)
        return dealing.by_shares(split, np.tile(row, (splits, 1)), random)
    if pool.patients[CLASS].null_count():
        raise DataError(f"task {pool.task}: a label that is a number has no classes; deal by another than label")
    label, classes = _numbered(pool.patients[CLASS])
    shares = random.dirichlet(np.full(sites, spec.alpha), classes)
    return dealing.by_shares(label * splits + split, np.repeat(shares, splits, axis=0), random)


def _numbered(values: pl.Series) -> tuple[npt.NDArray[np.int64], int]:
    """Each value's place among the distinct ones in order, and how many these are."""
    distinct, number = np.unique(values.to_numpy(), return_inverse=True)
    return number.astype(np.int64), len(distinct)


def _named(home: pl.Series, kind: str) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Sites from the names of hospitals; one that is a number gets the word for it: `icutype-1`."""
    distinct = home.unique().sort()
    if len(distinct) > MOST_SITES:
        raise ConfigurationError(f"{len(distinct)} different hospitals, at most {MOST_SITES}; that is no site column")
    names = [_word(f"{kind}-{value}" if re.fullmatch(r"[\d.-]+", value) else value) for value in distinct]
    if len(set(names)) < len(names):
        raise ConfigurationError(
            f"{len(names)} hospitals would share {len(set(names))} folder names; rename them in the records"
        )
    sites = sorted(names)
    number = {value: sites.index(name) for value, name in zip(distinct, names, strict=True)}
    return sites, np.array([number[value] for value in home], np.int64)


def _word(text: str) -> str:
    """A name that a study can have for a site: lower case, what is neither letter nor digit becomes `-`."""
    return re.sub(r"[^a-z0-9_]+", "-", text.lower()).strip("-_")[:64] or "unnamed"


def _site_column(pool: Pool) -> str:
    if len(pool.site_columns) != 1:
        raise ConfigurationError(
            f"dataset.json names {len(pool.site_columns)} site_id_columns, not 1; name the column of the hospital"
        )
    return pool.site_columns[0]


def _training(pool: Pool, place: npt.NDArray[np.int64], sites: int) -> npt.NDArray[np.int64]:
    """Training patients of each site, [K]."""
    return np.bincount(place[(pool.patients[SPLIT] == TRAIN).to_numpy()], minlength=sites)


def _check_minimum(pool: Pool, names: list[str], place: npt.NDArray[np.int64], spec: PartitionSpec) -> None:
    training = _training(pool, place, len(names))
    fewest = int(training.argmin())
    if training[fewest] < spec.minimum_patients:
        draws = f" in the last of {TRIES} draws" if spec.by in ("iid", "label", "size") else ""
        raise ConfigurationError(
            f"partition by {spec.by}: {names[fewest]} has {training[fewest]} training patients{draws}, fewer than "
            f"minimum_patients = {spec.minimum_patients}; take fewer sites, less skew or a lower minimum"
        )


def _write_site(folder: Path, pool: Pool, mine: npt.NDArray[np.bool_], title: str) -> None:
    """The records of some patients as a MEDS directory."""
    patients = pool.patients.filter(mine).select(SUBJECT_ID, SPLIT)
    for path, frame in (
        (f"{data_subdirectory}/0.parquet", pool.events),
        *((f"{LABELS}/{name}.parquet", rows) for name, rows in pool.labels.items()),
        *(((TRUTH, pool.truth),) if pool.truth is not None else ()),
    ):
        write_frame(frame.join(patients, on=SUBJECT_ID, how="semi", maintain_order="left"), folder / path)
    write_frame(patients, folder / subject_splits_filepath)
    if pool.codes is not None:
        write_frame(pool.codes, folder / code_metadata_filepath)
    description = {
        "dataset_name": f"wardround virtual site {folder.name}",
        "dataset_version": title,
        "etl_name": "simulations.partition",
        "etl_version": version("wardround"),
        "meds_version": version("meds"),
    }
    (folder / dataset_metadata_filepath).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _reports(pool: Pool, out: Path, names: list[str], place: npt.NDArray[np.int64]) -> list[SiteReport]:
    subjects = pool.patients[SUBJECT_ID]
    counts = code_counts(pool.events, subjects)
    shift = total_variation(counts, place, len(names))
    chance = chance_shift(counts, place, len(names), np.random.default_rng(0))
    rows = pool.labels[pool.task].join(pl.DataFrame({SUBJECT_ID: subjects, "place": place}), on=SUBJECT_ID)
    reports = []
    for number, name in enumerate(names):
        own = rows.filter(pl.col("place") == number)
        reports.append(
            SiteReport(
                site=name,
                directory=out / name,
                patients=int((place == number).sum()),
                training_patients=int(_training(pool, place, len(names))[number]),
                events=int(counts[place[counts[:, 0]] == number, 2].sum()),
                prevalence=float(own[BOOLEAN_VALUE].cast(pl.Float64).to_numpy().mean())
                if BOOLEAN_VALUE in own.columns
                else None,
                shift=float(shift[number]),
                chance_shift=float(chance[number]),
            )
        )
    return reports


def _rounded_down(patients: int) -> int:
    """To two significant digits: 1,234 -> 1,200."""
    unit = int(10 ** max(0, len(str(patients)) - 2))
    return patients // unit * unit
