"""Mistakes in what training costs, and in what a cohort has left. docs/why-this-epsilon-differs.md has the numbers."""

from __future__ import annotations

from tests.mutants.mutant import Change, Mutant

STUDY, PLAN, ACCOUNTS, ACCOUNTING = (
    "common/study.py",
    "common/privacy/plan.py",
    "client/accounts.py",
    "common/privacy/accounting.py",
)

CALIBRATED = "noise_multiplier_for(epsilon, self.privacy.delta, self.privacy.sampling_rate, steps + spare)"
PRICES = "common/test_study.py::test_the_plan_prices_all_steps_and_spares"

MUTANTS = (
    Mutant(
        name="engine-per-round",
        mistake="The accountant starts anew every round: what is printed is one round's epsilon",
        source="Flower's `examples/opacus`; Fed-BioMed (`DPController` built in each round); PFLlib (issue 175)",
        severity="high",
        prevention="one plan for the whole study, priced before its first step",
        changes=(
            Change(
                STUDY,
                CALIBRATED,
                "noise_multiplier_for(\n                epsilon, self.privacy.delta, self.privacy.sampling_rate, "
                "self.training.local_steps\n            )",
            ),
        ),
        tests=(PRICES,),
        fast=True,
    ),
    Mutant(
        name="epochs-for-steps",
        mistake="Rounds are priced as if each were one step",
        source="FLamby: calibrated for `epochs=nrounds`, runs `num_updates` steps in each",
        severity="high",
        prevention="rounds x local steps",
        changes=(
            Change(
                STUDY,
                CALIBRATED,
                "noise_multiplier_for(\n                epsilon, self.privacy.delta, self.privacy.sampling_rate, "
                "self.training.rounds\n            )",
            ),
        ),
        tests=(PRICES,),
    ),
    Mutant(
        name="client-sampling-amplification",
        mistake="The rate at which sites are chosen is multiplied into q",
        source="FL4Health (`fl_accountants.py`)",
        severity="high",
        prevention="not claimed: the server sees who takes part, and the steps of a round share one coin",
        changes=(
            Change(
                STUDY,
                CALIBRATED,
                "noise_multiplier_for(\n                epsilon,\n                self.privacy.delta,\n"
                "                self.privacy.sampling_rate * self.quorum / len(self.sites),\n"
                "                steps + spare,\n            )",
            ),
        ),
        tests=("common/test_study_price.py::test_who_takes_part_changes_no_plan",),
    ),
    Mutant(
        name="classical-formula",
        mistake="sigma = sqrt(2 ln(1.25 / delta)) / epsilon for each message, without composition",
        source="Flower's `LocalDpMod`; FLIP's Flower mod",
        severity="high",
        prevention="calibrated by the accountant over all steps",
        changes=(Change(STUDY, CALIBRATED, "math.sqrt(2 * math.log(1.25 / self.privacy.delta)) / epsilon"),),
        tests=(PRICES,),
    ),
    Mutant(
        name="spares-for-free",
        mistake="Retries are not in the price",
        source="accountants that count planned rounds only",
        severity="medium",
        prevention="spare steps are priced beforehand",
        changes=(Change(PLAN, "return self.steps + self.spare_steps", "return self.steps"),),
        tests=("common/privacy/test_plan.py::test_the_price_covers_planned_and_spare_steps",),
    ),
    Mutant(
        name="no-noise-costs-nothing",
        mistake="A study without noise has a finite price",
        source="one line away; Opacus's PRV accountant raises OverflowError instead",
        severity="total",
        prevention="its epsilon is infinite, and no finite cap admits it",
        changes=(
            Change(
                ACCOUNTING,
                "if any(sigma == 0 for _, sigma in numbers):\n        return math.inf",
                "if any(sigma == 0 for _, sigma in numbers):\n        return 0.0",
            ),
        ),
        tests=("common/privacy/test_accounting.py::test_no_noise_has_no_epsilon",),
    ),
    Mutant(
        name="steps-not-charged",
        mistake="Steps that were taken are not counted",
        source="PFLlib (issue 175): epsilon never grows",
        severity="high",
        prevention="each attempt is counted before it begins",
        changes=(Change(ACCOUNTS, "account.steps_taken += entry.steps", "pass"),),
        tests=("client/test_ledger.py::test_attempts_stop_at_the_priced_steps",),
    ),
    Mutant(
        name="budget-per-study",
        mistake="A second study starts from zero",
        source="no peer keeps a budget across runs (asked for: opacus issue 688, Fed-BioMed 375, Flower 2216)",
        severity="high",
        prevention="the budget belongs to the cohort, for life",
        changes=(Change(ACCOUNTS, "price({**cohort.charges, study: plan})\n", "price({study: plan})\n"),),
        tests=(
            "client/test_ledger.py::test_a_plan_after_a_whole_budget_is_refused",
            "client/test_ledger.py::test_plans_are_admitted_until_the_cap_is_reached_and_not_beyond",
        ),
    ),
    Mutant(
        name="adaptive-plans-by-pld",
        mistake="A plan chosen after earlier results is composed as if it had been fixed beforehand",
        source="PLD and PRV accountants used as ledgers",
        severity="medium",
        prevention="several plans are charged by the Renyi filter, at an order stored at the start",
        changes=(
            Change(
                ACCOUNTS,
                "return filter_epsilon((rdp_of(plan, self.order) for plan in plans), self.order, self.delta)",
                "return max(epsilon_of(plan) for plan in plans)",
            ),
        ),
        tests=("client/test_ledger.py::test_a_second_plan_is_admitted_by_the_filter",),
    ),
    Mutant(
        name="delta-unchecked",
        mistake="Epsilons at different deltas are compared as if they were one",
        source="FL4Health (delta from the server's count by default); Fed-BioMed (.1 / number of batches)",
        severity="medium",
        prevention="a study's delta is at most the cohort's",
        changes=(Change(ACCOUNTS, "if plan.delta > cohort.delta:", "if False:"),),
        tests=("client/test_ledger.py::test_a_larger_delta_than_the_cohorts_is_refused",),
    ),
)
