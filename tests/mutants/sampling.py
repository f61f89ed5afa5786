"""Mistakes in who is drawn, and in where chance comes from."""

from __future__ import annotations

from tests.mutants.mutant import Change, Mutant

TRAINING = "common/training.py"
RANDOMNESS = "common/privacy/randomness.py"

DRAW = "chosen = randomness.poisson_sample(dataset.n_patients, plan.sampling_rate)"
ENTROPY = "return os.urandom(KEY_BYTES)"
FOLLOWS_THE_PLAN = "common/test_training.py::test_who_is_sampled_follows_the_plan"
EMPTY = "common/test_training.py::test_an_empty_sample_still_steps_and_adds_noise"
RELEASED = "common/test_private_round.py::test_an_update_is_the_sum_and_all_of_its_noise_over_the_divisor"
BATCH_SIZE = "statistical/test_noise.py::test_the_batch_size_is_binomial"

MUTANTS = (
    Mutant(
        name="shuffled-batches",
        mistake="Batches of fixed size, priced as if they were Poisson samples",
        source="most code that shuffles under Opacus's accountant (lower bounds: arXiv 2403.17673, 2411.04205)",
        severity="high",
        prevention="each patient is drawn by its own coin",
        changes=(
            Change(
                RANDOMNESS,
                "return np.flatnonzero(self.bits(patients) < threshold)",
                "return np.sort(np.argsort(self.bits(patients))[: round(sampling_rate * patients)])",
            ),
        ),
        tests=(BATCH_SIZE,),
    ),
    Mutant(
        name="truncated-batches",
        mistake="A Poisson sample is cut to what fits into memory: whether one is in depends on who else is",
        source="loaders with a largest batch; dp-accounting 0.6 has an event of its own for it",
        severity="high",
        prevention="micro-batches add up to the whole sample",
        changes=(
            Change(
                TRAINING,
                "for batch in dataset.micro_batches(chosen, max_rows):",
                "for batch in list(dataset.micro_batches(chosen, max_rows))[:1]:",
            ),
        ),
        tests=("common/test_training.py::test_micro_batches_do_not_change_the_update",),
    ),
    Mutant(
        name="empty-batch-skipped",
        mistake="A step whose sample is empty is left out",
        source="Opacus 1.6: adaptive clipping and ExpandedWeights crash on it; loaders that drop it",
        severity="medium",
        prevention="an empty sample steps, with noise, and is charged",
        changes=(Change(TRAINING, "                private.empty_batch()\n", "                continue\n"),),
        tests=(RELEASED,),
    ),
    Mutant(
        name="random-record-in-empty-batch",
        mistake="An empty batch gets a record at random: neighbours then differ by up to 2 C",
        source="Opacus 1.6, `rand_on_empty=True`",
        severity="high",
        prevention="an empty sample stays empty",
        changes=(
            Change(
                TRAINING,
                "            if len(chosen) == 0:\n",
                "            chosen = chosen if len(chosen) else np.arange(1)\n            if len(chosen) == 0:\n",
            ),
        ),
        tests=(EMPTY,),
    ),
    Mutant(
        name="rate-from-true-count",
        mistake="q is batch size / true number of patients",
        source="Opacus's `make_private` and its Flower, NVFlare and FLamby users",
        severity="medium",
        prevention="q stands in the study",
        changes=(
            Change(
                TRAINING,
                DRAW,
                "rate = min(1.0, plan.divisor(declared_patients) / max(1, dataset.n_patients))\n"
                "            chosen = randomness.poisson_sample(dataset.n_patients, rate)",
            ),
        ),
        tests=(FOLLOWS_THE_PLAN,),
    ),
    Mutant(
        name="one-sample-per-round",
        mistake="One sample serves all local steps of a round, which are priced as drawn anew",
        source="FL4Health draws sites once a round and prices the draw in every step",
        severity="high",
        prevention="each step draws",
        changes=(
            Change(
                TRAINING,
                DRAW,
                "chosen = chosen if _ else randomness.poisson_sample(dataset.n_patients, plan.sampling_rate)",
            ),
        ),
        tests=(FOLLOWS_THE_PLAN,),
    ),
    Mutant(
        name="noise-seeded-with-the-clock",
        mistake="Sampling and noise from a seed that can be guessed",
        source="FLamby: `manual_seed(seed or int(time.time()))`",
        severity="total",
        prevention="a fresh AES key from the operating system for each attempt; nothing can seed it",
        changes=(
            Change(
                RANDOMNESS,
                ENTROPY,
                'return int(__import__("time").time()).to_bytes(KEY_BYTES, "big")',
            ),
        ),
        tests=(
            "common/privacy/test_randomness.py::test_two_objects_never_share_a_stream",
            "common/privacy/test_randomness.py::test_the_key_is_fresh_entropy_of_the_operating_system",
        ),
        fast=True,
    ),
    Mutant(
        name="noise-from-the-global-generator",
        mistake="Noise follows the program's seed, which the server may know",
        source="Opacus 1.6 (torch's global generator); Flower's and NVFlare's filters (`np.random`)",
        severity="total",
        prevention="as above",
        changes=(Change(RANDOMNESS, ENTROPY, "return np.random.bytes(KEY_BYTES)"),),
        tests=(
            "common/privacy/test_randomness.py::test_no_seed_from_outside_reaches_it",
            "common/privacy/test_randomness.py::test_the_key_is_fresh_entropy_of_the_operating_system",
        ),
    ),
    Mutant(
        name="noise-repeated-after-fork",
        mistake="A forked worker goes on with its parent's stream: two updates with one noise",
        source="any generator in a process that forks",
        severity="total",
        prevention="a stream knows its process and refuses any other",
        changes=(Change(RANDOMNESS, "if os.getpid() != self._process:", "if False:"),),
        tests=("common/privacy/test_randomness_process.py::test_a_stream_is_refused_in_any_other_process",),
    ),
    Mutant(
        name="same-noise-in-a-retry",
        mistake="A round that is tried again, from other weights, draws the same noise: the two subtract",
        source="noise derived from (seed, round)",
        severity="total",
        prevention="one source per attempt, made anew",
        changes=(Change("client/site.py", "self._randomness(number, attempt)", "self._randomness(number, 1)"),),
        tests=("client/test_site.py::test_two_attempts_never_share_their_noise",),
        fast=True,
    ),
)
