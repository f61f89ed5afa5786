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
