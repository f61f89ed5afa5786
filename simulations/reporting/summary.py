"""The first thing on the page: the study in a paragraph, and what came out of it."""

from __future__ import annotations

from collections.abc import Iterator

from common.report.page import Block, Bullets, Notice, Paragraph, Section
from common.report.words import listed
from simulations.reporting.accuracy import results
from simulations.reporting.curve import Sweep, best_possible
from simulations.reporting.names import Origin
from simulations.reporting.privacy import in_words
from simulations.rows import POOLED


def summary_section(sweep: Sweep, at: float | None, origin: Origin) -> Section:
    """What was done, in plain words; then the results, one sentence or two each."""
    rows = sweep.pick(sweep.main, at) or [sweep.rows[0]]
    blocks: list[Block] = [Paragraph(_what_was_done(sweep, origin), lead=True)]
    if at is not None:
        blocks.append(Paragraph(in_words(sweep, at)))
    found = results(sweep, at)
    blocks.append(Bullets(tuple(found)) if found else Paragraph("No federated line has finished yet."))
    blocks += _small_numbers(len(rows))
    return Section("summary", "In short", tuple(blocks))


def _what_was_done(sweep: Sweep, origin: Origin) -> str:
    rows = sweep.pick(sweep.main, sweep.budgets[0] if sweep.budgets else None) or [sweep.rows[0]]
    row = rows[0]
    everybody = next((site for site in row.sites if site.site == POOLED), None)
    made_up = best_possible([row]) is not None
    study = origin.study
    aim = f"to predict “{study.task.name}” from the records of a patient" if study else "a diagnosis model"
    model = ""
    if study:
        cell = study.model.cell
        model = " a logistic regression" if cell == "none" else f" one recurrent network ({cell.upper()})"
    started = (
        f"This is a simulation on one machine. {len(row.weights) or len(sweep.sites)} virtual hospitals "
        f"({listed(sweep.sites)}) train{model or ' one model'} together {aim}, and no record leaves its hospital: what "
        "leaves are updates of the model with random noise in them. How much noise is set beforehand, by a limit on "
        "what can be learned about one patient, called epsilon."
    )
    said = [started]
    if everybody is not None:
        tested = 10 * round(everybody.patients / 10)
        said.append(
            f"The hospitals declare {everybody.declared_patients:,} training patients together; the model is tested on "
            f"about {tested:,} others."
        )
    said.append(
        "The records are made up by a generator, so the best possible result is known exactly."
        if made_up
        else "The records are not made up by wardround; the best possible result is not known."
    )
    return " ".join(said)


def _small_numbers(runs: int) -> Iterator[Notice]:
    if runs < 3:
        yield Notice(
            "Few runs.",
            f"The main line was run {'once' if runs == 1 else 'twice'}. Chance alone moves such a result; three runs "
            "or more are customary.",
            kind="note",
        )
