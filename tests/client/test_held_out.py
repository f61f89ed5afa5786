"""Who is held out at a hospital: by its split file, else by its key; never somebody who trains."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from client.hospital import site_with
from client.ledger import MemoryLedger
from client.readers.meds import split_by_key
from client.readers.own import read_held_out, read_records
from client.site_file import SiteFile, load_site_file
from client.state import StateFolder
from client.wording import best_guess, terms_in_words
from common.errors import ConfigurationError
from common.privacy.plan import Plan
from common.schema import HELD_OUT, SPLIT, SUBJECT_ID
from common.study import Study
from tests.client.hospitals import with_key, write_site, write_study

METRICS = {"noise_multiplier": 3.0, "bins": 6}


def place(
    folder: Path, records: Path, study: dict[str, Any] | None = None, **changes: Any
) -> tuple[SiteFile, StateFolder, Study]:
    terms = write_study(folder, **({"metrics": METRICS} if study is None else study))
    path = write_site(folder, records, {"address": "localhost:1", "plaintext": True}, **changes)
    site, state, _ = with_key(path)
    return site, state, terms


def policy(**limits: Any) -> dict[str, Any]:
    return {"max_epsilon": 6.0, "delta": 1e-5, **limits}


@pytest.fixture
def records(cohort: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a hospital's records, to be changed."""
    return Path(shutil.copytree(cohort["north"], tmp_path / "records"))


def split_file(records: Path) -> Path:
    return records / "metadata" / "subject_splits.parquet"


def labelled(records: Path) -> pl.Series:
    (labels,) = (records / "labels").glob("diagnosis.parquet")
    return pl.read_parquet(labels)[SUBJECT_ID].unique().sort()


def test_the_split_file_says_who_is_held_out(records: Path, tmp_path: Path) -> None:
    """Those whom it calls held_out, and none of those who train."""
    site, state, study = place(tmp_path / "site", records)
    found, training = read_held_out(site, study, state), read_records(site, study, state)
    said = pl.read_parquet(split_file(records)).filter(pl.col(SPLIT) == HELD_OUT)[SUBJECT_ID]
    assert found is not None
    assert set(found.patient_id.tolist()) == set(said) & set(labelled(records))
    assert not set(found.patient_id.tolist()) & set(training.patient_id.tolist())


def test_without_a_split_file_the_key_says_it(records: Path, tmp_path: Path) -> None:
    """The keyed hash of the state folder's secret: the same people each time, and none who trains."""
    split_file(records).unlink()
    site, state, study = place(tmp_path / "site", records)
    found, training = read_held_out(site, study, state), read_records(site, study, state)
    table = split_by_key(labelled(records), state.split_key())
    assert found is not None
    assert found.patient_id.tolist() == sorted(table.filter(pl.col(SPLIT) == HELD_OUT)[SUBJECT_ID])
    assert not set(found.patient_id.tolist()) & set(training.patient_id.tolist())


def test_a_site_file_cannot_train_on_the_held_out(records: Path, tmp_path: Path) -> None:
    """`splits: [held_out]` is refused."""
    place(tmp_path / "site", records)
    path = write_site(tmp_path / "site", records, {"address": "localhost:1", "plaintext": True}, splits=["held_out"])
    with pytest.raises(ConfigurationError, match="splits"):
        load_site_file(path)


def test_who_opted_out_is_not_scored(records: Path, tmp_path: Path) -> None:
    """A held-out patient in the file of opt-outs is left out like any other."""
    site, state, study = place(tmp_path / "site", records)
    before = read_held_out(site, study, state)
    assert before is not None
    gone = int(before.patient_id[0])
    (tmp_path / "optouts.csv").write_text(f"subject_id\n{gone}\n")
    found = read_held_out(site.model_copy(update={"exclude": str(tmp_path / "optouts.csv")}), study, state)
    assert found is not None
    assert found.patient_id.tolist() == before.patient_id[1:].tolist()


def test_nobody_held_out_is_no_error(records: Path, tmp_path: Path) -> None:
    """A split file without `held_out`: None, so that the site answers with noise alone."""
    table = pl.read_parquet(split_file(records)).with_columns(pl.lit("train").alias(SPLIT))
    table.write_parquet(split_file(records))
    site, state, study = place(tmp_path / "site", records)
    assert read_held_out(site, study, state) is None


def test_they_are_read_only_where_metrics_may_leave(records: Path, tmp_path: Path) -> None:
    """Policy and study both: then the cohort lists them beside those who train; else nobody reads them."""
    ledger = MemoryLedger(6.0, 1e-5)
    site, state, study = place(tmp_path / "telling", records, policy=policy(min_metrics_noise=3.0))
    telling = site_with(ledger, site, study, state)
    held_out = read_held_out(site, study, state)
    assert held_out is not None
    assert sorted(telling.patient_ids) == sorted(
        np.concatenate([telling.dataset.sequences.patient_id, held_out.patient_id]).tolist()
    )
    for name, terms, limits in (
        ("silent", None, policy()),
        ("too little noise", None, policy(min_metrics_noise=3.5)),
        ("not asked", {}, policy(min_metrics_noise=3.0)),
    ):
        site, state, study = place(tmp_path / name, records, terms, policy=limits)
        opened = site_with(ledger, site, study, state)
        assert opened.patient_ids == opened.dataset.sequences.patient_id.tolist()


def test_the_terms_say_what_metrics_cost_and_tell(records: Path, tmp_path: Path) -> None:
    """Told, refused by the policy, or not asked for: each in words, the price with metrics beside that of training."""
    for name, terms, limits, words in (
        (
            "telling",
            None,
            policy(min_metrics_noise=3.0),
            "12 counts of patients by label and score, each with noise of 3",
        ),
        ("silent", None, policy(), "This hospital's policy does not tell that (min_metrics_noise)"),
        ("not asked", {}, policy(), ""),
    ):
        site, _, study = place(tmp_path / name, records, terms, policy=limits)
        said = " ".join(terms_in_words(study, site, 100).split())
        assert words in said
        assert ("Metrics:" in said) == bool(words)
        assert f"Price: epsilon {study.epsilon(with_metrics=name == 'telling'):.3g} at delta" in said
    assert best_guess(study.plan()) < best_guess(study.plan(), Plan(1.0, 3.0, 1.0, 1e-5, 1)) < 1
