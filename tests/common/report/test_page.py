"""The page as values: what cannot be made, and the same content for programs."""

from __future__ import annotations

import csv
import io
import json
import math

import pytest

from common.errors import ConfigurationError
from common.report.chart import LETTERS, Axis, Chart, Point, Series, even_ticks
from common.report.data import to_csv, to_json
from common.report.page import Cell, Page, Section, Table
from common.report.words import about, fixed, listed, price, score, signed, size
from tests.common.report.examples import HOSTILE, small_page, small_table


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_cannot_be_put_on_a_page(number: float) -> None:
    """NaN and infinity are refused as a cell, as an interval and as a point, so no page can print one."""
    with pytest.raises(ConfigurationError, match="write None"):
        Cell("x", number)
    with pytest.raises(ConfigurationError, match="write None"):
        Cell("x", 0.5, low=number)
    with pytest.raises(ConfigurationError, match="leave such points out"):
        Series("line", (Point(0, number),))
    with pytest.raises(ConfigurationError, match="leave such points out"):
        Series("line", (Point(0, 0.5, number, 1),))


def test_words_for_numbers_that_are_not_there() -> None:
    """A missing or undefined metric is `unknown`, in words and without a value."""
    assert score(None) == Cell("unknown")
    assert score(math.nan) == Cell("unknown")
    assert signed(None) == Cell("unknown")
    assert price(None).text == price(math.inf).text == "no limit"


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (fixed(-0.0004), "0.000"),
        (fixed(-0.0124), "\u22120.012"),
        (signed(0.0124).text, "+0.012"),
        (score(0.7724, 0.7581, 0.7859).note, "0.758 to 0.786"),
        (price(2.9991).text, "3.000"),  # never less than what is spent
        (about(1234).text, "about 1,230"),
        (size(50760).text, "50.8 kB"),
        (size(999).text, "999 bytes"),
        (listed(["a", "b", "c"]), "a, b and c"),
        (listed([]), "none"),
    ],
)
def test_numbers_in_words(shown: str, text: str) -> None:
    """Rounding, signs and units as a person reads them."""
    assert shown == text


def test_a_price_is_rounded_up() -> None:
    """What is printed as spent is at least what was spent."""
    assert price(1.00001).value == 1.001


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.485, 0.9), (0, 160), (0, 3.3), (0.7, 0.70001), (0, 1e6)])
def test_ticks_are_round_inside_and_few(low: float, high: float) -> None:
    """Between 2 and 8 ticks, all inside the axis, and their words tell them apart."""
    ticks = even_ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert all(low - 1e-9 <= place <= high + 1e-9 for place, _ in ticks)
    assert len({words for _, words in ticks}) == len(ticks)


def test_a_page_that_does_not_fit_together_is_refused() -> None:
    """Names that are no ids, names twice, rows of other length, empty axes, and series without points or letters."""
    with pytest.raises(ConfigurationError, match="lower-case word"):
        Section("A b", "heading", ())
    with pytest.raises(ConfigurationError, match="appears twice"):
        Page("t", (), (Section("one", "h", ()), Section("one", "h", ())), "m")
    with pytest.raises(ConfigurationError, match="appears twice"):
        Page("t", (), (Section("curve-data", "h", (small_table(),)),), "m")
    with pytest.raises(ConfigurationError, match="2 columns and a row of 1"):
        Table("t", "caption", ("a", "b"), ((Cell("x"),),))
    with pytest.raises(ConfigurationError, match="is empty"):
        Axis("x", 1, 1, ())
    with pytest.raises(ConfigurationError, match="0 points"):
        Series("line", ())
    many = tuple(Series(str(i), (Point(0, 0),)) for i in range(len(LETTERS) + 1))
    with pytest.raises(ConfigurationError, match="at most 26"):
        Chart("c", "t", Axis("x", 0, 1, ()), Axis("y", 0, 1, ()), many)


def test_json_holds_the_page_in_order_with_unrounded_numbers() -> None:
    """Every block of the page is there, cells with value and interval, and nothing is NaN (which JSON has not)."""
    data = json.loads(to_json(small_page()), parse_constant=lambda word: pytest.fail(word))
    assert data["title"] == f"Report of {HOSTILE}"
    kinds = [next(iter(block)) for section in data["sections"] for block in section["blocks"]]
    assert kinds == ["paragraph", "notice", "list", "figure", "table", "listing"]
    figure = data["sections"][0]["blocks"][3]
    assert "0.800 at none" in figure["description"]
    assert figure["data"]["rows"][0][1] == {"text": "0.700", "value": 0.7, "low": 0.65, "high": 0.75, "note": HOSTILE}
    assert figure["data"]["rows"][1][1] == {"text": "not shown"}


def test_csv_holds_every_cell_and_no_formula() -> None:
    """A line per cell with table, row and column; text that a spreadsheet would run begins with an apostrophe."""
    lines = list(csv.DictReader(io.StringIO(to_csv(small_page()))))
    assert len(lines) == 4
    assert {line["table"] for line in lines} == {"curve-data", "other-data"}
    assert lines[0]["value"] == "0.7"
    assert lines[1]["row"] == "'=1+1"
    assert lines[1]["value"] == ""
    assert lines[1]["text"] == "not shown"
