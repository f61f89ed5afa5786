"""The records of a sweep: a synthetic cohort per seed, a folder of real ones, or either of them dealt out anew.

What is made lies below the sweep's folder, `records/`, and is kept: a sweep that goes on finds it there. A partition of
real records holds patients, so that the folder is as private as its source.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from client.readers.meds import LABELS
from common.study import Study
from common.terms import parse
from simulations.sources import check_records, find_directories, write_synthetic

_checked: set[str] = set()  # what this process has read and found trainable


def prepare(
    study: Study, spec: dict[str, Any] | None, data: Path | None, study_file: Path, out: Path
) -> tuple[Study, dict[str, Path], str]:
    """The study with the sites that there are, their MEDS directories, and a fingerprint of real records.

    Args:
        study: with its seed.
        spec: how patients are dealt out to virtual sites (`simulations.partition.PartitionSpec`), or None.
        data: as in `find_directories`.
        study_file: as in `find_directories`.
        out: the sweep's folder.

    Raises:
        ConfigurationError, DataError: records or a partition that cannot be used.
    """
    simulation = study.simulation
    directories = find_directories(study, data, study_file)
    if directories is None:
        made = out / "records" / f"{simulation.cohort}-{simulation.cohort_scale:g}-seed-{simulation.seed}"
        directories = _written(study, made)
        mark = f"{simulation.cohort}-{simulation.cohort_scale:g}"
        real = ""
    else:
        mark = real = fingerprint(directories, study.task.name)
        if (checked := f"{real} {study.digest(without=frozenset())}") not in _checked:
            check_records(study, directories)
            _checked.add(checked)
    if spec is not None:
        study, directories = _dealt(study, spec, directories, mark, out)
    return study, directories, real


def fingerprint(directories: dict[str, Path], task: str) -> str:
    """Hash over names and sizes of all files, and the content of labels and splits: other records, another hash."""
    digest = hashlib.sha256()
    for site, directory in sorted(directories.items()):
        for path in sorted(path for path in directory.rglob("*") if path.is_file()):
            name = path.relative_to(directory).as_posix()
            digest.update(f"{site}/{name} {path.stat().st_size} ".encode())
            if name == f"{LABELS}/{task}.parquet" or name.startswith("metadata/"):
                digest.update(path.read_bytes())
    return digest.hexdigest()


def described(spec: dict[str, Any]) -> str:
    """A partition in a few words: `by label, sites 4, alpha 0.3`."""
    return ", ".join(f"{key} {value}" for key, value in spec.items())


def _written(study: Study, folder: Path) -> dict[str, Path]:
    """The synthetic cohort, written unless it is there: a cohort's folder exists only when it is whole."""
    if not folder.is_dir():
        write_synthetic(study, study.simulation.seed, folder)
    return {path.name: path for path in sorted(folder.iterdir()) if path.name in study.sites}


def _dealt(
    study: Study, spec: dict[str, Any], directories: dict[str, Path], mark: str, out: Path
) -> tuple[Study, dict[str, Path]]:
    """The study over virtual sites. The sites' public sizes stand beside the records, for a sweep that goes on."""
    from simulations.partition import PartitionSpec, partition, site_terms

    wanted = parse(spec, PartitionSpec, "partition")
    facts = [wanted.digest(), mark, sorted(directories), study.task.name, study.simulation.seed]
    folder = out / "records" / f"partition-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}"
    sizes = folder.with_suffix(".json")
    if not sizes.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        reports = partition(list(directories.values()), folder, wanted, study.task.name, study.simulation.seed)
        plain = {site: terms.model_dump(mode="json") for site, terms in site_terms(reports).items()}
        sizes.write_text(json.dumps(plain), encoding="utf-8")
    sites = json.loads(sizes.read_text(encoding="utf-8"))
    terms = study.model_dump(mode="json") | {"sites": sites, "quorum": min(study.quorum, len(sites))}
    return parse(terms, Study, "partition"), {site: folder / site for site in sites}
