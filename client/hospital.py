"""A hospital opened for training: its records, its ledger, its part in the study. Lives in the training process.

site file -> study, as pinned -> records without those who opted out -> ledger -> Site -> installed ClientApp
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message, RecordDict

from client.app import build_app
from client.enrolment import enrolled
from client.ledger import DEFAULT_COHORT, Ledger
from client.ledger_file import SqliteLedger
from client.ledger_place import begun, ledger_path
from client.readers.own import read_held_out, read_records
from client.site import Site
from client.site_file import SiteFile, load_site_file, study_of
from client.state import StateFolder
from client.trainer import Ready
from common.batching import Dataset
from common.device import resolve
from common.models.network import build_network
from common.study import Study
from common.training import state_of

if TYPE_CHECKING:
    from client.trainer import RandomnessOf

ROUND_SECONDS = 600.0  # the longest that the ledger is waited for while another study's client trains


class Hospital:
    """A site, ready to answer messages.

    Args:
        site: opened.
        optouts: file of opt-outs and its digest when the records were read; None if there is none.

    Attributes:
        ready: what the connection needs to know of it.
    """

    def __init__(self, site: Site, optouts: tuple[Path, str] | None = None) -> None:
        self._site, self._optouts = site, optouts
        shapes = state_of(build_network(site.study))
        self.ready = Ready(
            site.study.digest(), site.study.training.rounds, tuple(array.nbytes for array in shapes.values())
        )
        self._app = build_app(lambda _context: site)

    @classmethod
    def open(cls, site_file: Path, randomness: RandomnessOf | None = None) -> Hospital:
        """Open everything that training needs, with the durable ledger.

        Raises:
            WardroundError: not enrolled, or site file, study, records or ledger cannot be used.
        """
        site = load_site_file(site_file)
        state = StateFolder(Path(site.state))
        study = study_of(site)
        enrolled(state, site).require_study(site, study)
        begun(site, state)
        optouts = None if site.exclude is None else (Path(site.exclude), _digest_of(Path(site.exclude)))
        with open_ledger(site, create=False, wait=ROUND_SECONDS) as ledger:  # given back: `answer` takes it up
            opened = site_with(ledger, site, study, state, randomness)
            if site.cohort is not None:
                ledger.open_cohort(site.cohort, opened.patient_ids)
        return cls(opened, optouts)

    @property
    def outdated(self) -> bool:
        """The file of opt-outs is not the one that the records were read with: read them again before training."""
        return self._optouts is not None and _digest_of(self._optouts[0]) != self._optouts[1]

    def answer(self, message: Message, node: int) -> Message:
        """The reply of the installed ClientApp; the ledger is held meanwhile. Raises LedgerError if it cannot be."""
        context = Context(
            run_id=message.metadata.run_id, node_id=node, node_config={}, state=RecordDict(), run_config={}
        )
        ledger = self._site.ledger
        with ledger.taken_up() if isinstance(ledger, SqliteLedger) else contextlib.nullcontext():
            return self._app(message, context)


def _digest_of(file: Path) -> str:
    """sha256 of the content; "" if it cannot be read, which reading the records then says."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return ""


def open_ledger(site: SiteFile, *, create: bool, wait: float = 0.0) -> SqliteLedger:
    """The durable ledger that the site file names, charging its cohort. Raises as `SqliteLedger`."""
    policy = site.policy
    return SqliteLedger(
        ledger_path(site),
        policy.max_epsilon,
        policy.delta,
        site.cohort or DEFAULT_COHORT,
        anchor=Path(site.anchor) if site.anchor is not None else None,
        create=create,
        wait=wait,
    )


def site_with(
    ledger: Ledger, site: SiteFile, study: Study, state: StateFolder, randomness: RandomnessOf | None = None
) -> Site:
    """The site with its records, charging `ledger`; real randomness unless a test passes another.

    Held-out patients are read only where metrics of the study may leave: nobody else needs their records.
    """
    sequences = read_records(site, study, state)
    centred, held_out = study.model.centre_mask, None
    dataset = Dataset(sequences, centre_mask=centred, device=resolve(site.device))
    if site.policy.allows_metrics(study) and (apart := read_held_out(site, study, state)) is not None:
        held_out = Dataset(apart, centre_mask=centred)
    if randomness is None:
        return Site(site.site, study, dataset, ledger, policy=site.policy, held_out=held_out)
    return Site(site.site, study, dataset, ledger, randomness, policy=site.policy, held_out=held_out)
