"""Round by round: how fast accuracy comes, and how epsilon grows with the steps."""

from __future__ import annotations

import statistics

from common.report.chart import Axis, Chart, Point, Series, even_ticks
from common.report.page import Block, Cell, Figure, Paragraph, Section, Table
from common.report.words import budget, price, score, whole
from simulations.reporting.curve import Sweep
from simulations.reporting.names import name_of


def rounds_section(sweep: Sweep, at: float | None) -> Section | None:
    """AUROC and epsilon of the main line by round."""
    curves = {epsilon: _auroc_by_round(sweep, epsilon) for epsilon in (*sweep.budgets, None)}
    known = {epsilon: curve for epsilon, curve in curves.items() if curve}
    if not known:
        return None
    spent = _spent_by_round(sweep, at)
    blocks: list[Block] = [
        Paragraph(
            "The last round's model is the one that counts: choosing the best round would be one more look at the "
            "patients."
        ),
        Figure(
            _auroc_chart(known),
            f"AUROC on held-out patients after some of the rounds, mean over the runs. Line: {name_of(sweep.main)}.",
            _auroc_table(known),
        ),
    ]
    if spent and at is not None:
        blocks.append(
            Figure(
                _spent_chart(spent, at),
                f"Price of the steps so far at epsilon {budget(at)}, highest of any hospital. What is guaranteed is "
                "the whole plan, drawn across: it is charged at the start and holds also if the study stops early.",
                _spent_table(spent),
            )
        )
    return Section("rounds", "Round by round", tuple(blocks))


def _auroc_by_round(sweep: Sweep, epsilon: float | None) -> dict[int, float]:
    """Mean over the runs, for the rounds that were scored in all of them."""
    rows = [row for row in sweep.pick(sweep.main, epsilon) if row.rounds]
    by_round: dict[int, list[float]] = {}
    for row in rows:
        for each in row.rounds:
            by_round.setdefault(each.round, []).append(each.auroc)
    return {number: statistics.fmean(values) for number, values in sorted(by_round.items()) if len(values) == len(rows)}


def _spent_by_round(sweep: Sweep, epsilon: float | None) -> dict[int, float]:
    rows = sweep.pick(sweep.main, epsilon)
    return {each.round: each.epsilon for each in rows[0].rounds if each.epsilon is not None} if rows else {}


def _auroc_chart(curves: dict[float | None, dict[int, float]]) -> Chart:
    values = [value for curve in curves.values() for value in curve.values()]
    low, high = int(min(values) * 20) / 20, -int(-max(values) * 20 - 1) / 20
    return Chart(
        name="rounds-auroc",
        title="AUROC on held-out patients by round",
        x=_round_axis([number for curve in curves.values() for number in curve]),
        y=Axis("AUROC on held-out patients", low, high, even_ticks(low, high)),
        series=tuple(
            Series(f"Epsilon {budget(epsilon)}", tuple(Point(number, value) for number, value in curve.items()))
            for epsilon, curve in sorted(curves.items(), key=lambda pair: -list(pair[1].values())[-1])
        ),
    )


def _spent_chart(spent: dict[int, float], at: float) -> Chart:
    high = 1.1 * max(at, *spent.values())
    return Chart(
        name="rounds-epsilon",
        title="Epsilon of the steps so far by round",
        x=_round_axis(list(spent)),
        y=Axis("epsilon per patient", 0, high, even_ticks(0, high)),
        series=(
            Series("The whole plan (the guarantee)", (Point(0, at),), level=True),
            Series("Steps so far", tuple(Point(number, value) for number, value in spent.items())),
        ),
        decimals=2,
    )


def _round_axis(rounds: list[int]) -> Axis:
    high = max(rounds)
    ticks = tuple((place, words) for place, words in even_ticks(0, high) if place == int(place))
    return Axis("round", 0, 1.03 * high, ticks)


def _auroc_table(curves: dict[float | None, dict[int, float]]) -> Table:
    rounds = sorted({number for curve in curves.values() for number in curve})
    return Table(
        "rounds-auroc-data",
        "AUROC on held-out patients by round, mean over the runs",
        ("round", *(f"epsilon {budget(epsilon)}" for epsilon in curves)),
        tuple(
            (
                whole(number),
                *(score(curve[number]) if number in curve else Cell("not scored") for curve in curves.values()),
            )
            for number in rounds
        ),
    )


def _spent_table(spent: dict[int, float]) -> Table:
    return Table(
        "rounds-epsilon-data",
        "Epsilon of the steps so far, rounded up",
        ("round", "epsilon"),
        tuple((whole(number), price(value)) for number, value in spent.items()),
    )
