"""A study's terms in words, for the person who says yes: what is predicted, what it costs a patient, what leaves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dp_accounting import pld

from common.privacy.accounting import COARSE, Steps, epsilon_of_history, event
from common.privacy.plan import Plan

if TYPE_CHECKING:
    from client.site_file import SiteFile
    from common.study import Study


def best_guess(*plans: Plan) -> float:
    """How often the best guess is right whether one given patient is among the records; a coin is right half the time.

    The guesser sees all that one study's plans release, whole, and knows all but this. With P and Q the releases with
    and without the patient, and both as likely beforehand, the best test is right with chance (1 + TV(P, Q)) / 2, and
    TV is delta at epsilon 0 (Dong, Roth and Su 2022, section 2), here by PLD, pessimistically; or what (epsilon, delta)
    alone allows, (e^epsilon + delta) / (e^epsilon + 1) (Kairouz, Oh and Viswanath 2015, theorem 2.1), where that is
    less.

    Guarantee:
        Never below the true chance.
    """
    delta = min(plan.delta for plan in plans)
    steps = [Steps(plan.sampling_rate, plan.noise_multiplier, plan.priced_steps) for plan in plans]
    epsilon = epsilon_of_history(steps, delta)
    if not math.isfinite(epsilon):
        return 1.0
    bound = (1 + delta * math.exp(-epsilon)) / (1 + math.exp(-epsilon))
    try:
        accountant = pld.PLDAccountant(value_discretization_interval=COARSE)
        for one in steps:
            accountant.compose(event(*one))
        distance = float(accountant.get_delta(0.0))
    except (ArithmeticError, ValueError, MemoryError):
        return bound
    return min(bound, (1 + distance) / 2) if distance >= 0 else bound  # NaN is not >= 0


def terms_in_words(study: Study, site: SiteFile, weights: int) -> str:
    """The terms, a paragraph each.

    Args:
        study: what is agreed to.
        site: this hospital's own file.
        weights: how many numbers the network has.
    """
    plan, training = study.plan(), study.training
    declared = study.sites[site.site].declared_patients
    others = [f"{name} ({terms.declared_patients})" for name, terms in study.sites.items() if name != site.site]
    network = "logistic regression" if study.model.cell == "none" else f"a {study.model.cell.upper()} network"
    metrics = study.metrics_plan() if site.policy.allows_metrics(study) else None
    price = study.epsilon(with_metrics=metrics is not None)
    right = math.ceil(100 * (best_guess(plan) if metrics is None else best_guess(plan, metrics)))
    told = metrics_in_words(study, site)
    q, clip, sigma = plan.sampling_rate, plan.clip, plan.noise_multiplier
    return f"""\
Study {study.name} predicts `{study.task.name}` with {network} of {weights:,} weights.

Taking part: {site.site}, this hospital, which publishes that it has about {declared} patients;
{", ".join(others) if others else "no other"}. A round counts if at least {study.quorum} answer.

Price: epsilon {price:.3g} at delta {plan.delta:g} for each patient, for the whole study. This hospital
allows {site.policy.max_epsilon:g} at {site.policy.delta:g} for a lifetime of studies. All of it is charged with the
first round, also if the study stops early.
{told}
In words: somebody who sees everything that this hospital sends, and knows everything except whether
one given patient is among its records, can guess that rightly in at most {right} of 100 cases; tossing
a coin, in 50.

How: {training.rounds} rounds of {training.local_steps} step(s), and {plan.spare_steps} spare step(s) for rounds
that fail. Each step draws every patient with chance {q:g}, cuts each one's influence at {clip:g}, and adds
noise of {sigma:g} times that before anything leaves.

Leaves this hospital, each round: {weights:,} numbers with the noise in them; the round's number; one word
of a closed list, such as OK or LOCAL_FAILURE; digests of study, program and the ledger's newest entry;
this hospital's public key.

Never leaves: records, patient ids, exact counts, labels, results of a test without noise, texts of errors.

Not covered by the price: when this hospital answers and whether it does, that it takes part, the size
that it publishes, and what people tell each other. A patient with records at two of the hospitals pays
at both.
"""


def metrics_in_words(study: Study, site: SiteFile) -> str:
    """What the study's metrics cost and tell, or that they do not leave: a paragraph, empty if the study has none."""
    if study.metrics is None:
        return ""
    noise, cells = study.metrics.noise_multiplier, 2 * study.metrics.bins
    if not site.policy.allows_metrics(study):
        return f"""
Metrics: the study would ask once for how the final weights score held-out patients, with noise of
{noise:g} patients. This hospital's policy does not tell that (min_metrics_noise), and trains all the same.
"""
    return f"""
Metrics: once, after the last round, this hospital also tells how the weights score its held-out patients:
{cells} counts of patients by label and score, each with noise of {noise:g} patients. Price and guess here
are those of training and metrics together; training alone is epsilon {study.epsilon(with_metrics=False):.3g}, and the
rest is charged when the metrics are told.
"""
