"""Each hospital's own patients: what the shared model does for them, alone, and under three ways of weighting."""

from __future__ import annotations

from collections.abc import Iterator

from common.report.chart import Axis, Chart, Point, Series, even_ticks
from common.report.page import Block, Cell, Figure, Notice, Paragraph, Section, Table
from common.report.words import UNKNOWN, budget, fixed, score, signed, whole
from simulations.reporting.accuracy import gap_cell
from simulations.reporting.curve import ALONE, WEIGHTINGS, Gap, Spot, Sweep, auroc_at, best_possible, gap
from simulations.reporting.names import name_of
from simulations.rows import Row

HARM = 0.02  # AUROC that a hospital may lose to a way of weighting before the report warns
WORDS = {
    "precision": "by precision (size squared)",
    "declared": "by size",
    "uniform": "all alike",
}


def hospitals_section(sweep: Sweep, at: float | None) -> Section | None:
    """AUROC on each hospital's held-out patients at the headline's budget, and the three weightings."""
    if not sweep.pick(sweep.main, at):
        return None
    blocks: list[Block] = [
        Paragraph(
            "An average can hide a hospital for which the shared model is worse. Every number here is for one "
            "hospital's own held-out patients."
        ),
        *_worse_than_alone(sweep, at),
        _own_patients(sweep, at),
    ]
    budgets = [e for e in (*sweep.budgets, None) if len(_weightings(sweep, e)) > 1]
    if budgets:
        shown = at if at in budgets else budgets[0]
        blocks += [
            Paragraph(
                "The updates of the hospitals are averaged. Weighting by precision gives a large hospital more weight "
                "than its share of patients, because its update has less noise; that helps on average and may cost a "
                "small hospital whose patients differ."
            ),
            *_harm(sweep, budgets),
        ]
        chart, numbers = _chart(sweep, shown), _weighting_table(sweep, budgets)
        caption = (
            f"AUROC of each hospital at epsilon {budget(shown)} under the three weightings. Bars: the widest 95 % "
            "interval of the runs."
        )
        blocks.append(Figure(chart, caption, numbers) if chart is not None else numbers)
    return Section("hospitals", "Hospital by hospital", tuple(blocks))


def _own_patients(sweep: Sweep, at: float | None) -> Table:
    rows = sweep.pick(sweep.main, at)
    best = {site: best_possible(rows, site) for site in sweep.sites}
    alone = {site: sweep.pick(ALONE + site, at) for site in sweep.sites}
    with_best = any(value is not None for value in best.values())
    with_alone = any(alone.values())
    lines = []
    for site in sweep.sites:
        cells = [Cell(site), whole(sweep.declared(site)), _spot_cell(auroc_at(rows, site))]
        if with_alone:
            cells += [_spot_cell(auroc_at(alone[site], site)), gap_cell(gap(rows, alone[site], site))]
        if with_best:
            cells.append(score(best[site]))
        lines.append(tuple(cells))
    columns = ["hospital", "declared patients", "shared model"]
    columns += ["alone, same budget", "gain from joining"] if with_alone else []
    columns += ["best possible"] if with_best else []
    return Table(
        "own-patients",
        f"AUROC on each hospital's own held-out patients, epsilon {budget(at)}",
        tuple(columns),
        tuple(lines),
        f"Line: {name_of(sweep.main)}. Mean over the runs, with the widest 95 % interval of the runs.",
    )


def _worse_than_alone(sweep: Sweep, at: float | None) -> Iterator[Notice]:
    rows = sweep.pick(sweep.main, at)
    gaps = {site: gap(rows, sweep.pick(ALONE + site, at), site) for site in sweep.sites}
    worse = [f"{site} ({signed(g.mean).text})" for site, g in gaps.items() if g is not None and g.clear and g.mean < 0]
    if worse:
        yield Notice(
            "Joining did not pay for every hospital.",
            "On their own patients these did better alone, in every run: " + ", ".join(worse) + ".",
        )


def _weightings(sweep: Sweep, epsilon: float | None) -> dict[str, list[Row]]:
    """Rows of the main line at this budget by weighting, those that were run."""
    found = {name: sweep.pick(sweep.main, epsilon, weighting=name) for name in WEIGHTINGS}
    return {name: rows for name, rows in found.items() if rows}


def _harm(sweep: Sweep, budgets: list[float | None]) -> Iterator[Notice]:
    """A warning per hospital that loses more than HARM to precision weighting; else a word that none does."""
    harmed = []
    for epsilon in budgets:
        for site in sweep.sites:
            worst = _cost_of_precision(sweep, epsilon, site)
            if worst is not None and worst[1].mean > HARM:
                other, apart = worst
                harmed.append(
                    f"{site} at epsilon {budget(epsilon)}: {fixed(apart.mean)} below weighting {WORDS[other]} "
                    f"(lower in {apart.higher} of {apart.runs} {'run' if apart.runs == 1 else 'runs'})"
                )
    if harmed:
        yield Notice(
            f"Weighting by precision costs a hospital more than {HARM:g} AUROC.", "; ".join(harmed).capitalize() + "."
        )
    elif any("precision" in _weightings(sweep, epsilon) for epsilon in budgets):
        yield Notice(
            f"No hospital loses more than {HARM:g} AUROC to the weighting.",
            "Precision against the better of the two others, on each hospital's own patients, mean over the runs.",
            kind="note",
        )


def _cost_of_precision(sweep: Sweep, epsilon: float | None, site: str) -> tuple[str, Gap] | None:
    """The other weighting that does most for this site, and how far it is above precision, run by run."""
    known = _weightings(sweep, epsilon)
    if "precision" not in known:
        return None
    gaps = {name: gap(rows, known["precision"], site) for name, rows in known.items() if name != "precision"}
    there = {name: apart for name, apart in gaps.items() if apart is not None}
    if not there:
        return None
    name = max(there, key=lambda each: there[each].mean)
    return name, there[name]


def _chart(sweep: Sweep, epsilon: float | None) -> Chart | None:
    """The weightings side by side, hospital by hospital; None if no hospital has an AUROC."""
    known = _weightings(sweep, epsilon)
    places = list(enumerate(sweep.sites))
    series = []
    numbers: list[float] = []
    for name, rows in known.items():
        spots = [(place, auroc_at(rows, site)) for place, site in places]
        points = tuple(Point(place, s.value, s.low, s.high) for place, s in spots if s is not None)
        numbers += [y for p in points for y in (p.y, p.low, p.high) if y is not None]
        if points:
            series.append(Series(f"Weighted {WORDS[name]}", points, joined=False))
    if not numbers:
        return None
    low, high = int(min(numbers) * 20) / 20, -int(-max(numbers) * 20 - 1) / 20
    return Chart(
        name="weightings",
        title=f"AUROC of each hospital under three weightings, epsilon {budget(epsilon)}",
        x=Axis("hospital", -0.5, len(places) - 0.5, tuple((float(place), site) for place, site in places)),
        y=Axis("AUROC on own held-out patients", low, high, even_ticks(low, high)),
        series=tuple(series),
    )


def _weighting_table(sweep: Sweep, budgets: list[float | None]) -> Table:
    lines = []
    for epsilon in budgets:
        known = _weightings(sweep, epsilon)
        for site in sweep.sites:
            worst = _cost_of_precision(sweep, epsilon, site)
            lines.append(
                (
                    Cell(f"{site}, epsilon {budget(epsilon)}"),
                    *(_weighted_cell(known.get(name), site) for name in WEIGHTINGS),
                    gap_cell(gap(known["precision"], known[worst[0]], site) if worst else None),
                )
            )
    return Table(
        "weightings-data",
        "AUROC of each hospital under the three weightings",
        ("hospital", *(f"weighted {WORDS[name]}" for name in WEIGHTINGS), "precision against the best other"),
        tuple(lines),
        "In small print: the widest 95 % interval of the runs, and the hospital's weight in the average.",
    )


def _weighted_cell(rows: list[Row] | None, site: str) -> Cell:
    here = auroc_at(rows, site) if rows else None
    if not rows or here is None:
        return Cell("not run")
    cell = _spot_cell(here)
    share = rows[0].weights.get(site)
    note = f"{cell.note}\nweight {100 * share:.1f} %" if share is not None else cell.note
    return Cell(cell.text, cell.value, cell.low, cell.high, note)


def _spot_cell(here: Spot | None) -> Cell:
    return score(here.value, here.low, here.high) if here is not None else Cell(UNKNOWN)
