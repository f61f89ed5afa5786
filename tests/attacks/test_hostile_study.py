"""A study that asks for too much: refused by the pin, by the policy, and by the reader, each for itself.

A server cannot say what a hospital trains: the terms come from the hospital's own copy of the study file. So whoever
wants other terms must get another file in there, and the yes of a person. What stands in the way, one by one:
the pin (the file differs from what was agreed to), the policy before the yes, and the policy in every round, even if
the pin were forged.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from client.checks import begin_ledger, check
from client.enrolment import Enrolment
from client.fleet import Fleet, rehearsal
from client.hospital import Hospital
from client.ledger_file import read_accounts
from client.network import NetworkError
from client.site_file import SiteFile, load_site_file
from client.state import LEDGER, StateFolder
from common.errors import ConfigurationError, PolicyError
from common.keys import load_private
from common.models.network import build_network
from common.provenance import code_digest
from common.records import Header, Request, Status, reply_from_message, request_to_content
from common.study import Study, load_study
from common.training import state_of
from tests.client.coordinator import Authority, Coordinator
from tests.client.hospitals import CONFIGS, with_key, write_site, write_study

POLICY = {
    "max_epsilon": 3.0,
    "delta": 1e-5,
    "min_noise_multiplier": 1.0,
    "max_clip": 10.0,
    "max_sampling_rate": 0.5,
    "max_steps": 1000,
    "tasks": ["diagnosis"],
    "cells": ["gru"],
}
PRIVACY = {"epsilon": 3.0, "delta": 1e-5, "sampling_rate": 0.25, "clip": 3.0}
MANY = {"recipe": "fedavg-local", "rounds": 100, "local_steps": 10_000, "learning_rate": 0.02}
# What the study asks for, and the limit that refuses it.
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "no noise": ({"privacy": {**PRIVACY, "epsilon": None}}, "no noise at all, .* max_epsilon: 3.0"),
    "epsilon 5": ({"privacy": {**PRIVACY, "epsilon": 5.0}}, "epsilon 5.0, .* max_epsilon: 3.0"),
    "delta 0.01": ({"privacy": {**PRIVACY, "delta": 0.01}}, "delta 0.01, .* delta: 1e-05"),
    "clip 1e9": ({"privacy": {**PRIVACY, "clip": 1e9}}, r"clip 1000000000.0, .* max_clip: 10.0"),
    "everybody in every step": ({"privacy": {**PRIVACY, "sampling_rate": 1.0}}, "sampling rate 1.0, .*: 0.5"),
    "a million steps": (  # with all patients in each, which has a price in closed form
        {"privacy": {**PRIVACY, "sampling_rate": 1.0}, "training": MANY},
        "1040000 private steps, 40000 of them spare, .* max_steps: 1000",
    ),
    "another task": ({"task": {"name": "hiv", "prevalence": 0.1}}, "task `hiv`, .* tasks: diagnosis"),
    "another network": ({"model": {"cell": "lstm"}}, "cell `lstm`, .* cells: gru"),
}


@dataclass
class Place:
    """A hospital that has enrolled for an honest study."""

    site: SiteFile
    state: StateFolder
    path: Path
    authority: Authority
    honest: Study

    def exchange(self, **changes: Any) -> Study:
        """Put another study file in the place of the honest one."""
        return write_study(self.path.parent, **changes)

    @contextmanager
    def served(self, study: Study) -> Iterator[Coordinator]:
        """A server of this study, under the honest one's authority."""
        with Coordinator(study, self.authority.context()) as server:
            terms = yaml.safe_load(self.path.read_text())
            terms["server"]["address"] = f"localhost:{server.port}"
            self.path.write_text(yaml.safe_dump(terms))
            self.site = load_site_file(self.path)
            server.admit(load_private(self.state / "key").public_key())
            yield server


@pytest.fixture
def place(cohort: dict[str, Path], tmp_path: Path) -> Place:
    study = write_study(tmp_path)
    authority = Authority(tmp_path / "ca")
    server = {"address": "localhost:1", "ca": str(authority.file)}
    records = shutil.copytree(cohort["north"], tmp_path / "records")
    shutil.copy(records / "labels" / "diagnosis.parquet", records / "labels" / "hiv.parquet")
    path = write_site(tmp_path, records, server, policy=POLICY)
    site, state, _ = with_key(path)
    begin_ledger(site, state, np.array([], np.int64))
    Enrolment.of(site, study, "", "2027-01-01T00:00:00+00:00").write(state)
    return Place(site, state, path, authority, study)


@pytest.mark.parametrize("name", HOSTILE)
def test_an_exchanged_study_file_is_not_what_was_agreed_to(name: str, place: Place) -> None:
    """The client does not even open the records: the terms have another digest than the pinned one."""
    place.exchange(**HOSTILE[name][0])
    with pytest.raises(ConfigurationError, match=r"the study's terms are .*, enrolled on 2027-01-01.* were"):
        Hospital.open(place.path)
    assert read_accounts(place.state / LEDGER)[0].studies == {}


@pytest.mark.parametrize("name", HOSTILE)
def test_the_policy_refuses_before_anybody_is_asked(name: str, place: Place) -> None:
    """Enrolling anew for it, with its server there, ends at the policy, with the term and the limit; the pin stands."""
    changes, refusal = HOSTILE[name]
    before = Enrolment.read(place.state)
    with (
        place.served(place.exchange(**changes)),
        place.state.lock(),
        pytest.raises(PolicyError, match=refusal),
    ):
        check(place.site, place.state, lambda _name, _detail: None)
    assert Enrolment.read(place.state) == before


@pytest.mark.parametrize("name", HOSTILE)
def test_the_policy_refuses_every_round_even_with_a_forged_pin(name: str, place: Place) -> None:
    """Somebody wrote the other digest into enrolment.json: each round is answered POLICY, and nothing is charged."""
    study = place.exchange(**HOSTILE[name][0])
    Enrolment.of(place.site, study, "", "2027-01-01T00:00:00+00:00").write(place.state)
    hospital = Hospital.open(place.path)
    header = Header(study.digest(), code_digest(), 1)
    asked = rehearsal(request_to_content(Request(header, state_of(build_network(study)))), 2)
    reply = reply_from_message(hospital.answer(asked, 2))
    assert (reply.status, reply.update) == (Status.POLICY, None)
    accounts, _ = read_accounts(place.state / LEDGER)
    assert accounts.studies == {}


OWNED = "owned.txt"
FILES: dict[str, tuple[str, str]] = {
    "a network that nobody knows": ("model: {cell: transformer}", "model.cell"),
    "a term that nobody knows": ("noise_multiplier: 0", "noise_multiplier"),
    "a program": (f"name: !!python/object/apply:os.system ['touch {OWNED}']", "not valid YAML"),
    "an object": ("name: !!python/object/new:pathlib.PosixPath ['/']", "not valid YAML"),
    "a name that steers the terminal": ('name: "\\e[2J\\e[1;1H"', "name"),
    "a name with a path": ("name: ../../etc/cron.d/x", "name"),
    "a small file that is a large one": ("x: &a [1, 2]\ny: [*a, *a, *a]", "aliases"),
    "a term twice": ("version: 1\nversion: 1", "twice"),
    "a billion laughs": (
        "x0: &x0 [ha]\n" + "".join(f"x{i + 1}: &x{i + 1} [*x{i}, *x{i}, *x{i}]\n" for i in range(30)),
        "aliases",
    ),
    "an anchor alone": ("name: &name x\nextra: 1", "unknown key `extra`"),
    "a merge of what stands elsewhere": ("x: &a {version: 1}\ntask: {<<: *a}", "aliases"),
    "a tower of brackets": ("x: " + "[" * 100_000, "not valid YAML"),
    "a number with five thousand digits": ("quorum: " + "9" * 5_000, "not valid YAML"),
    "a number in base 60": ("quorum: " + ":".join(["59"] * 3_000), "limit"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_study_file_is_read_as_terms_or_not_at_all(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that means more than terms is one line for a person; it runs nothing and keeps its control characters."""
    monkeypatch.chdir(tmp_path)
    line, expected = FILES[name]
    key = line.split(":")[0]
    text = (CONFIGS / "demo.yaml").read_text().replace("features/", f"{CONFIGS}/features/")
    rest = (
        [part for part in text.splitlines() if not part.startswith(f"{key}:")]
        if key != "model"
        else [
            part
            for part in text.splitlines()
            if part.strip().split(":")[0] not in ("model", "cell", "hidden", "embedding")
        ]
    )
    (tmp_path / "study.yaml").write_text("\n".join([*rest, line]) + "\n")
    with pytest.raises(ConfigurationError, match=expected) as refused:
        load_study(tmp_path / "study.yaml")
    assert str(refused.value).isprintable()
    assert not (tmp_path / OWNED).exists()


BEYOND: dict[str, tuple[str, str]] = {
    "rounds without end": ("training: {rounds: 1e400, learning_rate: 1}", "training.rounds"),
    "rounds as many as atoms": ("training: {rounds: 100000000000000000000, learning_rate: 1}", "training.rounds"),
    "a learning rate that is none": ("training: {rounds: 3, learning_rate: .nan}", "training.learning_rate"),
    "an infinite clip": ("privacy: {epsilon: 1, delta: 1.0e-5, clip: .inf}", "privacy.clip"),
    "a network as large as memory": ("model: {cell: gru, hidden: 1000000000}", "model.hidden"),
    "a sequence as long as a life": ("records: {max_steps: 1000000000000}", "records.max_steps"),
    "more patients than people": ("sites: {north: {declared_patients: 10000000000}}", "declared_patients"),
    "a task with a path": ("task: {name: ../../other-hospital/labels, prevalence: 0.1}", "task.name"),
    "a site with a path": ("sites: {../east: {declared_patients: 50}}", "sites"),
    "a site that steers the terminal": ('sites: {"\\e[2J": {declared_patients: 50}}', "sites"),
    "features that steer the terminal": ('features: "\\e[2Jx.yaml"', "no such file"),
    "features that name no path": ('features: "\\0"', "not valid YAML"),
}


@pytest.mark.parametrize("name", BEYOND)
def test_a_section_beyond_all_bounds_is_refused_in_words(name: str, tmp_path: Path) -> None:
    """Numbers without end, paths and control characters as names: refused by key, and shown so that nothing acts."""
    line, expected = BEYOND[name]
    terms = yaml.safe_load((CONFIGS / "demo.yaml").read_text()) | {"features": str(CONFIGS / "features/synthetic.yaml")}
    del terms[line.split(":")[0]]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(terms) + line + "\n")
    with pytest.raises(ConfigurationError, match=expected) as refused:
        load_study(tmp_path / "study.yaml")
    assert str(refused.value).replace("\n", "").isprintable()


PLACES = {
    "a device without end": lambda _folder: "/dev/zero",
    "a pipe that nobody writes to": lambda folder: _pipe(folder / "pipe"),
    "a folder": lambda folder: str(folder),
    "another hospital's records": lambda folder: _records(folder / "other"),
    "this hospital's key": lambda folder: _secret(folder / "key"),
}


def _pipe(path: Path) -> str:
    os.mkfifo(path)
    return str(path)


def _records(folder: Path) -> str:
    folder.mkdir()
    (folder / "subject.yaml").write_text("4711: PATIENT\n")
    return str(folder / "subject.yaml")


def _secret(path: Path) -> str:
    path.write_text("PRIVATE: 4711\n")
    return str(path)


@pytest.mark.skipif(os.name != "posix", reason="devices and pipes")
@pytest.mark.parametrize("place", PLACES)
def test_features_that_are_elsewhere_are_read_as_features_or_not_at_all(place: str, tmp_path: Path) -> None:
    """A study may name its feature file: what has no end is not read, and no value of what is none is shown."""
    terms = yaml.safe_load((CONFIGS / "demo.yaml").read_text()) | {"features": PLACES[place](tmp_path)}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(terms))
    with pytest.raises(ConfigurationError) as refused:
        load_study(tmp_path / "study.yaml")
    assert "PATIENT" not in str(refused.value)


def test_a_study_cannot_say_where_records_are(place: Place, cohort: dict[str, Path]) -> None:
    """Its section for simulations may name another hospital's folder; a hospital's client reads its own site file's."""
    study = place.exchange(simulation={"data": str(cohort["east"].parent)})
    assert study.digest() == place.honest.digest()
    hospital = Hospital.open(place.path)
    own = len(hospital._site.dataset.sequences.patient_id)
    place.exchange()
    assert len(Hospital.open(place.path)._site.dataset.sequences.patient_id) == own


@pytest.mark.parametrize("field", ["wardround", "study", "code"])
def test_a_servers_words_cannot_steer_a_terminal(field: str, place: Place) -> None:
    """What a server says of itself is shown at enrolment: only in the form agreed, without control characters."""
    with place.served(place.honest) as server, Fleet(place.site.server, load_private(place.state / "key")) as fleet:
        assert fleet.health().study == place.honest.digest()
        server.health[field] = "\x1b[2J\x1b[1;1HEnrolled."
        with pytest.raises(NetworkError, match="no wardround server") as refused:
            fleet.health()
    assert str(refused.value).isprintable()
