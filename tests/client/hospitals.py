"""A hospital on disk for the tests of a site's commands: a tiny cohort, a study, a site file, a key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

from client.checks import begin_ledger, check
from client.site_file import SiteFile, load_site_file
from client.state import KEY, StateFolder
from common.keys import generate, private_to_pem, write_private
from common.study import Study, load_study

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def write_study(folder: Path, **changes: Any) -> Study:
    """A study of three rounds over the synthetic cohort with a tiny network, in `folder`/study.yaml."""
    terms = yaml.safe_load((CONFIGS / "demo.yaml").read_text()) | {"features": str(CONFIGS / "features/synthetic.yaml")}
    terms["model"] = {"cell": "gru", "hidden": 4, "embedding": 3}
    terms["training"] = {"recipe": "fedavg-one-step", "rounds": 3, "learning_rate": 0.02}
    terms["sites"] = {"north": {"declared_patients": 80}, "east": {"declared_patients": 50}}
    terms["quorum"] = 1
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.yaml").write_text(yaml.safe_dump(terms | changes))
    return load_study(folder / "study.yaml")


def write_site(folder: Path, records: Path, server: dict[str, Any], **changes: Any) -> Path:
    """A site file beside study.yaml."""
    terms: dict[str, Any] = {
        "version": 1,
        "site": "north",
        "study": "study.yaml",
        "records": str(records),
        "policy": {"max_epsilon": 3.0, "delta": 1e-5},
        "server": server,
        "state": "state",
    }
    path = folder / "site.yaml"
    path.write_text(yaml.safe_dump(terms | changes))
    return path


def with_key(path: Path) -> tuple[SiteFile, StateFolder, EllipticCurvePrivateKey]:
    """The site of a site file, with a state folder and a key in it."""
    site = load_site_file(path)
    state = StateFolder(Path(site.state), create=True)
    key = generate()
    write_private(state / KEY, private_to_pem(key))
    return site, state, key


def enrolled_at(path: Path, admit: Callable[[EllipticCurvePublicKey], object]) -> StateFolder:
    """The state folder after `client keygen` and a yes to `client enrol`, which asks the server; `admit` lets it in."""
    site, state, key = with_key(path)
    admit(key.public_key())
    with state.lock():
        found = check(site, state, lambda _name, _detail: None)
        begin_ledger(site, state, found.patients)
        found.enrolment.write(state)
    return state
