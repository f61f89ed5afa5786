"""The accuracy-privacy curve, and the sentences that say what it shows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from common.report.chart import Axis, Chart, Point, Series, even_ticks
from common.report.page import Block, Bullets, Cell, Figure, Notice, Paragraph, Section, Table
from common.report.words import UNKNOWN, budget, fixed, listed, score, signed
from simulations.reporting.curve import ALONE, RECIPES, Gap, Spot, Sweep, auroc_at, best_possible, gap
from simulations.reporting.names import EXPLAINED, name_of

COIN = 0.5
LEVELS = ("best-possible", "prevalence")  # lines that no budget changes


@dataclass(frozen=True)
class Line:
    """A line of the curve: its spot at each budget (None: without privacy); a level has one for all."""

    key: str
    name: str
    spots: dict[float | None, Spot]
    level: bool = False

    def at(self, epsilon: float | None) -> Spot | None:
        """The spot at a budget."""
        return self.spots.get(None if self.level else epsilon)


def curve_lines(sweep: Sweep) -> list[Line]:
    """All lines of the curve; the level of the best possible model and that of a coin are always among them."""
    places = [*sweep.budgets, None]
    found = []
    for key in sweep.lines:
        if key.startswith(ALONE) or key in LEVELS:
            continue
        spots = {e: s for e in places if (s := auroc_at(sweep.pick(key, e))) is not None}
        if spots:
            found.append(Line(key, name_of(key), spots))
    alone = {e: s for e in places if (s := _alone(sweep, e)) is not None}
    if alone:
        found.append(Line("alone", name_of("alone"), alone))
    best = best_possible([row for row in sweep.rows if not row.line.startswith(ALONE)])
    if best is not None:
        found.append(Line("best-possible", name_of("best-possible"), {None: _exact(best)}, level=True))
    found.append(Line("prevalence", name_of("prevalence"), {None: _exact(COIN)}, level=True))
    return found


def accuracy_section(sweep: Sweep, at: float | None) -> Section:
    """The curve with its table, and what each of its lines is."""
    lines = _from_best(curve_lines(sweep), at)
    caption = (
        "The higher, the more often the model gives the higher risk to the patient who has the diagnosis. The further "
        "left, the better patients are protected; “none” is training without noise, hence without privacy. Bars: the "
        "widest 95 % interval of the runs, over resampled held-out patients. Bars that overlap do not mean that two "
        "lines are equal, because runs share their patients: “In short” compares them run by run."
    )
    blocks: list[Block] = [
        Paragraph(
            "AUROC says how well a model ranks patients: draw one who has the diagnosis and one who has not; the AUROC "
            "is the chance that the first gets the higher risk. 0.5 is a coin, 1 is perfect."
        ),
        Figure(_chart(sweep, lines), caption, _table(sweep, lines)),
        Bullets(tuple((line.name, EXPLAINED[line.key]) for line in lines if line.key in EXPLAINED)),
        *_missing(sweep),
    ]
    if _above(lines, "federated-no-privacy", RECIPES) or _above(lines, "pooled-no-privacy", ("pooled-private",)):
        blocks.append(
            Notice(
                "A line without privacy is no ceiling here.",
                "Training with privacy came out above the same without: noise also keeps a model from fitting its "
                "training patients too closely. It does not mean that privacy is free.",
                kind="note",
            )
        )
    return Section("accuracy", "Accuracy and privacy", tuple(blocks))


def results(sweep: Sweep, at: float | None) -> list[tuple[str, str]]:
    """The main results: what is asked, and the answer in a sentence or two with how sure it is."""
    main, lines = sweep.main, {line.key: line for line in curve_lines(sweep)}
    here = lines[main].at(at) if main in lines else None
    if here is None:
        return []
    best = lines["best-possible"].at(None) if "best-possible" in lines else None
    ceiling = f" No model can do better than {fixed(best.value)} on these records." if best else ""
    reached = (
        f"{_at(at)}, the shared model reached an AUROC of {_spoken(here)}: of 100 pairs of a patient with and one "
        f"without the diagnosis, it gave the higher risk to the right one in about {round(100 * here.value)}; a coin "
        f"does in 50.{ceiling}"
    )
    said = [("The main result", reached)]
    mine = sweep.pick(main, at)
    questions = (
        ("What privacy costs", "federated-no-privacy", None, "federated training that protects nobody"),
        ("What keeping records apart costs", "pooled-private", at, "all records in one place, with the same privacy"),
        ("What the network brings", "logistic", at, "private logistic regression"),
        ("What the recipe brings", "naive", at, "federated training as in tutorials"),
    )
    for question, key, epsilon, words in questions:
        if key in lines and key != main:
            apart = gap(mine, sweep.pick(key, epsilon))
            if apart is not None:
                said.append((question, f"{words} reached {fixed(apart.second)}. {_verdict(apart)}"))
    said += _joining(sweep, at)
    return said


def _joining(sweep: Sweep, at: float | None) -> Iterator[tuple[str, str]]:
    """Whether a hospital's own patients gain from its taking part."""
    mine = sweep.pick(sweep.main, at)
    gaps = {site: gap(mine, sweep.pick(ALONE + site, at), site) for site in sweep.sites}
    known = {site: apart for site, apart in gaps.items() if apart is not None}
    if known:
        gain = [site for site, apart in known.items() if apart.mean > 0]
        loss = [site for site in known if site not in gain]
        each = ", ".join(f"{site} {signed(apart.mean).text}" for site, apart in known.items())
        words = (
            f"on their own patients, {len(gain)} of {len(known)} hospitals did better with the shared model than alone "
            f"with the same budget ({each})."
        )
        yield "What joining brings", words + (f" Not so: {listed(loss)}." if loss else "")


def _verdict(apart: Gap) -> str:
    """A difference as it may be claimed."""
    by = f"the shared model with {fixed(apart.first)} is {fixed(abs(apart.mean))} "
    by += "above" if apart.mean > 0 else "below"
    if apart.runs == 1:
        return f"In a single run, {by}; another run may differ."
    if not apart.clear:
        return f"No clear difference: {by} on average, and higher in {apart.higher} of {apart.runs} runs."
    every = "both" if apart.runs == 2 else f"all {apart.runs}"
    return f"{by[0].upper()}{by[1:]}, {'higher' if apart.mean > 0 else 'lower'} in {every} runs."


def _spoken(here: Spot) -> str:
    interval = f", {fixed(here.low)} to {fixed(here.high)}" if here.low is not None and here.high is not None else ""
    return f"{fixed(here.value)} ({here.runs} {'run' if here.runs == 1 else 'runs'}{interval})"


def _at(epsilon: float | None) -> str:
    return "Without privacy" if epsilon is None else f"At epsilon {budget(epsilon)}"


def _chart(sweep: Sweep, lines: list[Line]) -> Chart:
    budgets = sweep.budgets
    places: dict[float | None, float] = {epsilon: math.log2(epsilon) for epsilon in budgets}
    last = max(places.values(), default=0.0)
    step = max((last - min(places.values())) / (len(places) - 1), 0.8) if len(places) > 1 else 1.0
    ticks = [(place, budget(epsilon)) for epsilon, place in places.items()]
    unbounded = any(None in line.spots for line in lines if not line.level)
    if unbounded:
        places[None] = last + step if budgets else 0.0
        ticks.append((places[None], "none"))
    numbers = [y for line in lines for s in line.spots.values() for y in (s.value, s.low, s.high) if y is not None]
    low, high = math.floor(min(numbers) * 20) / 20 - 0.015, math.ceil(max(numbers) * 20) / 20
    first = min(places.values(), default=0.0)
    return Chart(
        name="curve",
        title="AUROC on held-out patients against epsilon",
        x=Axis(
            "epsilon (smaller protects better)",
            first - 0.5 * step,
            max(places.values(), default=0.0) + 0.5 * step,
            tuple(ticks),
        ),
        y=Axis("AUROC on held-out patients", low, high, even_ticks(low, high)),
        series=tuple(
            Series(
                line.name,
                (Point(0, line.spots[None].value),)
                if line.level
                else tuple(Point(places[e], s.value, s.low, s.high) for e, s in line.spots.items()),
                level=line.level,
                strong=line.key in RECIPES and line.key == sweep.main,
            )
            for line in lines
        ),
        gap=last + step / 2 if unbounded and budgets else None,
    )


def _table(sweep: Sweep, lines: list[Line]) -> Table:
    columns: list[float | None] = [*sweep.budgets]
    if any(None in line.spots for line in lines if not line.level):
        columns.append(None)
    rows = []
    for line in lines:
        spots = [line.at(epsilon) for epsilon in columns]
        absent = Cell("not run" if any(e is not None for e in line.spots) else "no epsilon")
        cells = [score(s.value, s.low, s.high) if s else absent for s in spots]
        rows.append((Cell(line.name), *cells, Cell("exact") if line.level else _runs(line)))
    return Table(
        "curve-data",
        "AUROC of every line at every epsilon",
        ("line", *(f"epsilon {budget(epsilon)}" for epsilon in columns), "runs"),
        tuple(rows),
        "Mean over the runs; below it the widest 95 % interval of the runs.",
    )


def _runs(line: Line) -> Cell:
    """How many runs stand behind a line's values; fewest to most where they differ."""
    runs = sorted({spot.runs for spot in line.spots.values()})
    return Cell(str(runs[0]), runs[0]) if len(runs) == 1 else Cell(f"{runs[0]} to {runs[-1]}")


def _missing(sweep: Sweep) -> Iterator[Notice]:
    """A word where some runs of a line are missing, so that nobody compares a mean of three with a single run."""
    short = []
    for line in sweep.lines:
        for epsilon in (*sweep.budgets, None):
            rows = sweep.pick(line, epsilon)
            if rows and len(rows) < len(sweep.seeds):
                short.append(f"{name_of(line)}, epsilon {budget(epsilon)}: {len(rows)} of {len(sweep.seeds)}")
    if short:
        yield Notice("Some runs are missing.", "Runs that are there: " + "; ".join(short) + ".")


def _alone(sweep: Sweep, epsilon: float | None) -> Spot | None:
    """All hospitals alone, scored on everybody's patients: mean weighted by declared size, from worst to best."""
    sizes = {site: max(sweep.declared(site), 1) for site in sweep.sites}
    spots = {}
    for site in sizes:
        rows = [r for r in sweep.pick(ALONE + site, epsilon) if {s.site for s in r.sites} >= set(sweep.sites)]
        spots[site] = auroc_at(rows)
    known = {site: s for site, s in spots.items() if s is not None}
    if not known or len(known) < len(sizes):
        return None
    mean = sum(sizes[site] * s.value for site, s in known.items()) / sum(sizes.values())
    values = [s.value for s in known.values()]
    return Spot(mean, min(values), max(values), min(s.runs for s in known.values()), None)


def _from_best(lines: list[Line], at: float | None) -> list[Line]:
    """The lines from the highest to the lowest at the headline's budget: letters then run down the drawing."""

    def height(line: Line) -> float:
        here = line.at(at) or next(iter(line.spots.values()))
        return -here.value

    return sorted(lines, key=height)


def _above(lines: list[Line], free_key: str, keys: tuple[str, ...]) -> bool:
    """Whether one of the private lines `keys` is higher than the line `free_key`, which has no privacy."""
    free = next((line.spots.get(None) for line in lines if line.key == free_key), None)
    private = [s.value for line in lines if line.key in keys for e, s in line.spots.items() if e is not None]
    return free is not None and bool(private) and max(private) > free.value


def _exact(value: float) -> Spot:
    return Spot(value, None, None, 1, None)


def gap_cell(apart: Gap | None) -> Cell:
    """A difference with how many runs agree."""
    if apart is None:
        return Cell(UNKNOWN)
    cell = signed(apart.mean)
    return Cell(cell.text, cell.value, note=f"higher in {apart.higher} of {apart.runs}")
