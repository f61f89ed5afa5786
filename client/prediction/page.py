"""An evaluation as a page for this hospital alone: are patients told apart, are the risks true, and for whom."""

from __future__ import annotations

from collections.abc import Iterable

from client.prediction.evaluation import LEAST_PATIENTS, Benefit, Evaluation, GroupScores, Scores
from common.report.chart import Axis, Chart, Point, Series, even_ticks
from common.report.page import Block, Cell, Figure, Notice, Page, Paragraph, Section, Table
from common.report.reliability import MASKED, reliability
from common.report.words import UNKNOWN, fixed, score, whole
from common.scores import MIN_EVENTS, CalibrationRow, Estimate

MADE_BY = "Made by wardround, research software, not a medical device. This page loads nothing from anywhere."
LOCAL = Notice(
    "For this hospital alone.",
    "Exact statistics of its held-out patients, which no epsilon covers. Do not send this page, the files beside it or "
    "a number of them to anyone without deciding to.",
)
FEW = Notice(
    "Too few patients to rely on.",
    f"There are fewer than {LEAST_PATIENTS} held-out patients, or fewer than {MIN_EVENTS} labels of one kind. A number "
    "here can be far off.",
)
PERCENT = "\u00a0%"  # a line must not break before it
MOST_SHOWN = 2.0  # times the height of the curve: treating everybody falls without end


def page(title: str, found: Evaluation, facts: Iterable[tuple[str, str]]) -> Page:
    """The whole page.

    Args:
        title: what was evaluated.
        found: the numbers.
        facts: (what, value) of study, weights, records and program.
    """
    sections = [
        Section("scores", "How well patients are told apart", _told_apart(found)),
        Section("calibration", "Are the risks true?", _calibration(found.overall, found.calibration)),
        Section("decisions", "Is acting on it worth it?", _decisions(found.decisions, found.overall.prevalence)),
        Section("groups", "Groups of patients", _groups(found)),
        Section("made", "What was evaluated", (_facts(facts),)),
    ]
    stamps = (LOCAL,) if found.enough else (LOCAL, FEW)
    return Page(title, stamps, tuple(sections), MADE_BY)


def _told_apart(found: Evaluation) -> tuple[Block, ...]:
    overall, once = found.overall, found.each_patient_once
    said = (
        f"{overall.predictions:,} predictions of {overall.patients:,} held-out patients, who trained nothing; "
        f"{_share(overall.prevalence).text} of the predictions have a positive label."
    )
    columns = ["measure", "each prediction once", *(["each patient once"] if once else [])]
    both = [overall, *([once] if once else [])]
    rows: list[tuple[Cell, ...]] = [
        (Cell("AUROC", note="0.5 a coin, 1 perfect"), *(_estimate(one.auroc) for one in both)),
        (
            Cell("AUPRC", note="a coin has the prevalence"),
            *(_estimate(one.auprc) for one in both),
        ),
        (Cell("prevalence"), *(score(one.prevalence) for one in both)),
        (Cell("Brier score", note="0 perfect"), *(_estimate(one.brier) for one in both)),
        (
            Cell("Brier score of the prevalence", note="said of everybody"),
            *(score(one.prevalence * (1 - one.prevalence)) for one in both),
        ),
        (
            Cell("positives flagged", note=f"risk of {_percent(found.threshold)} or more"),
            *(_share(one.flagged_positives) for one in both),
        ),
        (Cell("negatives flagged", note="false alarms"), *(_share(one.flagged_negatives) for one in both)),
    ]
    note = "Small print: 95 % interval over resampled patients."
    if once:
        note += " “Each patient once”: the predictions of a patient weigh one together."
    return (
        Paragraph(said, lead=True),
        Paragraph(
            "AUROC: draw one prediction with a positive label and one with a negative; the AUROC is the chance that "
            "the first has the higher risk. AUPRC: how many of those with the highest risks are positive."
        ),
        Table("scores-table", "Discrimination", tuple(columns), tuple(rows), note),
    )


def _calibration(overall: Scores, bins: CalibrationRow) -> tuple[Block, ...]:
    blocks: list[Block] = [
        Paragraph(
            "A risk of 20 % should mean that 20 of 100 such predictions come true. A slope below 1: the risks are too "
            "extreme. A slope above 1: they are too timid. “In the large” below 0: risks are too high on average; "
            "above 0: too low."
        )
    ]
    figure = reliability(
        bins.bins, "Predicted and observed risk", "Predicted against observed risk.", "a positive label"
    )
    blocks += [figure] if figure is not None else []
    blocks += _on_average(overall)
    rows = (
        (Cell("slope", note="ideal 1"), _estimate(overall.slope, 2)),
        (Cell("intercept", note="ideal 0"), _estimate(overall.intercept, 2)),
        (Cell("in the large", note="ideal 0"), _estimate(overall.in_the_large, 2)),
        (Cell("mean predicted risk"), _share(overall.mean_risk)),
        (Cell("share with a positive label"), _share(overall.prevalence)),
    )
    note = "Small print: 95 % interval over resampled patients."
    blocks.append(Table("calibration-numbers", "Calibration", ("measure", "value"), rows, note))
    return tuple(blocks)


def _on_average(overall: Scores) -> list[Block]:
    """A warning where the mean risk is surely off."""
    low, high = overall.in_the_large.low, overall.in_the_large.high
    if low is None or high is None or low <= 0 <= high:
        return []
    said = (
        f"On average {_share(overall.mean_risk).text} is predicted, and {_share(overall.prevalence).text} of the "
        "labels are positive. The order of patients may be used, the risks not as they are; a local recalibration "
        "(docs/predict.md) can make them true."
    )
    return [Notice(f"The risks are too {'low' if low > 0 else 'high'}.", said)]


def _decisions(decisions: tuple[Benefit, ...], prevalence: float) -> tuple[Block, ...]:
    rows = tuple(
        (
            Cell(_percent(one.threshold), one.threshold),
            _estimate(_per_hundred(one.model), 2),
            score(100 * one.everybody, decimals=2),
            score(0.0, decimals=2),
        )
        for one in decisions
    )
    columns = ("act from a risk of", "by the model", "everybody", "nobody")
    table = Table("decision-data", "Net benefit per 100 predictions", columns, rows)
    caption = (
        "Positives found per 100 predictions, less what the false alarms cost. Whoever acts from a risk of 10 % on "
        "accepts nine acts in vain for one in need: so much a false alarm weighs there. Where the model's curve is the "
        "highest, acting by it gains most; where it is not, do without it. Bars: 95 % interval over resampled patients."
    )
    return (
        Paragraph("Net benefit of acting on those whose risk reaches a threshold, against everybody and nobody."),
        Figure(_curve(decisions, prevalence), caption, table),
    )


def _curve(decisions: tuple[Benefit, ...], prevalence: float) -> Chart:
    model = [(one.threshold, _per_hundred(one.model)) for one in decisions]
    top = 1.1 * max([100 * prevalence, *(found.high or 0.0 for _, found in model), 0.1])
    low = -top / MOST_SHOWN
    points = [
        Point(at, one.value, None if one.low is None else max(one.low, low), one.high)
        for at, one in model
        if one.value is not None and one.value >= low
    ]
    everybody = [Point(one.threshold, 100 * one.everybody) for one in decisions if 100 * one.everybody >= low]
    right = decisions[-1].threshold + decisions[0].threshold / 2  # room, so that letters at the end stand together
    series = [
        Series("By the model", tuple(points), strong=True) if points else None,
        Series("Everybody", tuple(everybody)) if everybody else None,
        Series("Nobody", (Point(0, 0),), level=True),
    ]
    return Chart(
        name="decision-curve",
        title="Net benefit by threshold",
        x=Axis("act from a risk of", 0, right, tuple((at, _percent(at)) for at, _ in even_ticks(0, right, most=5))),
        y=Axis("net benefit per 100 predictions", low, top, even_ticks(low, top, most=5)),
        series=tuple(one for one in series if one is not None),
        decimals=2,
    )


def _per_hundred(one: Estimate) -> Estimate:
    return Estimate(*(None if number is None else 100 * number for number in (one.value, one.low, one.high)))


def _groups(found: Evaluation) -> tuple[Block, ...]:
    if not found.groups:
        return (
            Paragraph(
                "The study's schema names neither sex nor age in a way that is recognised; a file of groups "
                "(`--groups`, docs/predict.md) says what to compare."
            ),
        )
    columns = ("group", "patients", "prevalence", "mean risk", "AUROC", "slope", "in the large", "flagged")
    rows = tuple(_group(one) for one in (GroupScores("all", "", found.overall), *found.groups))
    note = (
        f"Groups with fewer than {LEAST_PATIENTS} patients, or fewer than {MIN_EVENTS} labels of one kind, are not "
        f"shown. Flagged: of the positives, and of the negatives, with a risk of {_percent(found.threshold)} or more. "
        "A fact that was never recorded counts as the schema's centre."
    )
    return (
        Paragraph(
            "A model can be good for all patients and bad for some. Intervals that overlap do not prove that two "
            "groups are served alike: a small group hides a difference."
        ),
        Table("groups-table", "The same by sex and age, or as the file of groups says", columns, rows, note),
    )


def _group(one: GroupScores) -> tuple[Cell, ...]:
    name = Cell(f"{one.attribute}: {one.group}" if one.group else one.attribute)
    scores = one.scores
    if scores is None:
        return (name, *(MASKED for _ in range(7)))
    flagged = f"{_share(scores.flagged_positives).text} and {_share(scores.flagged_negatives).text}"
    return (
        name,
        whole(scores.patients),
        _share(scores.prevalence),
        _share(scores.mean_risk),
        _estimate(scores.auroc),
        _estimate(scores.slope, 2),
        _estimate(scores.in_the_large, 2),
        Cell(flagged),
    )


def _facts(facts: Iterable[tuple[str, str]]) -> Table:
    rows = tuple((Cell(what), Cell(value)) for what, value in facts)
    return Table("facts", "Study, weights and program", ("what", "value"), rows)


def _estimate(one: Estimate, decimals: int = 3) -> Cell:
    return score(one.value, one.low, one.high, decimals=decimals)


def _share(value: float | None) -> Cell:
    return Cell(UNKNOWN) if value is None else Cell(f"{fixed(100 * value, 1)}{PERCENT}", value)


def _percent(value: float) -> str:
    return f"{100 * value:g}{PERCENT}"
