"""What epsilon promises in plain words, what it does not cover, what each hospital spent, and what left it."""

from __future__ import annotations

import math
from functools import lru_cache

from client.wording import best_guess
from common.privacy.plan import Plan
from common.report.page import Block, Bullets, Cell, Notice, Paragraph, Section, Table
from common.report.words import budget, price, size, whole
from simulations.reporting.curve import Sweep
from simulations.rows import Row

SEEDED = Notice(
    "Not for use: these weights are not private (seeded simulation).",
    "A simulation is seeded, so that it can be made again; whoever can make the noise again can take it off. "
    "Epsilon here is what the same plan costs with secret randomness, as in a real run.",
)
RESEARCH = Notice(
    "Research mode: the data were treated as public.",
    "Many models were trained on the same records and their results compared freely. No epsilon on this page covers "
    "that: it holds for one run whose settings were fixed without looking at these records.",
)
_NOT_COVERED = {
    "What is true of the whole group": "if smoking causes cancer, a model may learn it, and then says something about "
    "every smoker, in the study or not. Epsilon limits only what taking part adds.",
    "A patient with records at two hospitals": "the prices add up.",
    "Taking part": "that a hospital takes part, the rounded number of patients that it publishes, when it answers and "
    "whether it does, and what people tell each other.",
    "The choice of settings": "where they were chosen by looking at the same patients.",
    "The scores of this page": "accuracy, calibration and groups are counted on held-out patients without noise. In a "
    "real study they leave a hospital only if its policy lets them; the default is that none do.",
    "Use of the model": "a prediction about a patient can be wrong or harmful however well the training data are "
    "protected. This is research software, not a medical device.",
}
KEPT = "Never sent: records, patient ids, counts, labels, results of tests, texts of errors."


def epsilon_section(sweep: Sweep) -> Section:
    """What epsilon means, for each budget of the curve."""
    rows = []
    for epsilon in sweep.budgets:
        plan = _plan(sweep.pick(sweep.main, epsilon))
        if plan is not None:
            right = _in_hundred(plan)
            rows.append((Cell(f"epsilon {budget(epsilon)}"), Cell(f"{right} of 100", right)))
    rows.append((Cell("none (no noise)"), Cell("100 of 100", 100)))
    return Section(
        "epsilon",
        "What epsilon means",
        (
            Paragraph(
                "Epsilon is a limit on what anybody can learn about one patient from everything that a hospital "
                "sends during the whole study. Think of somebody who sees all of it and knows everything else, "
                "also every other record, and has to guess whether one given patient was among the training "
                "patients. Without what was sent, a guess is right in 50 of 100 cases, like a coin. With it, the "
                "best possible guess is right in at most this many:"
            ),
            Table(
                "guess",
                "How often the best guess about one patient can be right",
                ("budget", "right guesses, at most"),
                tuple(rows),
                "A coin: 50 of 100. Each line holds for one study at one hospital and all records of a patient there.",
            ),
            Paragraph(
                "A smaller epsilon needs more noise and protects better. Delta is a small chance by which the limit "
                f"may be missed, here {_deltas(sweep)}; it is included in the numbers above."
            ),
            Paragraph("What epsilon does not cover:"),
            Bullets(tuple(_NOT_COVERED.items())),
        ),
    )


def in_words(sweep: Sweep, at: float) -> str:
    """What the headline's budget means and does not cover, in two sentences."""
    plan = _plan(sweep.pick(sweep.main, at))
    limit = f"at most {_in_hundred(plan)} of 100 cases" if plan is not None else "a limited share of cases"
    return (
        f"Epsilon {budget(at)} means here: somebody who sees everything that a hospital sends, and knows everything "
        f"except whether one given patient is among its records, guesses that rightly in {limit}; tossing a coin, in "
        "50. It does not hide what is true of patients in general, that a hospital takes part, or the scores on this "
        "page, and a patient with records at two hospitals pays at both: see “What epsilon means”."
    )


def budget_section(sweep: Sweep, at: float | None) -> Section | None:
    """What each hospital spends, at the headline's budget."""
    rows = sweep.pick(sweep.main, at)
    plan = _plan(rows)
    if plan is None:
        return None
    row = rows[0]
    spent = price(row.spent)
    guess = Cell(f"{_in_hundred(plan)} of 100", _in_hundred(plan))
    sites = [site for site in row.sites if site.site in row.weights]
    table = Table(
        "prices",
        f"Price for each patient, by hospital, at epsilon {budget(at)}",
        ("hospital", "declared patients", "epsilon", "delta", "best guess right", "weight in the average"),
        tuple(
            (
                Cell(site.site),
                whole(site.declared_patients),
                spent,
                Cell(f"1 in {1 / row.delta:,.0f}", row.delta),
                guess,
                Cell(f"{100 * row.weights[site.site]:.1f} %", row.weights[site.site]),
            )
            for site in sites
        ),
        "The price of the whole plan, spare rounds included, rounded up. It is charged in full with the first round, "
        "also if a study stops early.",
    )
    how = Table(
        "plan",
        "The plan behind the price, the same at every hospital",
        ("term", "value"),
        (
            (Cell("chance that a patient is drawn for a step"), Cell(f"{plan.sampling_rate:g}", plan.sampling_rate)),
            (Cell("limit on one patient's influence (clip)"), Cell(f"{plan.clip:g}", plan.clip)),
            (
                Cell("noise, as a multiple of that limit"),
                Cell(f"{plan.noise_multiplier:g}", plan.noise_multiplier),
            ),
            (Cell("steps that are taken"), whole(plan.steps)),
            (Cell("spare steps, priced and kept for rounds that fail"), whole(plan.spare_steps)),
        ),
    )
    return Section("budget", "Budget of each hospital", (table, how))


def traffic_section(sweep: Sweep, at: float | None) -> Section | None:
    """What leaves a hospital, by field and round."""
    rows = sweep.pick(sweep.main, at)
    if not rows or not rows[0].bytes_per_round:
        return None
    row, rounds = rows[0], _rounds(rows[0])
    sites = list(row.bytes_per_round)
    alike = len(set(row.bytes_per_round.values())) == 1
    lines = []
    for site in sites[:1] if alike else sites:
        traffic = row.bytes_per_round[site]
        who = f"each of {len(sites)} hospitals" if alike else site
        numbers = min(4 * row.parameters, traffic.up)
        lines += [
            _bytes_line(f"{who} sends: the update, {row.parameters:,} numbers with noise in them", numbers, rounds),
            _bytes_line(
                f"{who} sends: round number, one word of a closed list such as OK, digests of study, program and "
                "ledger, names and shapes of the update's parts",
                traffic.up - numbers,
                rounds,
            ),
            _bytes_line(f"{who} receives: the shared model's weights and the terms of the round", traffic.down, rounds),
        ]
    blocks: list[Block] = [
        Table(
            "bytes",
            "Bytes between a hospital and the coordinator",
            ("what", "in a round", f"in {rounds:,} rounds" if rounds else "in all rounds"),
            tuple(lines),
            "Content of the messages in this simulation. A real connection adds encryption, addresses and times; "
            "docs/egress.md lists every field.",
        ),
        Paragraph(KEPT),
    ]
    return Section("traffic", "What left the hospitals", tuple(blocks))


def stamps(sweep: Sweep) -> tuple[Notice, ...]:
    """What must be said above all numbers of the page."""
    found = [SEEDED]
    if any(row.research_mode for row in sweep.all):
        found.append(RESEARCH)
    return tuple(found)


def _bytes_line(words: str, count: int, rounds: int) -> tuple[Cell, Cell, Cell]:
    return Cell(words), size(count), size(count * rounds) if rounds else Cell("unknown")


def _rounds(row: Row) -> int:
    """How many rounds were run: the last that was scored."""
    return max((each.round for each in row.rounds), default=0)


def _plan(rows: list[Row]) -> Plan | None:
    return next((row.plan for row in rows if row.plan is not None), None)


@lru_cache(maxsize=64)
def _in_hundred(plan: Plan) -> int:
    """Right guesses of 100, rounded up: the same plan stands in several places of a page."""
    return math.ceil(100 * best_guess(plan))


def _deltas(sweep: Sweep) -> str:
    return " or ".join(f"1 in {1 / delta:,.0f}" for delta in sorted({row.delta for row in sweep.rows}))
