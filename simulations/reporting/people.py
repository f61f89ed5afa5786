"""For whom the model works, and whether its risks are true: subgroups and calibration."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator

from common.report.page import Block, Cell, Notice, Paragraph, Section, Table
from common.report.reliability import MASKED, reliability
from common.report.words import UNKNOWN, about, budget, fixed, score, signed
from simulations.reporting.curve import Spot, Sweep, auroc_at, spot
from simulations.reporting.names import name_of
from simulations.rows import MIN_EVENTS, CalibrationRow, Row, Subgroup

OFF = 1.25  # times the observed share: a mean risk beyond it is warned of
PLAIN = "federated-no-privacy"


def subgroups_section(sweep: Sweep, at: float | None) -> Section | None:
    """AUROC by sex and age band at the headline's budget, beside the same training without privacy."""
    rows = sweep.pick(sweep.main, at)
    groups = _groups(rows)
    if not groups:
        return None
    plain = sweep.pick(PLAIN, None)
    overall = auroc_at(rows)
    columns = ["group", "patients", "with the diagnosis", "AUROC", "against all patients"]
    columns += ["AUROC without privacy"] if plain else []
    lines, behind = [], []
    for attribute, group in groups:
        own = _of(rows, attribute, group)
        here = spot(each.auroc for each in own) if _shown(own) else None
        name = f"{attribute}: {group}"
        if here is None or overall is None:
            lines.append((Cell(name), *(MASKED for _ in columns[1:])))
            continue
        apart = here.value - overall.value
        if here.high is not None and here.high < overall.value:
            behind.append(f"{name}: {fixed(here.value)} against {fixed(overall.value)} for all patients")
        cells = [Cell(name), _mean_count(own, "patients"), _mean_count(own, "events"), _spot_cell(here), signed(apart)]
        if plain:
            without = _of(plain, attribute, group)
            cells.append(_spot_cell(spot(each.auroc for each in without)) if _shown(without) else MASKED)
        lines.append(tuple(cells))
    blocks: list[Block] = [
        Paragraph(
            "Noise can weigh more on groups with few patients. These are groups of the held-out patients of all "
            "hospitals; differences may come from the noise, from the data, or from what is harder to predict."
        )
    ]
    if behind:
        blocks.append(Notice("The model ranks some groups less well.", "; ".join(behind) + "."))
    blocks.append(
        Table(
            "subgroups",
            f"AUROC by group, epsilon {budget(at)}",
            tuple(columns),
            tuple(lines),
            f"Line: {name_of(sweep.main)}. Groups with fewer than {MIN_EVENTS} patients with, or without, the "
            "diagnosis are not shown; counts are rounded to tens.",
        )
    )
    return Section("groups", "Groups of patients", tuple(blocks))


def calibration_section(sweep: Sweep, at: float | None) -> Section | None:
    """Whether the predicted risks are true: curve of one run, slope and intercept of all."""
    rows = [row for row in sweep.pick(sweep.main, at) if row.calibration is not None]
    if not rows or rows[0].calibration is None:
        return None
    first = rows[0].calibration
    blocks: list[Block] = [
        Paragraph(
            "A risk of 20 % should mean that 20 of 100 such patients have the diagnosis. Slope 1 and intercept 0 are "
            "ideal. A slope below 1: the risks are too extreme, high ones too high and low ones too low. A slope above "
            "1: they are too timid. “In the large” below 0: risks are too high on average."
        )
    ]
    figure = reliability(
        first.bins,
        f"Predicted and observed risk, epsilon {budget(at)}",
        f"Predicted against observed risk, run with seed {rows[0].seed}, epsilon {budget(at)}.",
        "the diagnosis",
    )
    blocks += [figure] if figure is not None else []
    blocks += _on_average(first, rows[0].seed)
    blocks.append(_numbers_table(sweep))
    return Section("calibration", "Are the risks true?", tuple(blocks))


def _on_average(calibration: CalibrationRow, seed: int) -> Iterator[Notice]:
    """A warning where the mean risk is more than a quarter off the share of patients with the diagnosis."""
    count = sum(part.sequences for part in calibration.bins)
    predicted = sum(part.sequences * part.predicted for part in calibration.bins) / count
    observed = sum(part.sequences * part.observed for part in calibration.bins) / count
    if min(observed, 1 - observed) * count >= MIN_EVENTS and not observed / OFF <= predicted <= observed * OFF:
        yield Notice(
            f"The risks are too {'low' if predicted < observed else 'high'}.",
            f"On average the model predicts {100 * predicted:.1f} %, and {100 * observed:.1f} % have the diagnosis "
            f"(run with seed {seed}). Its ranking may be used, its risks not as they are.",
        )


def _numbers_table(sweep: Sweep) -> Table:
    lines = []
    for epsilon in (*sweep.budgets, None):
        known = [row.calibration for row in sweep.pick(sweep.main, epsilon) if row.calibration is not None]
        if known:
            lines.append(
                (
                    Cell(f"epsilon {budget(epsilon)}"),
                    _mean_cell(each.slope for each in known),
                    _mean_cell(each.intercept for each in known),
                    _mean_cell(each.in_the_large for each in known),
                )
            )
    return Table(
        "calibration-numbers",
        "Calibration at each epsilon",
        ("budget", "slope (ideal 1)", "intercept (ideal 0)", "in the large (ideal 0)"),
        tuple(lines),
        f"Line: {name_of(sweep.main)}. Mean over the runs; below it the lowest and highest run.",
    )


def _mean_cell(values: Iterable[float | None]) -> Cell:
    known = [value for value in values if value is not None]
    if not known:
        return Cell(UNKNOWN)
    mean = statistics.fmean(known)
    note = f"{fixed(min(known), 2)} to {fixed(max(known), 2)}" if len(known) > 1 else ""
    return Cell(fixed(mean, 2), mean, note=note)


def _groups(rows: list[Row]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((each.attribute, each.group) for row in rows for each in row.subgroups))


def _of(rows: list[Row], attribute: str, group: str) -> list[Subgroup]:
    return [each for row in rows for each in row.subgroups if (each.attribute, each.group) == (attribute, group)]


def _shown(groups: list[Subgroup]) -> bool:
    """Whether every run has enough events and non-events; one that has not masks the group on the whole page."""
    return bool(groups) and all(
        each.patients is not None
        and each.events is not None
        and each.auroc is not None
        and min(each.events, each.patients) >= MIN_EVENTS  # the row itself masks by non-events too
        for each in groups
    )


def _mean_count(groups: list[Subgroup], what: str) -> Cell:
    return about(round(statistics.fmean(getattr(each, what) for each in groups)))


def _spot_cell(here: Spot | None) -> Cell:
    return score(here.value, here.low, here.high) if here is not None else Cell(UNKNOWN)
