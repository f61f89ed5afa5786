"""What would leave this hospital, written to a folder instead: for the one who has to approve it.

One round from the study's public starting weights, with the site's records opened, its policy and real noise, but with
nobody drawn: each step's sample is empty, as it may be by chance in a real round. So every field and every size is
what would be sent, and the update is noise alone: it holds nothing of a patient, whoever reads it and however often it
is made. Training on patients would have been one more release of them, for which no budget is paid. Nothing connects,
and nothing is charged: the ledger is one in memory that ends with the process.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message
from numpy.typing import NDArray

from client.fleet import bodies, rehearsal
from client.hospital import Hospital, site_with
from client.ledger import MemoryLedger
from client.site_file import SiteFile, study_of
from client.state import StateFolder
from common.errors import ConfigurationError
from common.keys import write_private
from common.models.network import build_network
from common.privacy.randomness import Randomness
from common.provenance import code_digest
from common.records import Header, Reply, Request, reply_from_message, reply_to_content, request_to_content
from common.training import state_of

NODE = 2  # a server gives each site a number; here it is any


class _Nobody(Randomness):
    """Real noise; every sample is empty."""

    def poisson_sample(self, patients: int, sampling_rate: float) -> NDArray[np.int64]:
        """No patient, whatever the rate."""
        return super().poisson_sample(0 * patients, sampling_rate)


@dataclass(frozen=True)
class DryRun:
    """What was written: the reply, its requests' total size in bytes, and the folder."""

    reply: Reply
    nbytes: int
    folder: Path


def dry_run(site: SiteFile, state: StateFolder, folder: Path) -> DryRun:
    """Train one round on nobody and write what would be sent to `folder`, which must be new or empty.

    Guarantee:
        The update does not depend on the records: no patient is drawn, and the noise is real.

    Raises:
        WardroundError: study, records or device cannot be used, or the folder holds something.
    """
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise ConfigurationError(f"{folder}: exists and is not empty; name a new folder")
    study = study_of(site)
    ledger = MemoryLedger(site.policy.max_epsilon, site.policy.delta)
    hospital = Hospital(site_with(ledger, site, study, state, lambda _round, _attempt: _Nobody()))
    header = Header(study.digest(), code_digest(), 1)
    request = rehearsal(request_to_content(Request(header, state_of(build_network(study)))), NODE)
    reply = reply_from_message(hospital.answer(request, NODE))
    sent = bodies(Message(reply_to_content(reply), reply_to=request), request, NODE)

    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    requests = []
    for number, (route, carries, body) in enumerate(sent, start=1):
        file = f"request-{number:03d}.bin"
        write_private(folder / file, body)
        requests.append({"route": route, "carries": carries, "bytes": len(body), "file": file})
    text = json.dumps({"reply": _fields(reply), "requests": requests}, indent=2)
    write_private(folder / "reply.json", text.encode() + b"\n")
    return DryRun(reply, sum(len(body) for _, _, body in sent), folder)


def _fields(reply: Reply) -> dict[str, Any]:
    """Every field of the reply: words and numbers as they are, arrays by shape and size."""
    update = {} if reply.update is None else reply.update
    return {
        **reply.header.record(),
        "status": reply.status.value,
        "head": reply.head,
        "update": {
            name: {"dtype": str(array.dtype), "shape": list(array.shape), "bytes": array.nbytes}
            for name, array in update.items()
        },
    }
