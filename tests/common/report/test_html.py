"""The page as HTML, without a browser: structure, text alternatives, escaping, colours, and nothing that loads."""

from __future__ import annotations

import re
import tomllib
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.report.html import FOLDER, _plain, render
from common.report.svg import MARKERS, NARROW, WIDE, draw, spread, style_of
from tests.common.report.examples import HOSTILE, small_chart, small_page

ROOT = Path(__file__).resolve().parents[3]
LOADS = ("src", "srcset", "href", "action", "data", "poster", "background", "formaction", "xlink:href", "ping")
VOID = ("meta", "link", "br", "img", "input", "hr")


class Outline(HTMLParser):
    """Tags with their attributes, and whether every one was closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def html() -> str:
    return render(small_page())


@pytest.fixture(scope="module")
def outline(html: str) -> Outline:
    return Outline(html)


def test_the_document_is_well_formed(outline: Outline) -> None:
    """Every tag is closed where it should be; a hostile name opened none."""
    assert (outline.wrong, outline.open) == ([], [])


def test_names_are_text_whatever_they_hold(html: str, outline: Outline) -> None:
    """No script, image, handler or template expression comes from a name; the name itself is there, escaped."""
    assert outline.all("script") == outline.all("img") == outline.all("iframe") == outline.all("form") == []
    assert not [attributes for _, attributes in outline.tags if any(name.startswith("on") for name in attributes)]
    assert "49" not in html
    assert "{{7*7}}" in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 10


def test_nothing_is_loaded(html: str, outline: Outline) -> None:
    """No attribute and no style names an address outside the page, and the page's own policy forbids loading."""
    addresses = [attributes[name] for _, attributes in outline.tags for name in LOADS if name in attributes]
    assert [address for address in addresses if not address.startswith("#") and address != "data:,"] == []
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style is not None
    assert re.search(r"url\(|@import|@font-face|expression", style.group(1)) is None
    policy = next(m["content"] for m in outline.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "script-src" not in policy


def test_the_stamps_stand_on_every_sheet_of_paper(html: str) -> None:
    """A printed sheet that is handed on alone still says what the page says on top, in characters harmless to CSS."""
    found = re.search(r'@bottom-left \{ content: "([^"]*)"', html)
    assert found is not None
    assert found.group(1) == _plain(HOSTILE)
    assert set(found.group(1)).isdisjoint("<>\"'\\{}&/*=")
    assert _plain("Not for use: the weights (of this page) are not private.") == (
        "Not for use: the weights (of this page) are not private."
    )


def test_template_and_style_are_shipped() -> None:
    """What a page is made with is part of the installed package: a wheel without it would fail at the first report."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    globs = project["tool"]["setuptools"]["package-data"]["common"]
    shipped = {path for pattern in globs for path in (ROOT / "common").glob(pattern)}
    needed = {path for path in FOLDER.iterdir() if path.is_file() and path.suffix != ".py"}
    assert len(needed) == 2
    assert needed <= shipped


def test_landmarks_headings_and_skip_link(outline: Outline) -> None:
    """Language, one h1, headings that skip no level, the four landmarks, and a first link to the content."""
    assert outline.all("html")[0]["lang"] == "en"
    assert [len(outline.all(tag)) for tag in ("header", "nav", "main", "footer", "h1")] == [1] * 5
    levels = [int(tag[1]) for tag, _ in outline.tags if re.fullmatch(r"h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert outline.all("a")[0] == {"class": "skip", "href": "#content"}
    named = [ref for _, a in outline.tags for name in ("aria-labelledby", "aria-describedby") for ref in [a.get(name)]]
    assert {ref for ref in named if ref} <= set(ids)
    assert {link["href"].removeprefix("#") for link in outline.all("a")} <= set(ids)


def test_every_figure_has_a_text_alternative_and_its_numbers(html: str, outline: Outline) -> None:
    """Each drawing is an image with title and description that hold its data, and a table follows the figure."""
    drawings = [attributes for attributes in outline.all("svg") if attributes.get("role") == "img"]
    assert len(drawings) == 2  # wide and narrow
    for drawing in drawings:
        for key, tag in (("aria-labelledby", "title"), ("aria-describedby", "desc")):
            found = re.search(rf'<{tag} id="{drawing[key]}">(.*?)</{tag}>', html, re.DOTALL)
            assert found is not None
            assert found.group(1).strip()
    others = [a for a in outline.all("svg") if a.get("role") != "img"]
    assert all(a.get("aria-hidden") == "true" for a in others)
    assert html.index('id="curve-data"') > html.index('id="curve-wide-desc"')


def test_the_description_holds_every_point() -> None:
    """Whoever cannot see the drawing hears each value and where it stands."""
    said = small_chart().described()
    for value in ("0.700", "0.600 at 1", "0.800 at none", "0.500 at 1", "0.850 throughout"):
        assert value in said


def test_tables_have_captions_and_scopes(outline: Outline) -> None:
    """Each table has a caption, each heading cell a scope, and can be scrolled by keyboard."""
    assert len(outline.all("table")) == len(outline.all("caption")) == 2
    assert {attributes.get("scope") for attributes in outline.all("th")} == {"col", "row"}
    scrolled = [a for a in outline.all("div") if a.get("class") == "scroll"]
    assert all(a["tabindex"] == "0" and a["role"] == "region" and a["aria-labelledby"] for a in scrolled)


def test_no_series_is_told_by_colour_alone() -> None:
    """The first 26 series, as many as there are letters, differ in letter and in dash, marker or filling."""
    styles = [style_of(index) for index in range(26)]
    assert len({style[0] for style in styles}) == 26
    assert len({style[1:] for style in styles}) == 26
    assert len(set(MARKERS)) == len(MARKERS)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_contrast(scheme: str) -> None:
    """Text, links, warnings, letters, lines and markers are at least 4.5 : 1 on every ground they stand on."""
    style = (FOLDER / "page.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(blocks) == 2
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[0 if scheme == "light" else 1]))
    assert len(colours) == 15
    for name in ("text", "soft", "link", *(f"c{i}" for i in range(6))):
        assert contrast(colours[name], colours["ground"]) >= 4.5, name
    for name in ("text", "soft", "link"):
        assert contrast(colours[name], colours["panel"]) >= 4.5, name
    for name in ("text", "warn"):
        assert contrast(colours[name], colours["warn-ground"]) >= 4.5, name
    assert contrast(colours["line"], colours["ground"]) >= 3  # axes: graphics, WCAG 1.4.11


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 400), max_size=12), st.floats(1, 20))
def test_letters_keep_apart_and_in_order(places: list[float], apart: float) -> None:
    """Letters at the ends of lines never overlap, stand in the order of the ends, and stay where there is room."""
    moved = spread(places, apart)
    order = sorted(range(len(places)), key=lambda i: places[i])
    for first, second in pairwise(order):
        assert moved[second] - moved[first] >= apart - 1e-6
    if all(places[b] - places[a] >= apart for a, b in pairwise(order)):
        assert moved == pytest.approx(places)


def test_a_drawing_escapes_names_and_stays_in_its_frame() -> None:
    """The SVG holds the name as text, and no coordinate of a series lies outside the drawing."""
    for shape in (WIDE, NARROW):
        svg = draw(small_chart(), shape)
        assert "<script" not in svg
        for x, y in re.findall(r"translate\(([\d.-]+) ([\d.-]+)\)", svg):
            assert 0 <= float(x) <= shape.width
            assert 0 <= float(y) <= shape.height
    assert HOSTILE not in draw(small_chart(), WIDE)


def contrast(one: str, other: str) -> float:
    """WCAG 2 contrast ratio of two colours."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
