"""Mistakes by which something computed from patients leaves, or enters a formula, beside the noised sum."""

from __future__ import annotations

from tests.mutants.mutant import Change, Mutant

SITE, RECORDS = "client/site.py", "common/records.py"

SAME_REPLY = "client/test_site.py::test_nothing_but_the_update_depends_on_the_records"


def _sent_along(key: str, value: str) -> tuple[Change, ...]:
    """A number of the site's in its reply."""
    return (
        Change(
            RECORDS,
            '    update: Weights | None = None\n    head: str = ""\n',
            f'    update: Weights | None = None\n    head: str = ""\n    {key}: float = 0.0\n',
        ),
        Change(RECORDS, '"head": reply.head})', f'"head": reply.head, "{key}": reply.{key}}})'),
        Change(SITE, "status, update, self.ledger.head())", f"status, update, self.ledger.head(), {value})"),
    )


MUTANTS = (
    Mutant(
        name="metric-sent-along",
        mistake="A loss or score of each round is sent without noise",
        source="Flower's and NVFlare's examples (loss, accuracy, F1); FL4Health's metrics",
        severity="medium",
        prevention="a reply has room for the update and a word of a closed list; other keys are malformed",
        changes=_sent_along("loss", "float(self.dataset.sequences.label.sum())"),
        tests=(SAME_REPLY,),
        fast=True,
    ),
    Mutant(
        name="count-sent-along",
        mistake="The number of patients is sent, to weigh the average",
        source="FedAvg as published (McMahan et al. 2017); Flower's `num-examples`",
        severity="medium",
        prevention="weights are public; a reply has no such key",
        changes=_sent_along("patients", "float(self.dataset.n_patients)"),
        tests=(SAME_REPLY,),
    ),
    Mutant(
        name="metrics-without-noise",
        mistake="The score histogram that metrics follow from is sent as it was counted",
        source="federated evaluation as Flower, NVFlare and FL4Health have it: exact counts or scores of each site",
        severity="medium",
        prevention="the step's noise in every cell, charged before a score exists",
        changes=(
            Change(
                "client/scoring.py",
                "noised = randomness.add_noise(counted.ravel(), plan.clip, plan.noise_multiplier)",
                "noised = counted.ravel()",
            ),
        ),
        tests=("client/test_scoring.py::test_the_noise_is_the_steps_and_in_every_cell",),
    ),
    Mutant(
        name="metrics-count-records",
        mistake="A patient with many records counts many times in a histogram whose noise is for one",
        source="one line away",
        severity="high",
        prevention="a patient's records share a weight of one",
        changes=(Change("common/score_histogram.py", "UNITS // sequences[patient]", "UNITS"),),
        tests=("common/test_score_histogram.py::test_removing_any_patient_moves_it_by_at_most_the_bound",),
    ),
    Mutant(
        name="metrics-scored-together",
        mistake="Held-out patients are scored in one batch: chosen weights let one patient move the others' scores",
        source="one line away; every framework's `predict`",
        severity="medium",
        prevention="each patient is scored alone",
        changes=(
            Change(
                "client/scoring.py",
                "    for patient in range(dataset.n_patients):\n        batch = dataset.batch(np.array([patient]))\n",
                "    for _ in range(1):\n        batch = dataset.batch(np.arange(dataset.n_patients))\n",
            ),
        ),
        tests=("client/test_scoring.py::test_a_patients_score_does_not_depend_on_the_others",),
    ),
    Mutant(
        name="weight-from-the-reply",
        mistake="A site's weight in the average follows from its update",
        source="FedAvg as published; loss-weighted averaging",
        severity="medium",
        prevention="weights from declared patients alone",
        changes=(
            Change(
                "server/strategy.py",
                "average = weighted_mean(self.replies.updates, self._site_weights)",
                "sizes = {s: sum(float(abs(a).sum()) for a in u.values()) for s, u in self.replies.updates.items()}\n"
                "        average = weighted_mean(self.replies.updates, sizes)",
            ),
        ),
        tests=("server/test_strategy.py::test_one_step_rounds_are_adam_on_the_publicly_weighted_average",),
    ),
    Mutant(
        name="data-fitted-scaler",
        mistake="Inputs are scaled by the mean and deviation of the site's own records",
        source="NVFlare's hello-dp (`StandardScaler`); most tabular examples",
        severity="medium",
        prevention="published clinical scales in the public feature schema",
        changes=(
            Change(
                "common/batching.py",
                "dense = np.concatenate([sequences.values, mask,",
                "values = sequences.values - sequences.values.mean(0) if len(sequences.values) else sequences.values\n"
                "        dense = np.concatenate([values, mask,",
            ),
        ),
        tests=(
            "common/test_training.py::test_the_true_number_of_patients_appears_nowhere",
            "common/test_batching.py::test_a_batch_is_what_the_plain_builder_writes",
        ),
        fast=True,
    ),
    Mutant(
        name="failure-in-words",
        mistake='The text of an exception is logged or sent: "cannot convert 4711 to float"',
        source="Flower sends an exception's text to the server",
        severity="medium",
        prevention="one word of a closed list; a log has the exception's class alone",
        changes=(Change(SITE, "asked.round_number, type(error).__name__)", "asked.round_number, error)"),),
        tests=("client/test_site.py::test_text_of_a_failure_reaches_neither_reply_nor_log",),
    ),
)
