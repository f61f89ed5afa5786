"""One round at a hospital: check -> policy -> reserve -> train -> store -> release.

The order is the promise: the ledger marks the attempt before the first private step, and holds the update before it
may leave. What was released is answered with the stored bytes; what failed after it was marked stays spent.

Every reply, refusals too, carries the ledger's head, and every request the newest one that the server has seen of it.
A head that this ledger never had means that it was put back to an older copy, which has forgotten what was spent
since: nothing is trained. A server that makes up a head only keeps this site out of its own study.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from client.ledger import Attempt, Ledger
from client.policy import Policy
from common.batching import Dataset
from common.errors import BudgetError, ConfigurationError, LedgerError, PolicyError, WireError
from common.models.network import build_network
from common.privacy.randomness import Randomness
from common.provenance import code_digest
from common.records import WIRE_VERSION, Header, Reply, Request, Status, check_like
from common.study import Study
from common.training import load_state, local_optimizer, state_of, train_round
from common.weights import Weights, digest_of, from_bytes, to_bytes

log = logging.getLogger("wardround.site")
OLDER = (
    "the server has seen a newer ledger of this site: this one is an older copy; put the newest back, or accept the "
    "loss with `wardround client budget SITE.yaml --accept-restore`"
)


class _RefusedError(BudgetError):
    """The ledger said no before the first private step; later, its errors are failures like any other."""


class Site:
    """A hospital's part in one study.

    Args:
        name: the site's name in the study.
        study: the terms that this site has pinned; the server's copy is compared by digest, never used.
        dataset: the site's training sequences.
        ledger: the site's record of spending.
        randomness: (round, attempt number) -> a fresh source of sampling and noise.
        policy: the hospital's own limits; None, for simulations, has none.

    Raises:
        ConfigurationError: the study has no such site.
    """

    def __init__(
        self,
        name: str,
        study: Study,
        dataset: Dataset,
        ledger: Ledger,
        randomness: Callable[[int, int], Randomness] = lambda _round, _attempt: Randomness(),
        policy: Policy | None = None,
    ) -> None:
        if name not in study.sites:
            raise ConfigurationError(f"site `{name}` is not in study {study.name}, which has {', '.join(study.sites)}")
        self.name, self.study, self.dataset, self.ledger = name, study, dataset, ledger
        self._randomness = randomness
        self._one_round = threading.Lock()  # two attempts at once would overwrite each other's mark
        self._digest = study.digest()
        self._plan = study.plan()
        self._refusal = _refusal(policy, study)  # once: neither changes while the site is open
        self._network = build_network(study).to(dataset.device)
        self._shapes = state_of(self._network)

    def train(self, request: Request) -> Reply:
        """Answer a round's request, one at a time. Never raises: what depends on patients becomes LOCAL_FAILURE.

        Guarantee:
            An update leaves only after its plan was admitted, its attempt marked and its bytes stored. The same
            round with the same weights is answered with the same bytes. Nothing in the reply but the noised update
            depends on the records.
        """
        number = request.header.round_number
        status, update = self._answer(request)
        return Reply(Header(self._digest, code_digest(), number), status, update, self.ledger.head())

    def _answer(self, request: Request) -> tuple[Status, Weights | None]:
        """The status and, with OK, the update."""
        asked = request.header
        if (asked.wire, asked.code) != (WIRE_VERSION, code_digest()):
            return Status.VERSION, None
        if asked.study != self._digest:
            return Status.STUDY, None
        if not 1 <= asked.round_number <= self.study.training.rounds:
            return Status.MALFORMED, None
        try:
            check_like(request.weights, self._shapes, "weights")
        except WireError:
            return Status.MALFORMED, None
        if self._refusal:
            log.warning("round %d refused: %s", asked.round_number, self._refusal)
            return Status.POLICY, None
        try:
            with self._one_round:
                if not self.ledger.contains(request.head):
                    log.error("round %d refused: %s", asked.round_number, OLDER)
                    return Status.ROLLBACK, None
                marked = self._mark(request)
                update = marked if isinstance(marked, bytes) else self._train_and_store(request, marked)
            return Status.OK, from_bytes(update)
        except _RefusedError as error:
            log.warning("round %d refused: %s", asked.round_number, error)
            return Status.BUDGET, None
        except LedgerError as error:  # of our own making: a file and a remedy, nothing of a patient
            log.error("round %d failed: %s", asked.round_number, error)
            return Status.LOCAL_FAILURE, None
        except Exception as error:  # whatever it is, its text may hold a patient's value: only its class is logged
            log.error("round %d failed with %s", asked.round_number, type(error).__name__)
            return Status.LOCAL_FAILURE, None

    def _mark(self, request: Request) -> Attempt | bytes:
        """Admit the plan and mark an attempt; or the bytes already released. Raises _RefusedError."""
        steps = self.study.training.local_steps
        try:
            self.ledger.admit(self._digest, self._plan)
            return self.ledger.attempt(self._digest, request.header.round_number, steps, digest_of(request.weights))
        except BudgetError as error:
            raise _RefusedError(str(error)) from None

    def _train_and_store(self, request: Request, marked: Attempt) -> bytes:
        number, training = request.header.round_number, self.study.training
        load_state(self._network, request.weights)
        update = train_round(
            self._network,
            self.dataset,
            self._plan,
            declared_patients=self.study.sites[self.name].declared_patients,
            steps=training.local_steps,
            optimizer=local_optimizer(training.recipe, self._network, self.study.learning_rate(number)),
            randomness=self._randomness(number, marked.number),
        )
        stored = to_bytes(update)
        self.ledger.release(marked, stored)
        return stored


def _refusal(policy: Policy | None, study: Study) -> str:
    """Why the policy refuses the study, in one line; "" if it does not."""
    try:
        if policy is not None:
            policy.check(study)
    except PolicyError as error:
        return "; ".join(str(error).splitlines())
    return ""
