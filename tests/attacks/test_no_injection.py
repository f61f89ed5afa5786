"""Nobody can choose or silence a hospital's randomness: not by a key in a file, a variable, a seed, or a message.

Who may run other code in the hospital's process is outside: such a one has the records. What is tried here is what a
coordinator can ask a hospital to write into its files, what an administrator's environment may hold by accident, and
what a server can send.
"""

from __future__ import annotations

import ast
import copy
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from flwr.app import Array, ArrayRecord, ConfigRecord, MessageType, RecordDict

from client.entries import Entry
from client.entry_file import read_entries
from client.site_file import load_site_file
from client.state import LEDGER
from common.errors import ConfigurationError
from common.keys import read_public
from common.models.network import build_network
from common.provenance import code_digest
from common.records import Header, Reply, Request, Status, reply_from_message, request_to_content
from common.study import Study, load_study
from common.training import state_of
from tests.client.coordinator import Authority, Coordinator
from tests.client.hospitals import write_site, write_study
from tests.e2e.deployment import ROOT, Deployment, Running, deployed
from tests.small import small_study

CHOICES: dict[str, Any] = {
    "seed": 0,
    "random_seed": 0,
    "randomness": "simulations.seeded.Silent",
    "generator": "mt19937",
    "noise": False,
    "noise_multiplier": 0.0,
    "noise_generator": 0,
    "secure_mode": False,
    "deterministic": True,
    "sampling": "all",
    "debug": True,
    "simulation": {"seed": 0},
    "plugin": "tests.client.scripted",
    "environment": {"SEED": 0},
}
VARIABLES = {
    "PYTHONHASHSEED": "0",
    **dict.fromkeys(("SEED", "RANDOM_SEED", "NUMPY_SEED", "TORCH_SEED", "PL_GLOBAL_SEED", "FLWR_SEED"), "0"),
    **dict.fromkeys(("WARDROUND_SEED", "WARDROUND_NOISE", "WARDROUND_NOISE_MULTIPLIER", "OPACUS_SECURE_MODE"), "0"),
    **dict.fromkeys(("WARDROUND_DEBUG", "WARDROUND_TEST", "CI", "PYTEST_CURRENT_TEST", "DETERMINISTIC"), "1"),
    "WARDROUND_RANDOMNESS": "simulations.seeded.Silent",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
EXTRA_KEYS: dict[str, int | float | str | bool] = {
    "seed": 0,
    "randomness": "simulations.seeded.Silent",
    "noise_multiplier": 0.0,
    "epsilon": 1e6,
    "steps": 9,
    "secure_mode": False,
}


@pytest.fixture
def site_file(tmp_path: Path) -> dict[str, Any]:
    """A site file as data; it is valid."""
    path = write_site(tmp_path, tmp_path, {"address": "localhost:1", "ca": "ca.crt"})
    load_site_file(path)
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return found


@pytest.mark.parametrize("key", CHOICES)
@pytest.mark.parametrize("section", ["", "policy", "server"])
def test_a_site_file_has_no_key_for_it(section: str, key: str, site_file: dict[str, Any], tmp_path: Path) -> None:
    """Each is refused by name as an unknown key, in every section of the site file."""
    refuse(load_site_file, with_key(site_file, section, key), key, tmp_path / "changed.yaml")


@pytest.mark.parametrize("key", CHOICES)
@pytest.mark.parametrize("section", ["", "task", "records", "model", "privacy", "training", "sites.north"])
def test_a_study_has_no_key_for_it(section: str, key: str, tmp_path: Path) -> None:
    """Each is refused by name as an unknown key, in every section of the study.

    Its section `simulation`, which hospitals have no use for, may not name anything but a seed of virtual hospitals;
    that a hospital's client does not look at it is shown with processes, below.
    """
    terms = small_study().model_dump(mode="json", exclude_none=True)
    where = section or ("simulation" if key == "simulation" else "")
    refuse(load_study, with_key(terms, where, key), key, tmp_path / "changed.yaml")


def with_key(terms: dict[str, Any], section: str, key: str) -> dict[str, Any]:
    """A copy with one key more in `section`, a path of keys."""
    changed = place = copy.deepcopy(terms)
    for name in section.split(".") if section else ():
        place = place.setdefault(name, {})
    place[key] = CHOICES[key]
    return changed


def refuse(load: Callable[[Path], object], terms: dict[str, Any], key: str, path: Path) -> None:
    """Loading must fail for that key."""
    path.write_text(yaml.safe_dump(terms))
    with pytest.raises(ConfigurationError, match=rf"unknown key `[a-z.]*{key}`"):
        load(path)


def test_the_hospitals_code_reads_no_variable() -> None:
    """`client` and `common` set variables for Flower and torch; no line of theirs reads one."""
    read = []
    for path in sorted(path for room in ("client", "common") for path in (ROOT / room).rglob("*.py")):
        tree = ast.parse(path.read_text())
        set_here = {
            id(target.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Subscript)
        }
        for node in ast.walk(tree):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            if name in ("environ", "environb", "getenv", "getenvb") and id(node) not in set_here:
                read.append(f"{path.relative_to(ROOT)}:{node.lineno}")  # type: ignore[attr-defined]  # both have one
    assert read == []


@dataclass
class Twice:
    """One hospital, copied before its first round and asked for the same round twice: all is equal but the entropy."""

    study: Study
    malformed: dict[str, Reply]
    first: Reply
    again: Reply
    second: Reply
    entries: list[list[Entry]]  # of the two ledgers, at the end


@pytest.fixture(scope="module")
def twice(cohort: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Twice:
    folder = tmp_path_factory.mktemp("twice")
    study = write_study(
        folder / "one",
        privacy={"epsilon": 3.0, "delta": 1e-5, "sampling_rate": 1.0, "clip": 3.0},
        simulation={"seed": 0, "cohort": "medium"},
    )
    authority = Authority(folder / "ca")
    start = state_of(build_network(study))
    content = request_to_content(Request(Header(study.digest(), code_digest(), 1), start))
    seeded = ROOT / "tests" / "attacks" / "seeded"
    with (
        Coordinator(study, authority.context()) as server,
        deployed(folder / "processes", watch=seeded, environment=VARIABLES) as deployment,
    ):
        file = write_site(
            folder / "one", cohort["north"], {"address": f"localhost:{server.port}", "ca": str(authority.file)}
        )
        deployment.command("client", "keygen", file)
        server.admit(read_public(folder / "one" / "state" / "key.pub"))
        deployment.command("client", "enrol", file, "--yes")
        shutil.copytree(folder / "one", folder / "two")  # modes are kept

        running = take_part(deployment, server, file)
        malformed = {name: asked(server, bad, kind) for name, (bad, kind) in bad_requests(content).items()}
        first, again = asked(server, content), asked(server, content)
        assert running.end() == 0

        running = take_part(deployment, server, folder / "two" / "site.yaml")
        second = asked(server, content)
        assert running.end() == 0
    ledgers = [folder / name / "state" / LEDGER for name in ("one", "two")]
    return Twice(study, malformed, first, again, second, [read_entries(path).entries for path in ledgers])


def take_part(deployment: Deployment, server: Coordinator, file: Path) -> Running:
    """A client that is online."""
    server.online.clear()
    running = deployment.start("run", "client", "run", file)
    assert server.online.wait(300), running.text
    return running


def asked(server: Coordinator, content: RecordDict, kind: str = MessageType.TRAIN) -> Reply:
    return reply_from_message(server.ask(content, kind))


def bad_requests(content: RecordDict) -> dict[str, tuple[RecordDict, str]]:
    """The request with one thing too many."""
    request, weights = content["request"], content["weights"]
    assert isinstance(request, ConfigRecord)
    assert isinstance(weights, ArrayRecord)
    bad: dict[str, tuple[RecordDict, str]] = {}
    for key, value in EXTRA_KEYS.items():
        more = ConfigRecord({**request, key: value})
        bad[f"key {key} in the request"] = (RecordDict({"weights": weights, "request": more}), MessageType.TRAIN)
        record = ConfigRecord({key: value})
        with_record = RecordDict({"weights": weights, "request": request, "config": record})
        bad[f"record with {key}"] = (with_record, MessageType.TRAIN)
    seeds = ArrayRecord({**weights, "seed": Array(np.zeros(1, np.float32))})
    bad["array seed"] = (RecordDict({"weights": seeds, "request": request}), MessageType.TRAIN)
    bad["another kind of training"] = (content, f"{MessageType.TRAIN}.silent")
    return bad


def test_one_thing_too_many_is_malformed(twice: Twice) -> None:
    """A request with another key, record, array or kind is answered MALFORMED, and nothing is trained or charged."""
    assert {reply.status for reply in twice.malformed.values()} == {Status.MALFORMED}
    assert len(twice.malformed) == 2 * len(EXTRA_KEYS) + 2
    with_malformed, without = ([type(entry).__name__ for entry in entries] for entries in twice.entries)
    assert with_malformed == without
    assert without.count("Attempted") == without.count("Released") == 1


def test_two_runs_with_everything_equal_differ_by_noise(twice: Twice) -> None:
    """The same state, records, request, variables and seeds: the two updates differ by the plan's noise, at its size.

    Everybody is sampled, so the sums are equal and the difference is that of two draws of noise, whose standard
    deviation is sqrt(2) sigma C / (q declared). Six standard errors of a sample deviation are allowed.
    """
    one, two = flat(twice.first), flat(twice.second)
    plan = twice.study.plan()
    deviation = math.sqrt(2) * plan.noise_multiplier * plan.clip / plan.divisor(80)
    assert not np.isclose(one, two, rtol=0, atol=deviation * 1e-6).any()
    assert float(np.std(one - two)) == pytest.approx(deviation, rel=6 / math.sqrt(2 * one.size))


def test_one_run_repeats_its_own_bytes_only(twice: Twice) -> None:
    """Asked again, a site repeats what it released; that is its ledger's doing, and no generator's."""
    assert (flat(twice.first) == flat(twice.again)).all()


def flat(reply: Reply) -> np.ndarray[Any, np.dtype[np.float64]]:
    assert reply.status is Status.OK
    assert reply.update is not None
    return np.concatenate([array.ravel() for _, array in sorted(reply.update.items())]).astype(np.float64)


def test_the_command_line_has_no_option_for_it(tmp_path: Path) -> None:
    """`wardround client run` refuses options that would, and its help names none."""
    with deployed(tmp_path / "d") as deployment:
        options = ("--seed", "--no-noise", "--randomness", "--deterministic")
        tried = [deployment.start("option", "client", "run", "site.yaml", option, "0") for option in options]
        said = deployment.start("help", "client", "run", "--help").finish()
        for running in tried:
            assert "No such option" in running.finish(status=2)
    assert not re.search("seed|noise|random|determin", said.lower())
