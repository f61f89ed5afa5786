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
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509

from client.enrolment import Enrolment
from client.fleet import Fleet
from client.network import Health, authority_spoken
from client.site_file import SiteFile, study_of
from client.state import KEY, LEDGER, NODE, StateFolder
from common.errors import ConfigurationError, LedgerError, WardroundError
from common.keys import fingerprint, load_private
from common.provenance import code_digest
from common.records import WIRE_VERSION

if TYPE_CHECKING:
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
    """

    study: Study
    enrolment: Enrolment
    before: Enrolment | None
    weights: int


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
    if before is not None and not (state / LEDGER).exists():
        raise LedgerError(
            f"{state / LEDGER}: this hospital has enrolled before, but its ledger is gone; restore the newest backup, "
            "then run `wardround client budget SITE.yaml --accept-restore`"
        )
    _budget(site, state, study)
    say("budget", "the ledger has room for the study")
    say("records", _records(site, state, study))
    weights = _network(site, study)
    say("network", f"{weights:,} weights, on {site.device}")
    shown = hashlib.sha256(health.certificate).hexdigest() if health.certificate else ""
    now = datetime.fromtimestamp(clock(), UTC).isoformat(timespec="seconds")
    return Findings(study, Enrolment.of(site, study, shown, now), before, weights)


def make_ledger(site: SiteFile, state: StateFolder) -> None:
    """Begin the site's ledger, if there is none yet. Raises LedgerError."""
    from client.ledger_file import SqliteLedger

    anchor = Path(site.anchor) if site.anchor is not None else None
    SqliteLedger(state / LEDGER, site.policy.max_epsilon, site.policy.delta, anchor=anchor).close()


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


def _budget(site: SiteFile, state: StateFolder, study: Study) -> None:
    """Would the ledger admit the plan? Without opening, hence without making, a ledger."""
    from client.ledger import DEFAULT_COHORT, MemoryLedger
    from client.ledger_file import read_accounts

    path = state / LEDGER
    if path.exists():
        accounts, _ = read_accounts(path)
    else:
        accounts = MemoryLedger(site.policy.max_epsilon, site.policy.delta).accounts
    accounts.cohort_opening(DEFAULT_COHORT, site.policy.max_epsilon, site.policy.delta)
    if DEFAULT_COHORT in accounts.cohorts:
        accounts.admission(DEFAULT_COHORT, study.digest(), study.plan(), site.policy.max_epsilon)


def _records(site: SiteFile, state: StateFolder, study: Study) -> str:
    from client.readers.own import read_records
    from common.sequences import check_trainable

    sequences = read_records(site, study, state)
    check_trainable(sequences, f"{site.records}, {' + '.join(site.splits)}")
    site.policy.check_cohort(sequences.n_patients)
    declared = study.sites[site.site].declared_patients
    return f"{sequences.n_patients} patients (the study publishes {declared}; the true count stays here)"


def _network(site: SiteFile, study: Study) -> int:
    try:
        from common.device import resolve
        from common.models.network import build_network
    except ImportError as error:
        raise WardroundError(f"{error.name} cannot be imported; install wardround with its dependencies") from None
    resolve(site.device)
    return sum(parameter.numel() for parameter in build_network(study).parameters())
