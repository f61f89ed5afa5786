"""One round at a hospital: check -> policy -> reserve -> train -> store -> release. The same for its metrics.

The order is the promise: the ledger marks the attempt before the first private step, and holds the update before it
may leave. What was released is answered with the stored bytes; what failed after it was marked stays spent.

A study that asks for metrics is two parts (`Part`): its rounds, and one question after the last of them, priced by a
plan of its own. The site does not check that the weights are the final ones, it could not: the price holds for any.
There is one answer in all, to the weights of the first question.

Every reply, refusals too, carries the ledger's head, and every request the newest one that the server has seen of it.
A head that this ledger never had means that it was put back to an older copy, which has forgotten what was spent
since: nothing is trained. A server that makes up a head only keeps this site out of its own study.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from client.accounts import metrics_of
from client.ledger import Attempt, Ledger
from client.policy import Policy
from client.scoring import noised_histogram
from common.batching import Dataset
from common.errors import BudgetError, ConfigurationError, LedgerError, PolicyError, WireError
from common.models.network import build_network
from common.privacy.plan import Plan
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


@dataclass(frozen=True)
class Part:
    """What a study asks of a site, as the ledger knows it: its rounds, or its metrics.

    Attributes:
        charged: what its plan is charged under.
        rounds: the numbers that a request may have.
        steps: private steps that one answer takes.
        refusal: why this hospital's policy refuses it, in one line; "" if it does not.
        work: weights, round, number of the attempt -> what may leave.
    """

    charged: str
    plan: Plan
    rounds: range
    steps: int
    refusal: str
    work: Callable[[Weights, int, int], Weights]


class Site:
    """A hospital's part in one study.

    Args:
        name: the site's name in the study.
        study: the terms that this site has pinned; the server's copy is compared by digest, never used.
        dataset: the site's training sequences.
        ledger: the site's record of spending.
        randomness: (round, attempt number) -> a fresh source of sampling and noise.
        policy: the hospital's own limits; None, for simulations, has none, and tells no metrics.
        held_out: the sequences of those who never train, on the CPU, for metrics; None: nobody is held out.

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
        held_out: Dataset | None = None,
    ) -> None:
        if name not in study.sites:
            raise ConfigurationError(f"site `{name}` is not in study {study.name}, which has {', '.join(study.sites)}")
        self.name, self.study, self.dataset, self.ledger = name, study, dataset, ledger
        self._randomness = randomness
        self._one_round = threading.Lock()  # two attempts at once would overwrite each other's mark
        self._digest = study.digest()
        self._held_out = held_out
        self._network = build_network(study).to(dataset.device)
        self._shapes = state_of(self._network)
        training = study.training
        self._rounds = Part(  # once: neither study nor policy changes while the site is open
            self._digest,
            study.plan(),
            range(1, training.rounds + 1),
            training.local_steps,
            _refusal(policy, study),
            self._train,
        )
        metrics = study.metrics_plan()
        self._metrics = (
            None
            if metrics is None
            else Part(
                metrics_of(self._digest),
                metrics,
                range(training.rounds, training.rounds + 1),
                metrics.steps,
                self._rounds.refusal or _metrics_refusal(policy, study),
                self._score,
            )
        )

    @property
    def patient_ids(self) -> list[int]:
        """Everybody whose records an answer may rest on: whom the ledger's cohort must list."""
        datasets = [self.dataset] if self._held_out is None else [self.dataset, self._held_out]
        return [int(patient) for dataset in datasets for patient in dataset.sequences.patient_id]

    def train(self, request: Request) -> Reply:
        """Answer a round's request, one at a time. Never raises: what depends on patients becomes LOCAL_FAILURE.

        Guarantee:
            An update leaves only after its plan was admitted, its attempt marked and its bytes stored. The same
            round with the same weights is answered with the same bytes. Nothing in the reply but the noised update
            depends on the records.
        """
        return self._reply(request, self._rounds)

    def tell_metrics(self, request: Request) -> Reply:
        """Answer the study's question for metrics of the last round's weights. Never raises, as `train`.

        Guarantee:
            That of `train`, with the noised histogram of `client/scoring.py` for the update, and a plan of one step.
            Without `min_metrics_noise` in the policy nothing is computed. There is one answer for the study's life:
            asked again with the same weights, its stored bytes; with others, none.
        """
        return self._reply(request, self._metrics)

    def _reply(self, request: Request, part: Part | None) -> Reply:
        number = request.header.round_number
        status, update = self._answer(request, part)
        return Reply(Header(self._digest, code_digest(), number), status, update, self.ledger.head())

    def _answer(self, request: Request, part: Part | None) -> tuple[Status, Weights | None]:
        """The status and, with OK, the update. `part`: None is one that the study does not have."""
        asked = request.header
        if (asked.wire, asked.code) != (WIRE_VERSION, code_digest()):
            return Status.VERSION, None
        if asked.study != self._digest:
            return Status.STUDY, None
        if part is None or asked.round_number not in part.rounds:
            return Status.MALFORMED, None
        try:
            check_like(request.weights, self._shapes, "weights")
        except WireError:
            return Status.MALFORMED, None
        if part.refusal:
            log.warning("round %d refused: %s", asked.round_number, part.refusal)
            return Status.POLICY, None
        try:
            with self._one_round:
                if not self.ledger.contains(request.head):
                    log.error("round %d refused: %s", asked.round_number, OLDER)
                    return Status.ROLLBACK, None
                marked = self._mark(request, part)
                update = marked if isinstance(marked, bytes) else self._work_and_store(request, part, marked)
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

    def _mark(self, request: Request, part: Part) -> Attempt | bytes:
        """Admit the plan and mark an attempt; or the bytes already released. Raises _RefusedError."""
        try:
            self.ledger.admit(part.charged, part.plan)
            number = request.header.round_number
            return self.ledger.attempt(part.charged, number, part.steps, digest_of(request.weights))
        except BudgetError as error:
            raise _RefusedError(str(error)) from None

    def _work_and_store(self, request: Request, part: Part, marked: Attempt) -> bytes:
        stored = to_bytes(part.work(request.weights, request.header.round_number, marked.number))
        self.ledger.release(marked, stored)
        return stored

    def _train(self, weights: Weights, number: int, attempt: int) -> Weights:
        training = self.study.training
        load_state(self._network, weights)
        return train_round(
            self._network,
            self.dataset,
            self._rounds.plan,
            declared_patients=self.study.sites[self.name].declared_patients,
            steps=training.local_steps,
            optimizer=local_optimizer(training.recipe, self._network, self.study.learning_rate(number)),
            randomness=self._randomness(number, attempt),
        )

    def _score(self, weights: Weights, number: int, attempt: int) -> Weights:
        assert self._metrics is not None
        assert self.study.metrics is not None
        network = build_network(self.study)  # one of its own, on the CPU
        load_state(network, weights)
        bins, randomness = self.study.score_bins(self.study.metrics), self._randomness(number + 1, attempt)
        return noised_histogram(network, self._held_out, self._metrics.plan, bins, randomness)


def _refusal(policy: Policy | None, study: Study) -> str:
    """Why the policy refuses the study, in one line; "" if it does not."""
    try:
        if policy is not None:
            policy.check(study)
    except PolicyError as error:
        return "; ".join(str(error).splitlines())
    return ""


def _metrics_refusal(policy: Policy | None, study: Study) -> str:
    """Why no metrics of the study leave, in one line; "" if they may."""
    if policy is None:
        return "a site without a policy tells no metrics"
    try:
        policy.check_metrics(study)
    except PolicyError as error:
        return str(error)
    return ""
