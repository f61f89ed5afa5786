"""Mistakes in the private step: whose gradient is clipped, what is noised, what it is divided by."""

from __future__ import annotations

from tests.mutants.mutant import Change, Mutant

TRAINING = "common/training.py"
BOOKKEEPING = "common/privacy/bookkeeping.py"
RANDOMNESS = "common/privacy/randomness.py"

ONE_STEP = "common/test_training.py::test_one_step_is_the_clipped_sum_over_the_public_divisor"
SENSITIVITY = "common/test_training.py::test_one_patient_changes_the_sum_by_at_most_the_clip"
NOISED_ONCE = "common/test_training.py::test_every_step_noises_the_whole_sum_once"
CUT = "common/test_training.py::test_micro_batches_do_not_change_the_update"
SPOILT = "common/test_training.py::test_a_patient_who_breaks_the_gradient_counts_as_zero"
SIZE_OF_NOISE = "common/test_private_round.py::test_an_update_is_the_sum_and_all_of_its_noise_over_the_divisor"

NOISE = "noise=lambda flat, _deviation: _noised(flat, plan, randomness)"
CLIPPED = "return gradients.clipped_sum(lambda norms: clip_weights(norms, self.max_grad_norm, coarsest))"
LOSS = "patient_losses(network, batch).sum().backward()"

MUTANTS = (
    Mutant(
        name="no-noise",
        mistake="The sum is released without noise",
        source="Opacus 1.6: `pre_step` steps without noise where it finds no gradient samples",
        severity="total",
        prevention="the optimizer sees noised sums only; a step that nothing led up to raises",
        changes=(
            Change(
                TRAINING,
                "noised = randomness.add_noise(flat.cpu().numpy(), plan.clip, plan.noise_multiplier)",
                "noised = flat.cpu().numpy()",
            ),
        ),
        tests=(NOISED_ONCE, SIZE_OF_NOISE),
        fast=True,
    ),
    Mutant(
        name="noise-over-root-batch",
        mistake="Noise divided by the square root of the batch size",
        source="one line away; what an audit must see",
        severity="high",
        prevention="noise is sigma C on the sum, once a step",
        changes=(
            Change(
                TRAINING,
                NOISE,
                "noise=lambda flat, _d: flat + (_noised(flat, plan, randomness) - flat) / max(1, len(chosen)) ** 0.5",
            ),
        ),
        tests=(SIZE_OF_NOISE,),
    ),
    Mutant(
        name="noise-over-batch",
        mistake="Noise divided by the batch size: meant for the mean, added to the sum",
        source="one line away; what an audit must see",
        severity="high",
        prevention="as above; the division comes after the noise",
        changes=(
            Change(
                TRAINING,
                NOISE,
                "noise=lambda flat, _d: flat + (_noised(flat, plan, randomness) - flat) / max(1, len(chosen))",
            ),
        ),
        tests=(SIZE_OF_NOISE,),
    ),
    Mutant(
        name="noise-reused",
        mistake="One draw of noise used in every step",
        source="one line away; no audit of final scores sees it",
        severity="total",
        prevention="each call draws further along one stream",
        changes=(
            Change(
                RANDOMNESS,
                "noised = self.normal(clipped_sum.size)",
                'noised = self.__dict__.setdefault("_drawn", self.normal(clipped_sum.size)).copy()',
            ),
        ),
        tests=("statistical/test_noise.py::test_noise_of_two_releases_is_independent",),
    ),
    Mutant(
        name="clip-after-the-mean",
        mistake="The mini-batch's gradient is clipped instead of each patient's",
        source="APPFL (issue 349)",
        severity="high",
        prevention="norms per patient, clipped before they are summed",
        changes=(
            Change(
                BOOKKEEPING,
                CLIPPED,
                "sums = gradients.weighted_sum(torch.ones(gradients.count, dtype=torch.float64))\n"
                "        mean = math.sqrt(sum(float(s.square().sum()) for s in sums.values())) / gradients.count\n"
                "        return {p: s * min(1.0, self.max_grad_norm / mean) for p, s in sums.items()}",
            ),
        ),
        tests=(ONE_STEP, SENSITIVITY),
    ),
    Mutant(
        name="clip-per-sequence",
        mistake="Each sequence is clipped, not each patient: a patient with m stays moves the sum by m C",
        source="Opacus, FL4Health, NVFlare, Fed-BioMed: the unit is the row (user level: opacus issue 366)",
        severity="high",
        prevention="rows carry their owner; the norm has the cross terms of all of a patient's rows",
        changes=(
            Change(
                TRAINING,
                "with Rows(batch.patient, batch.n_patients):",
                "with Rows(torch.arange(batch.n_sequences, device=batch.patient.device), batch.n_sequences):",
            ),
        ),
        tests=(ONE_STEP, SENSITIVITY),
        fast=True,
    ),
    Mutant(
        name="clip-per-parameter",
        mistake="Each parameter is clipped to C, and the noise is that of one",
        source="Fed-BioMed (issue 1443)",
        severity="high",
        prevention="one norm over all parameters together",
        changes=(
            Change(
                BOOKKEEPING,
                CLIPPED,
                "def weigh(norms: Tensor) -> Tensor:\n"
                "            return clip_weights(norms, self.max_grad_norm, coarsest)\n\n"
                "        parts = ((part, weigh(part.squared_norms().bounds())) for part in gradients.parts)\n"
                "        return {p: s for part, w in parts for p, s in part.weighted_sum(w).items()}",
            ),
        ),
        tests=(ONE_STEP, SENSITIVITY),
    ),
    Mutant(
        name="sensitivity-doubled",
        mistake="Clipped to 2 C, noise for C",
        source="one line away; an audit with one run misses it",
        severity="high",
        prevention="one frozen plan gives clip and noise",
        changes=(Change(TRAINING, "max_grad_norm=plan.clip,", "max_grad_norm=2 * plan.clip,"),),
        tests=(ONE_STEP, SENSITIVITY),
    ),
    Mutant(
        name="cross-terms-left-out",
        mistake="A norm from the rows' own norms: steps that add up count as if they were at right angles",
        source="one line away, in norms by Gram matrices",
        severity="high",
        prevention="all pairs of a patient's rows",
        changes=(
            Change(
                "common/privacy/norms.py",
                "net += terms.sum((1, 2), dtype=torch.float64).clamp(min=0)",
                "net += terms.diagonal(dim1=1, dim2=2).sum(1, dtype=torch.float64)",
            ),
        ),
        tests=("common/privacy/test_norms.py::test_norms_of_random_rows",),
    ),
    Mutant(
        name="packed-unsorted-rows",
        mistake="Packed, unsorted sequences: recurrent gradients in sorted order, the head's in the caller's, so that "
        "clipping mixes patients",
        source="Opacus 1.6 DPLSTM, DPGRU: 1.3 to 2.1 C, 65 C in ghost mode (measured; no issue found)",
        severity="high",
        prevention="rows carry their owner and undo torch's sort",
        changes=(
            Change(
                "common/privacy/rows.py",
                "owner = owner if sorted_indices is None else owner[sorted_indices]",
                "del sorted_indices",
            ),
        ),
        tests=(
            "common/privacy/test_rows.py::test_of_packed_names_sequences_and_composes_with_patients",
            "common/privacy/test_bookkeeping.py::test_clipped_sum_norms_and_sensitivity",
        ),
    ),
    Mutant(
        name="batch-sorted-without-owners",
        mistake="A batch is sorted by length, its list of owners is not",
        source="the same mistake, in our own batches",
        severity="high",
        prevention="sequences are sorted once, with their owners",
        changes=(
            Change(
                "common/batching.py",
                "chosen, owner = chosen[by_length], owner[by_length]",
                "chosen = chosen[by_length]",
            ),
        ),
        tests=("common/test_batching.py::test_a_batch_is_what_the_plain_builder_writes", ONE_STEP),
    ),
    Mutant(
        name="padding-counts",
        mistake="Padding is read as records: what a patient adds depends on the longest in the batch",
        source="Opacus 1.6 with right-padded batches: 2.1 C (measured)",
        severity="high",
        prevention="packed rows; what pads a group of patients is zero",
        changes=(
            Change(
                "common/privacy/rows.py",
                "if zero_padding and self.padding is not None:",
                "if False:",
            ),
        ),
        tests=("common/privacy/test_norms.py::test_norms_of_random_rows", ONE_STEP),
    ),
    Mutant(
        name="weighted-mean-loss",
        mistake="Cross-entropy with class weights, divided by the batch's sum of weights: patients scale each other",
        source="torch's `CrossEntropyLoss(weight=..)` under Opacus: 1.33 C (measured)",
        severity="high",
        prevention="a sum of losses per patient, and a public divisor",
        changes=(
            Change(
                TRAINING,
                "return losses * batch.share",
                "weight = 1 + 3 * batch.label\n"
                "    return losses * batch.share * weight * batch.n_patients / (batch.share * weight).sum()",
            ),
        ),
        tests=(
            ONE_STEP,
            CUT,
            "common/test_private_round.py::test_a_patients_part_does_not_depend_on_who_else_was_drawn",
        ),
    ),
    Mutant(
        name="true-batch-size",
        mistake="The noised sum is divided by the number of patients that were drawn",
        source="Opacus 1.6 adaptive clipping; opacus issues 819, 838",
        severity="medium",
        prevention="divisor q x declared patients, from the public study",
        changes=(
            Change(
                TRAINING,
                "            private.step()\n",
                "            private.expected_batch_size = max(1, len(chosen))\n            private.step()\n",
            ),
        ),
        tests=(ONE_STEP, "common/test_training.py::test_an_empty_sample_still_steps_and_adds_noise"),
    ),
    Mutant(
        name="true-count",
        mistake="The divisor is q x the true number of patients",
        source="Opacus's `make_private`: batch size and q from `len(dataset)`",
        severity="medium",
        prevention="declared patients, a rounded number that a person agreed to publish",
        changes=(Change(TRAINING, "plan.divisor(declared_patients)", "plan.divisor(dataset.n_patients)"),),
        tests=(
            "common/test_training.py::test_the_true_number_of_patients_appears_nowhere",
            "common/test_training.py::test_the_divisor_follows_the_declared_patients",
        ),
    ),
    Mutant(
        name="zero-times-nan",
        mistake="0 x NaN: a weight of 0 does not silence a broken patient, and every weight becomes NaN",
        source="Opacus 1.6 (measured)",
        severity="medium",
        prevention="rows of weight 0 are zeroed, not multiplied",
        changes=(
            Change(
                "common/privacy/products.py",
                "return tensor.masked_fill(~present.view(-1, *[1] * (tensor.dim() - 1)), 0)",
                "return tensor",
            ),
        ),
        tests=(SPOILT, "common/privacy/test_bookkeeping.py::test_extreme_patients_are_bounded_too"),
    ),
    Mutant(
        name="gram-without-float64",
        mistake="Norms by Gram matrices in float32: steps that cancel have norm 0 and are scaled up without limit",
        source="Opacus 1.6 ghost mode: 3,095 C (measured)",
        severity="high",
        prevention="formed again in float64 where it is doubtful",
        changes=(
            Change("common/privacy/norms.py", "FLOOR = 1 / 512", "FLOOR = 0.0"),
            Change(
                "common/privacy/norms.py",
                "return (net < self.squares[patients] * DOUBTFUL**2) | self.large[patients]",
                "return net < 0",
            ),
        ),
        tests=(
            "common/privacy/test_norms.py::test_norms_of_rows_that_cancel",
            "common/privacy/test_rounding.py::test_a_patient_whose_steps_cancel_moves_the_released_sum_by_the_clip",
        ),
    ),
    Mutant(
        name="norm-without-floor",
        mistake="No smallest norm: the sum's rounding is scaled up with a patient whose steps cancel",
        source="one line away, in norms by Gram matrices",
        severity="medium",
        prevention="no norm below 1/512 of the rows' own norms",
        changes=(Change("common/privacy/norms.py", "FLOOR = 1 / 512", "FLOOR = 0.0"),),
        tests=("common/privacy/test_norms.py::test_norms_of_rows_that_cancel",),
    ),
    Mutant(
        name="stray-gradients",
        mistake="A gradient that passed by the clip is added to the step (weight decay in the loss, a tied head)",
        source="any loss term outside a module's forward; torch gives no warning",
        severity="high",
        prevention="parameters want no gradient while a module runs; a `.grad` at the step raises",
        changes=(Change(BOOKKEEPING, "if any(p.grad is not None for p in params):", "if False:"),),
        tests=("common/privacy/test_hooks.py::test_a_gradient_that_was_never_clipped_raises",),
    ),
    Mutant(
        name="batch-norm",
        mistake="Layers with running statistics: they mix patients, and leave without noise",
        source="what Opacus's validator is for; lost wherever it is not called",
        severity="high",
        prevention="a network with buffers is refused, in training too",
        changes=(Change(TRAINING, "if next(network.buffers(), None) is not None:", "if False:"),),
        tests=("common/test_training.py::test_buffers_are_refused",),
    ),
    Mutant(
        name="early-stopping",
        mistake="Local training stops when the private loss is low: how often it stepped is a release",
        source="common practice; FL4Health keeps the best model by a private loss (`BestLossOpacusCheckpointer`)",
        severity="medium",
        prevention="the study fixes the number of steps; the last iterate leaves",
        changes=(
            Change(TRAINING, LOSS, "loss = patient_losses(network, batch).sum()\n                loss.backward()"),
            Change(
                TRAINING,
                "            private.step()\n",
                "            private.step()\n"
                "            if len(chosen) and float(loss.detach()) < 2.0 * len(chosen):\n"
                "                break\n",
            ),
        ),
        tests=(NOISED_ONCE,),
    ),
    Mutant(
        name="off-the-grid",
        mistake="Noise added in floating point as it comes: low-order bits tell two sums apart",
        source="Mironov 2012; Opacus (`secure_mode` needs torchcsprng, which is dead: opacus issue 504)",
        severity="medium",
        prevention="sum and noise rounded to one public grid, noise raised by the rounding",
        changes=(Change(RANDOMNESS, "np.rint(part, out=part)", "pass"),),
        tests=("common/privacy/test_randomness.py::test_the_output_lies_on_a_public_grid",),
    ),
)
