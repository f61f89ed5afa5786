"""Mistakes in the order of a round at the hospital, and in what its ledger remembers."""

from __future__ import annotations

from tests.mutants.mutant import Change, Mutant

SITE, ACCOUNTS = "client/site.py", "client/accounts.py"

ORDER = "client/test_site.py::test_a_round_is_admitted_marked_trained_stored_and_only_then_released"
REPLAY = "client/test_site.py::test_a_replay_is_answered_with_the_same_bytes_and_trains_nothing"
OTHER_WEIGHTS = "client/test_site.py::test_a_released_round_is_not_trained_again_from_other_weights"

MUTANTS = (
    Mutant(
        name="charged-after-training",
        mistake="The ledger is written after training: a crash in between is free",
        source="engines that count steps as they are taken; NVFlare's hello-dp loses the count on a crash",
        severity="high",
        prevention="admitted and marked, durably, before the first private step",
        changes=(
            Change(
                SITE,
                "marked = self._mark(request, part)\n                update = marked if isinstance(marked, bytes) else "
                "self._work_and_store(request, part, marked)",
                "update = self._work_and_store(request, part)",
            ),
            Change(
                SITE,
                "def _work_and_store(self, request: Request, part: Part, marked: Attempt) -> bytes:",
                "def _work_and_store(self, request: Request, part: Part) -> bytes:",
            ),
            Change(SITE, "request.header.round_number, marked.number)", "request.header.round_number, 1)"),
            Change(
                SITE,
                "        self.ledger.release(marked, stored)\n",
                "        marked = self._mark(request, part)\n"
                "        if isinstance(marked, bytes):\n"
                "            return marked\n"
                "        self.ledger.release(marked, stored)\n",
            ),
        ),
        tests=(ORDER,),
        fast=True,
    ),
    Mutant(
        name="attempt-not-durable",
        mistake="The mark is in memory when training begins: pulling the plug gives the budget back",
        source="SQLite's and every file's default",
        severity="high",
        prevention="`synchronous = FULL`; each answer is on disk before it is given",
        changes=(Change("client/entry_file.py", '"synchronous = FULL"', '"synchronous = OFF"'),),
        tests=("client/test_ledger_durable.py::test_sqlite_syncs_at_every_commit",),
    ),
    Mutant(
        name="failed-attempts-refunded",
        mistake="An attempt that failed is not charged, though its noise may be known",
        source="retries in frameworks that count steps in the process",
        severity="high",
        prevention="what was marked stays spent; a retry takes spare steps",
        changes=(
            Change(
                ACCOUNTS,
                "account.steps_taken += entry.steps",
                "account.steps_taken += entry.steps - account.open_steps",
            ),
        ),
        tests=(
            "client/test_site.py::test_a_failed_attempt_stays_spent_and_the_next_has_fresh_noise",
            "client/test_ledger.py::test_a_retry_is_a_new_attempt_from_the_spare_steps",
        ),
    ),
    Mutant(
        name="replay-trained-again",
        mistake="The same request again is trained again: two noised answers average",
        source="no framework that we read keeps a site's answers",
        severity="high",
        prevention="a released round is answered with the stored bytes",
        changes=(Change(ACCOUNTS, "release = account.released.get(round_number)", "release = None"),),
        tests=(REPLAY, OTHER_WEIGHTS, "client/test_ledger.py::test_a_released_round_is_answered_with_its_bytes"),
        fast=True,
    ),
    Mutant(
        name="round-trained-from-other-weights",
        mistake="A released round is trained again where its weights differ: more releases than were priced",
        source="a server that resumes from an older checkpoint, or means harm",
        severity="high",
        prevention="refused; a round has one answer",
        changes=(
            Change(
                ACCOUNTS,
                "        if release is not None:\n",
                "        if release is not None and release.weights_digest == weights_digest:\n",
            ),
        ),
        tests=(OTHER_WEIGHTS, "client/test_ledger.py::test_a_released_round_is_refused_on_other_weights"),
    ),
    Mutant(
        name="sent-before-it-is-stored",
        mistake="An update leaves before it is stored: after a crash the round is trained, and sent, again",
        source="no framework that we read stores an update at the site",
        severity="high",
        prevention="released in the ledger first; what cannot be stored does not leave",
        changes=(Change(SITE, "        self.ledger.release(marked, stored)\n", ""),),
        tests=(ORDER, "client/test_site.py::test_what_could_not_be_stored_does_not_leave"),
    ),
    Mutant(
        name="ledger-put-back",
        mistake="A ledger restored from a backup has forgotten what was spent since",
        source="virtual machines put back from a snapshot",
        severity="high",
        prevention="the head that servers have seen, and an anchor on another disk",
        changes=(Change(SITE, "if not self.ledger.contains(request.head):", "if False:"),),
        tests=("client/test_site_limits.py::test_a_ledger_that_was_put_back_is_refused_by_the_servers_head",),
    ),
    Mutant(
        name="policy-not-applied",
        mistake="The hospital's limits are written down and not enforced",
        source="FL4Health (noise and clip from the server's configuration); FLIP (issue 1122: opt-in, in the app)",
        severity="high",
        prevention="compared at enrolment and in every round, before ledger and patients",
        changes=(Change(SITE, "            policy.check(study)\n", "            pass\n"),),
        tests=("client/test_site_limits.py::test_a_study_beyond_the_policy_is_refused_whatever_the_server_asks",),
    ),
    Mutant(
        name="study-not-compared",
        mistake="A round of other terms than those agreed to is trained",
        source="FL4Health, Flower's examples: the configuration comes with each round",
        severity="high",
        prevention="the site trains by its own pinned copy; another digest is refused",
        changes=(Change(SITE, "if asked.study != self._digest:", "if False:"),),
        tests=("client/test_site.py::test_what_was_not_agreed_is_refused_before_anything_is_spent",),
    ),
)
