"""From rows to a report: what is put together, what is said, what is masked, and what a warning needs."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import DataError
from common.report.page import Block, Bullets, Figure, Listing, Notice, Page, Paragraph, Table
from common.study import load_study
from simulations.frontier import build_page, write_report
from simulations.lines import SWEEP_LINES
from simulations.reporting.accuracy import curve_lines
from simulations.reporting.curve import Sweep, auroc_at, best_possible, gap, spot
from simulations.reporting.names import EXPLAINED, NAMES, Origin, name_of
from simulations.reporting.privacy import RESEARCH, SEEDED
from simulations.rows import MIN_EVENTS, POOLED, Bin, CalibrationRow, Estimate, Row, Subgroup
from simulations.seeded import STAMP
from tests.common.report.examples import HOSTILE
from tests.simulations.example_rows import example_rows

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return example_rows()


@pytest.fixture(scope="module")
def page(rows: list[Row]) -> Page:
    return build_page(rows, Origin(load_study(DEMO), (("sweep.yaml", "name: demo"),), "wardround simulate sweep ..."))


def table(page: Page, name: str) -> Table:
    return next(found for found in page.tables() if found.name == name)


def cells(page: Page, name: str) -> dict[str, list[str]]:
    """Texts of a table's rows by their heads."""
    return {row[0].text: [cell.text for cell in row[1:]] for row in table(page, name).rows}


def words(page: Page) -> str:
    """All sentences of a page."""
    said: list[str] = []
    for block in (*page.stamps, *page.blocks()):
        said += _sentences(block)
    return "\n".join(said)


def _sentences(block: Block) -> list[str]:
    match block:
        case Paragraph(text=text):
            return [text]
        case Notice(title=title, text=text):
            return [title, text]
        case Bullets(items=items):
            return [item if isinstance(item, str) else ": ".join(item) for item in items]
        case Figure(caption=caption):
            return [caption]
        case _:
            return []


def changed(rows: list[Row], line: str, **changes: object) -> list[Row]:
    """The rows with every row of a line changed."""
    return [replace(row, **changes) if row.line == line else row for row in rows]  # type: ignore[arg-type]  # any field


def test_runs_are_put_together_by_mean_and_widest_interval() -> None:
    """The value is the mean over seeds, the bar reaches from the lowest lower to the highest upper end."""
    found = spot([Estimate(0.7, 0.65, 0.74), Estimate(0.8, 0.77, 0.85), Estimate(None)])
    assert found is not None
    assert (found.value, found.low, found.high, found.runs) == (pytest.approx(0.75), 0.65, 0.85, 2)
    assert found.deviation == pytest.approx(0.0707, abs=1e-4)
    assert spot([Estimate(None), None]) is None


def test_a_run_without_interval_leaves_none() -> None:
    """One run that has too few patients for an interval takes the bar away: it could only be drawn too short."""
    found = spot([Estimate(0.7, 0.65, 0.74), Estimate(0.8)])
    assert found is not None
    assert (found.low, found.high) == (None, None)


def test_lines_are_compared_seed_by_seed(rows: list[Row]) -> None:
    """A gap is taken between runs of the same seed, and is clear only if more than one run agrees on its sign."""
    sweep = Sweep(rows)
    mine, naive = sweep.pick("fedavg-one-step", 3.0), sweep.pick("naive", 3.0)
    apart = gap(mine, naive)
    assert apart is not None
    assert apart.clear
    assert apart.mean == pytest.approx(0.079, abs=0.005)
    assert gap(mine[:1], naive[1:]) is None
    single = gap(mine[:1], naive)
    assert single is not None
    assert not single.clear


def test_the_order_of_rows_and_runs_that_stand_there_twice_change_nothing(rows: list[Row]) -> None:
    """A sweep read in another order of seeds, or a row read twice, gives the same numbers."""
    sweep, again = Sweep(rows), Sweep([*rows, *rows])
    for line in sweep.lines:
        for epsilon in (1.0, 3.0, 8.0, None):
            assert auroc_at(sweep.pick(line, epsilon)) == auroc_at(again.pick(line, epsilon))
    backwards = Sweep(list(reversed(rows)))
    assert auroc_at(backwards.pick("naive", 3.0)) == auroc_at(sweep.pick("naive", 3.0))


def test_settings_are_never_mixed(rows: list[Row]) -> None:
    """Rows of another setting change nothing on the curve, and stand in a table of their own."""
    lstm = [
        replace(row, settings={"model.cell": "lstm"}, sites=row.sites[:1] + row.sites[-1:])
        for row in rows
        if row.line == "fedavg-one-step" and not row.settings
    ]
    with_both, alone = build_page([*lstm, *rows], Origin()), build_page(rows, Origin())
    assert table(with_both, "curve-data") == table(alone, "curve-data")
    assert "model.cell = lstm" in cells(with_both, "settings-data")
    assert "settings-data" not in [found.name for found in alone.tables()]


def test_every_line_of_a_sweep_has_a_name_and_an_explanation() -> None:
    """Each line that a sweep can draw is named and explained in words."""
    for line in SWEEP_LINES:
        assert line in NAMES
        assert line in EXPLAINED
    assert name_of("alone: north") == "north alone"
    assert name_of("something new") == "something new"


def test_the_curve_has_every_line_and_its_levels(rows: list[Row], page: Page) -> None:
    """All ten lines are drawn, best possible and coin as levels, and the table holds the same numbers."""
    lines = {line.key: line for line in curve_lines(Sweep(rows))}
    assert set(lines) == {*NAMES}
    assert lines["best-possible"].level
    assert lines["prevalence"].spots[None].value == 0.5
    shown = cells(page, "curve-data")
    assert shown["Federated, one step a round"][:3] == ["0.745", "0.772", "0.785"]
    assert shown["Federated, no privacy"] == ["no epsilon"] * 3 + ["0.794", "3"]
    assert shown["Federated, as in tutorials"][3] == "not run"
    assert shown["Best possible"] == ["0.865"] * 4 + ["exact"]


def test_best_possible_is_left_out_where_it_is_not_known(rows: list[Row]) -> None:
    """On records that are not synthetic there is no such line and no such column."""
    real = [
        replace(row, sites=tuple(replace(site, best_possible=None) for site in row.sites))
        for row in rows
        if row.line != "best-possible"
    ]
    assert best_possible(real) is None
    said = build_page(real, Origin())
    assert "Best possible" not in cells(said, "curve-data")
    assert "best possible" not in table(said, "own-patients").columns
    assert "is not known" in words(said)


def test_it_begins_with_what_was_done_and_what_came_out(page: Page) -> None:
    """The first section says what was done, the result, what epsilon means, and each difference with its sureness."""
    first = page.sections[0]
    assert isinstance(first.blocks[0], Paragraph)
    assert "simulation on one machine" in first.blocks[0].text
    assert "8,800 training patients" in first.blocks[0].text
    meaning = first.blocks[1]
    assert isinstance(meaning, Paragraph)
    assert re.search(r"rightly in at most \d\d of 100 cases; tossing a coin, in 50", meaning.text)
    results = first.blocks[2]
    assert isinstance(results, Bullets)
    said = dict(item for item in results.items if not isinstance(item, str))
    assert "AUROC of 0.772 (3 runs, 0.758 to 0.786)" in said["The main result"]
    assert "lower in all 3 runs" in said["What privacy costs"]
    assert "No clear difference" in said["What the network brings"]
    assert "3 of 4 hospitals" in said["What joining brings"]
    assert "Not so: north." in said["What joining brings"]


def test_a_single_run_is_said_to_be_one(rows: list[Row]) -> None:
    """A result of one seed claims no difference and says that another run may differ."""
    said = words(build_page([row for row in rows if row.seed == 0], Origin()))
    assert "In a single run, the shared model with" in said
    assert "another run may differ" in said
    assert "Few runs." in said


def test_runs_that_are_missing_are_named(rows: list[Row]) -> None:
    """A line with fewer runs than the sweep has seeds is said to have them."""
    some = [row for row in rows if not (row.line == "naive" and row.epsilon == 3.0 and row.seed > 0)]
    assert "Federated, as in tutorials, epsilon 3: 1 of 3" in words(build_page(some, Origin()))
    assert "Some runs are missing" not in words(build_page(rows, Origin()))


def test_the_stamps_stand_above_everything(rows: list[Row], page: Page) -> None:
    """Every page says that its weights are not private; one on real records also that it is research mode."""
    assert page.stamps == (SEEDED,)
    assert "not private" in STAMP
    assert "not private" in SEEDED.title
    research = build_page([*rows[:-1], replace(rows[-1], research_mode=True)], Origin())
    assert research.stamps == (SEEDED, RESEARCH)
    assert "Research mode" in words(research)


def test_epsilon_is_explained_and_its_limits_listed(page: Page) -> None:
    """For every budget the chance of the best guess, growing with epsilon; and what epsilon does not cover."""
    chances = [row[1].value for row in table(page, "guess").rows]
    assert chances == sorted(chances, key=lambda value: value if isinstance(value, int) else 0)
    assert chances[-1] == 100
    assert all(isinstance(value, int) and 50 < value <= 100 for value in chances)
    said = words(page)
    for limit in ("records at two hospitals", "Taking part", "The choice of settings", "The scores of this page"):
        assert limit in said


@pytest.mark.parametrize(("lost", "warned"), [(0.015, False), (0.021, True), (0.05, True)])
def test_a_hospital_that_loses_to_the_weighting_is_warned_of(rows: list[Row], lost: float, warned: bool) -> None:
    """More than .02 AUROC below another weighting, on its own patients, is a warning that names hospital and runs."""

    def better(row: Row) -> Row:
        own = Sweep(rows).pick("fedavg-one-step", 3.0)
        west = next(s for s in own[row.seed].sites if s.site == "west").auroc
        assert west.value is not None
        raised = replace(west, value=west.value + lost)
        return replace(row, sites=tuple(replace(s, auroc=raised) if s.site == "west" else s for s in row.sites))

    some = [better(row) if row.weighting == "uniform" and row.settings else row for row in rows]
    said = words(build_page(some, Origin()))
    assert ("Weighting by precision costs a hospital more than 0.02 AUROC." in said) == warned
    assert ("No hospital loses more than 0.02 AUROC" in said) != warned
    if warned:
        assert f"West at epsilon 3: {lost:.3f} below weighting all alike (lower in 3 of 3 runs)" in said


def test_a_hospital_that_is_better_off_alone_is_warned_of(page: Page) -> None:
    """The page says which hospital joining did not pay for, where every run agrees."""
    assert "On their own patients these did better alone, in every run: north" in words(page)


def test_small_groups_are_masked_everywhere(rows: list[Row], tmp_path: Path) -> None:
    """Fewer than ten events, or a group masked in one run, appears in no file with any number."""
    few = Subgroup("sex", "other", 73_173, MIN_EVENTS - 1, Estimate(0.61234, 0.5, 0.7))
    some = changed(
        rows, "fedavg-one-step", subgroups=(few, *rows[4].subgroups, Subgroup("age", "n/a", None, None, None))
    )
    built = build_page(some, Origin())
    assert cells(built, "subgroups")["sex: other"] == ["not shown"] * 5
    assert cells(built, "subgroups")["age: n/a"] == ["not shown"] * 5
    write_report(some, tmp_path)
    for file in tmp_path.iterdir():
        text = file.read_text(encoding="utf-8")
        assert "0.612" not in text, file
        assert "73173" not in text, file
        assert "73,17" not in text, file


def test_counts_of_groups_are_rounded(page: Page, tmp_path: Path) -> None:
    """Counts of patients and events are given to the nearest ten, also in the data, so that none can be subtracted."""
    shown = table(page, "subgroups")
    counts = [cell.value for row in shown.rows for cell in row[1:3] if cell.value is not None]
    assert len(counts) == 10
    assert all(isinstance(count, int) and count % 10 == 0 for count in counts)


def test_a_group_that_is_ranked_less_well_is_named(page: Page) -> None:
    """A group whose whole interval lies below the value of all patients is pointed out."""
    assert "age: < 45: 0.731 against 0.772 for all patients" in words(page)


def test_small_calibration_bins_are_masked(rows: list[Row]) -> None:
    """A bin with few events is neither drawn nor told; one with all of them the same neither."""
    bins = (Bin(500, 0.01, 0.018, 0.01, 0.03), Bin(500, 0.2, 0.21, 0.17, 0.25), Bin(500, 0.99, 0.99, 0.98, 1.0))
    some = changed(rows, "fedavg-one-step", calibration=CalibrationRow(bins, 1.1, None, 0.0))
    built = build_page(some, Origin())
    assert [line[2] for line in cells(built, "calibration-data").values()] == ["not shown", "21.0 %", "not shown"]
    figure = next(b for b in built.blocks() if isinstance(b, Figure) and b.chart.name == "calibration-curve")
    assert [point.x for point in figure.chart.series[0].points] == [0.2]
    assert cells(built, "calibration-numbers")["epsilon 3"] == ["1.10", "unknown", "0.00"]


@pytest.mark.parametrize(("predicted", "word"), [(0.2, None), (0.17, None), (0.15, "low"), (0.26, "high")])
def test_risks_that_are_off_on_average_are_warned_of(rows: list[Row], predicted: float, word: str | None) -> None:
    """A mean risk more than a quarter off the share of patients with the diagnosis is said in words."""
    bins = (Bin(500, predicted, 0.2, 0.17, 0.24),)
    some = changed(rows, "fedavg-one-step", calibration=CalibrationRow(bins, 1.0, 0.0, 0.0))
    said = words(build_page(some, Origin()))
    assert [w for w in ("low", "high") if f"The risks are too {w}." in said] == ([word] if word else [])


def test_a_comparison_speaks_of_the_runs_that_both_have(rows: list[Row]) -> None:
    """Where a line lacks seeds, both values of a comparison are means over the seeds that both have."""
    some = [row for row in rows if not (row.line == "naive" and row.seed > 0)]
    sweep = Sweep(some)
    apart = gap(sweep.pick("fedavg-one-step", 3.0), sweep.pick("naive", 3.0))
    alone = auroc_at(sweep.pick("fedavg-one-step", 3.0)[:1])
    assert apart is not None
    assert alone is not None
    assert apart.first == alone.value
    assert apart.runs == 1


def test_numbers_that_are_not_there_are_words(rows: list[Row], tmp_path: Path) -> None:
    """Undefined metrics, no intervals, no calibration, no rounds and no bytes leave a page without NaN or None."""

    def bare(row: Row) -> Row:
        sites = tuple(
            replace(site, auroc=Estimate(None) if site.site == "west" else Estimate(site.auroc.value))
            for site in row.sites
        )
        return replace(row, sites=sites, calibration=None, rounds=(), bytes_per_round={}, subgroups=())

    write_report([bare(row) for row in rows], tmp_path)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.search(r"\b(nan|NaN|None|inf|null)\b", re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)) is None
    assert ">unknown<" in html
    json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=lambda word: pytest.fail(word))


def test_budget_bytes_and_origin_are_all_there(page: Page) -> None:
    """Price per hospital, the plan, bytes by field and round, configuration, command, code and versions."""
    assert cells(page, "prices")["west"] == [
        "800",
        "3.000",
        "1 in 100,000",
        *cells(page, "prices")["north"][3:4],
        "2.5 %",
    ]
    assert cells(page, "plan")["steps that are taken"] == ["160"]
    bytes_of = [row[1].value for row in table(page, "bytes").rows]
    assert bytes_of == [4 * 12_690, 52_031 - 4 * 12_690, 51_870]
    assert table(page, "bytes").rows[0][2].value == 160 * 4 * 12_690
    facts = cells(page, "provenance")
    assert facts["code (sha256)"] == ["a7" * 32]
    assert facts["torch"] == ["2.13.0"]
    assert {listing.text for listing in page.listings()} == {"name: demo", "wardround simulate sweep ..."}


def test_rows_of_different_code_are_pointed_out(rows: list[Row]) -> None:
    """Half a curve from before a change and half from after is said to be one."""
    mixed = build_page([replace(rows[0], code_digest="b8" * 32), *rows[1:]], Origin())
    assert "mixed code" in cells(mixed, "provenance")


def test_the_three_files_say_the_same(rows: list[Row], page: Page, tmp_path: Path) -> None:
    """Every number of the page is in report.json and report.csv, and every text of a table in report.html."""
    assert write_report(rows, tmp_path) == tmp_path / "report.html"
    with (tmp_path / "report.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    built = build_page(rows, Origin())
    expected = [(t.name, row[0].text, c) for t in built.tables() for row in t.rows for c in t.columns[1:]]
    assert [(line["table"], line["row"], line["column"]) for line in lines] == expected
    data = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert [section["name"] for section in data["sections"]] == [section.name for section in built.sections]
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    for found in built.tables():
        for row in found.rows:
            assert row[-1].text.replace("<", "&lt;").replace(">", "&gt;") in html


def test_hostile_names_reach_the_page_as_text(rows: list[Row], tmp_path: Path) -> None:
    """Names of lines, hospitals, groups, settings and versions are data, whatever they hold."""

    def hostile(row: Row) -> Row:
        sites = tuple(replace(s, site=HOSTILE if s.site == "west" else s.site) for s in row.sites)
        weights = {HOSTILE if site == "west" else site: weight for site, weight in row.weights.items()}
        groups = tuple(replace(group, attribute=HOSTILE, group=HOSTILE) for group in row.subgroups)
        line = HOSTILE if row.line == "logistic" else row.line
        versions = {HOSTILE: HOSTILE}
        return replace(row, sites=sites, weights=weights, subgroups=groups, line=line, versions=versions, study=HOSTILE)

    write_report([hostile(row) for row in rows], tmp_path, Origin(None, ((HOSTILE, HOSTILE),), HOSTILE))
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in html
    assert "<img" not in html
    assert "&lt;script&gt;" in html


def test_nothing_to_report_is_said_in_a_line() -> None:
    """A sweep without a finished run is one clear error."""
    with pytest.raises(DataError, match="no finished run"):
        build_page([], Origin())


@pytest.mark.parametrize("line", ["logistic", "pooled-no-privacy", "alone: north"])
def test_a_sweep_of_any_single_line_has_a_report(rows: list[Row], line: str) -> None:
    """A sweep that ran only one kind of line, private or not, gives a page with its curve."""
    built = build_page([row for row in rows if row.line == line], Origin())
    assert {"summary", "epsilon", "accuracy", "making"} <= {section.name for section in built.sections}
    assert [type(block) for block in built.blocks() if isinstance(block, Listing)] == []


@pytest.mark.parametrize("epsilon", [3.0, None])
def test_a_sweep_of_a_single_budget_has_a_report(rows: list[Row], epsilon: float | None) -> None:
    """One epsilon alone, or `none` alone, gives a page with its curve."""
    built = build_page([row for row in rows if row.epsilon == epsilon], Origin())
    assert "curve-data" in [found.name for found in built.tables()]


def test_hospitals_without_any_score_leave_tables_of_words(rows: list[Row]) -> None:
    """Where no hospital has patients of both kinds, none is drawn, and the page says unknown."""

    def unscored(row: Row) -> Row:
        sites = tuple(s if s.site == POOLED else replace(s, auroc=Estimate(None)) for s in row.sites)
        return replace(row, sites=sites)

    built = build_page([unscored(row) for row in rows], Origin())
    assert cells(built, "own-patients")["west"][1] == "unknown"
    assert "weightings" not in [block.chart.name for block in built.blocks() if isinstance(block, Figure)]


def test_a_report_needs_neither_torch_nor_flower() -> None:
    """Making a report again imports nothing that trains or draws: it starts in a second."""
    from tests.test_packaging import loaded_by

    heavy = ("torch", "opacus", "flwr", "matplotlib", "polars")
    assert loaded_by("import simulations.frontier, common.report.html", heavy) == []


def test_pooled_is_what_the_rows_call_it(rows: list[Row]) -> None:
    """The score of all hospitals together is never taken for a hospital."""
    assert POOLED not in Sweep(rows).sites
    assert POOLED not in cells(build_page(rows, Origin()), "own-patients")
