"""What must be true before a hospital says yes, looked at one by one; the first thing that is not ends it.

Each failure is one error: what is wrong, what to do. Nothing is written but what reading needs (the split key); the
server is asked for its public facts and told, for a moment, that this site's key is there.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from cryptography import x509

from client.enrolment import Enrolment
from client.fleet import Fleet
from client.ledger_place import begun, ledger_path, pin
from client.network import Health, authority_spoken
from client.site_file import SiteFile, study_of
from client.state import KEY, NODE, StateFolder
from common.errors import ConfigurationError, WardroundError
from common.keys import fingerprint, load_private
from common.provenance import code_digest
from common.records import WIRE_VERSION

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from common.sequences import Sequences
    from common.study import Study

CLOCK_SECONDS = 120.0
Say = Callable[[str, str], None]


@dataclass(frozen=True)
class Findings:
    """Everything is as it should be.

    Attributes:
        study: what the server and this site's own copy agree on.
        enrolment: what a yes would pin.
        before: what was pinned before, if anything was.
        weights: how many numbers the network has.
        patients: ids of those who train, for the ledger.
    """

    study: Study
    enrolment: Enrolment
    before: Enrolment | None
    weights: int
    patients: NDArray[np.int64]


def check(site: SiteFile, state: StateFolder, say: Say, clock: Callable[[], float] = time.time) -> Findings:
    """Look at everything in turn; the caller holds the state folder's lock.

    Args:
        site: the site file.
        state: its state folder.
        say: called with the name of each thing that holds, and a detail for people.
        clock: seconds since 1970.

    Raises:
        WardroundError: the first thing that does not hold.
    """
    before = Enrolment.read(state)
    say("state folder", str(state.path))
    key = load_private(state / KEY)
    say("key", fingerprint(key.public_key()))
    with Fleet(site.server, key) as fleet:
        health = fleet.health()
        say("connection", site.server.address)
        say("certificate", _certificate(health, site))
        say("clock", _clock(health, clock()))
        _versions(health)
        say("version", f"{health.version}, the same program as the server's")
        study = study_of(site)
        _same_study(health, study, site)
        say("study", f"{study.name}, {study.digest()[:12]}.., the same as the server's")
        node = fleet.activate((state.read_json(NODE) or {}).get("node"))
        state.write_json(NODE, {"node": node, "server": site.server.address})
        say("roster", "the server admits this site's key")
    site.policy.check(study)
    say("policy", "the study keeps within every limit of this site")
    begun(site, state)
    say("budget", _budget(site, study))
    sequences = _records(site, state, study)
    declared = study.sites[site.site].declared_patients
    say(
        "records",
        f"{sequences.n_patients} patients (the study publishes {declared}; the true count stays here)",
    )
    weights = _network(site, study)
    say("network", f"{weights:,} weights, on {site.device}")
    shown = hashlib.sha256(health.certificate).hexdigest() if health.certificate else ""
    now = datetime.fromtimestamp(clock(), UTC).isoformat(timespec="seconds")
    return Findings(study, Enrolment.of(site, study, shown, now), before, weights, sequences.patient_id)


def begin_ledger(site: SiteFile, state: StateFolder, patients: NDArray[np.int64]) -> None:
    """Begin the site's ledger, if there is none yet, and list the patients of a named cohort.

    Raises:
        LedgerError: it cannot be written, or is in use.
        BudgetError: a patient is in another cohort.
    """
    from client.hospital import open_ledger

    with open_ledger(site, create=not begun(site, state)) as ledger:
        if site.cohort is not None:
            ledger.open_cohort(site.cohort, patients)
    pin(site, state)


def _certificate(health: Health, site: SiteFile) -> str:
    if health.certificate is None:
        return "none: plaintext, on this machine only"
    expires = x509.load_der_x509_certificate(health.certificate).not_valid_after_utc
    digits = authority_spoken(site.server)
    return f"until {expires:%Y-%m-%d}, from authority {digits} (compare with the coordinator, by telephone)"


def _clock(health: Health, now: float) -> str:
    off = now - health.time
    if abs(off) > CLOCK_SECONDS:
        raise ConfigurationError(
            f"this machine's clock is {abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} the server's, at most "
            f"{CLOCK_SECONDS:.0f} s are allowed; set it by NTP"
        )
    return f"{abs(off):.0f} s apart"


def _versions(health: Health) -> None:
    from importlib.metadata import version

    if (health.wire, health.code) != (WIRE_VERSION, code_digest()):
        raise ConfigurationError(
            f"the server runs wardround {health.version} (wire {health.wire}, code {health.code[:12]}..), here is "
            f"{version('wardround')} (wire {WIRE_VERSION}, code {code_digest()[:12]}..); install the very release that "
            "the coordinator uses, unchanged"
        )


def _same_study(health: Health, study: Study, site: SiteFile) -> None:
    if health.study != study.digest():
        raise ConfigurationError(
            f"{site.study}: its terms are {study.digest()[:12]}.., the server runs {health.study[:12]}..; ask the "
            "coordinator for the study file, and read it before you replace this one"
        )


def _budget(site: SiteFile, study: Study) -> str:
    """Would the ledger admit the plan? Without opening, hence without making, a ledger."""
    from client.accounts import Accounts
    from client.ledger import DEFAULT_COHORT
    from client.ledger_file import read_accounts

    path, cap, name = ledger_path(site), site.policy.max_epsilon, site.cohort or DEFAULT_COHORT
    exists = path.exists()
    accounts = read_accounts(path)[0] if exists else Accounts()
    if site.cohort is None and set(accounts.cohorts) - {DEFAULT_COHORT}:
        raise ConfigurationError(
            f"{path}: holds the cohorts {', '.join(accounts.cohorts)}; write in the site file, as `cohort`, whose "
            "budget is charged"
        )
    opening = accounts.cohort_opening(name, cap, site.policy.delta)
    if opening is not None:
        accounts.apply(opening)
    cohort = accounts.cohorts[name]
    spent = cohort.spent
    said = f"{path}: {'' if exists else 'a new ledger, '}{len(cohort.plans)} plan(s) charged, {cap - spent:.3g} left"
    accounts.admit_all(name, study, cap, with_metrics=site.policy.allows_metrics(study))
    return said


def _records(site: SiteFile, state: StateFolder, study: Study) -> Sequences:
    from client.readers.own import read_records
    from common.sequences import check_trainable

    sequences = read_records(site, study, state)
    check_trainable(sequences, f"{site.records}, {' + '.join(site.splits)}")
    site.policy.check_cohort(sequences.n_patients)
    return sequences


def _network(site: SiteFile, study: Study) -> int:
    try:
        from common.device import resolve
        from common.models.network import build_network
    except ImportError as error:
        raise WardroundError(f"{error.name} cannot be imported; install wardround with its dependencies") from None
    resolve(site.device)
    return sum(parameter.numel() for parameter in build_network(study).parameters())
