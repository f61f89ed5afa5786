"""The report in a real browser, as a person meets it: on a phone, on paper, by keyboard, read aloud, in the dark.

Needs Chromium; without one the file is skipped, and tests/common/report holds what can be held without.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.study import load_study
from simulations.frontier import write_report
from simulations.reporting.names import Origin
from tests.browser.chromium import DESKTOP, PHONE, Browser, find_chromium
from tests.simulations.example_rows import example_rows

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed (apt-get install chromium)")

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
SIZES = {"phone": PHONE, "desktop": DESKTOP}

# Elements that are wider than the page and do not scroll inside themselves.
TOO_WIDE = """
[...document.querySelectorAll('body *')].filter(e => {
  const box = e.getBoundingClientRect();
  return box.right > innerWidth + 0.5 && !e.closest('.scroll, pre, svg, .skip');
}).map(e => e.outerHTML.slice(0, 80))
"""
# Words of a drawing that stick out of it, or lie on one another.
CUT_OFF = """
[...document.querySelectorAll('svg.chart')].filter(s => s.getBoundingClientRect().width).flatMap(s => {
  const frame = s.getBoundingClientRect();
  return [...s.querySelectorAll('text')].filter(t => {
    const box = t.getBoundingClientRect();
    return box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1;
  }).map(t => t.textContent);
})
"""
OVERLAPPING = """
[...document.querySelectorAll('svg.chart')].filter(s => s.getBoundingClientRect().width).flatMap(s => {
  const boxes = [...s.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
  return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([b, q]) =>
    p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 3 && q.top < p.bottom - 3
  ).map(([b, q]) => a + ' / ' + b));
})
"""
SMALL_TEXT = """
[...document.querySelectorAll('svg.chart')].filter(s => s.getBoundingClientRect().width).flatMap(s =>
  [...s.querySelectorAll('text')].map(t => t.getBoundingClientRect().height).filter(h => h < 12))
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    study = DEMO.read_text(encoding="utf-8")
    origin = Origin(load_study(DEMO), (("study.yaml", study),), "wardround simulate sweep configs/sweeps/demo.yaml")
    return write_report(example_rows(), tmp_path_factory.mktemp("report"), origin)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.parametrize("size", SIZES)
def test_it_opens_quietly_and_asks_for_nothing(browser: Browser, page: Path, size: str) -> None:
    """No message on the console, no error, and the file itself is the only thing that is asked for."""
    browser.open(page, SIZES[size])
    assert browser.said == []
    assert browser.requests == [page.as_uri()]


def test_the_collector_would_notice(browser: Browser, tmp_path: Path) -> None:
    """A page with an error, a blocked image and a blocked script is found out: the tests above are not blind."""
    policy = "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\">"
    blocked = tmp_path / "blocked.html"
    blocked.write_text(f"{policy}<img src='http://127.0.0.1:9/x.png'><script>1</script>", encoding="utf-8")
    browser.open(blocked)
    assert any("Content Security Policy" in message for message in browser.said)
    open_page = tmp_path / "open.html"
    open_page.write_text("<img src='http://127.0.0.1:9/x.png'><script>nothing.here</script>", encoding="utf-8")
    browser.open(open_page)
    assert "http://127.0.0.1:9/x.png" in browser.requests
    assert any("nothing is not defined" in message for message in browser.said)


@pytest.mark.parametrize("width", [320, 360, 600, 768, 1280])
def test_nothing_scrolls_sideways(browser: Browser, page: Path, width: int) -> None:
    """From 320 px up the page is never wider than the window; wide tables scroll inside themselves."""
    browser.open(page, (width, 800))
    assert browser.ask("innerWidth") == width
    assert browser.ask("document.documentElement.scrollWidth") == width
    assert browser.ask(TOO_WIDE) == []


@pytest.mark.parametrize("size", SIZES)
def test_every_figure_is_drawn_and_can_be_read(browser: Browser, page: Path, size: str) -> None:
    """Each figure shows one drawing with lines, nothing of it is cut off or covered, and its words are not tiny."""
    browser.open(page, SIZES[size])
    shown = browser.ask(
        "[...document.querySelectorAll('figure:not(.listing)')].map(f => [...f.querySelectorAll('svg.chart')]"
        ".filter(s => s.getBoundingClientRect().height > 200 && s.querySelector('.marker').getBBox().width > 0).length)"
    )
    assert len(shown) >= 4
    assert shown == [1] * len(shown)
    assert browser.ask(CUT_OFF) == []
    assert browser.ask(OVERLAPPING) == []
    assert browser.ask(SMALL_TEXT) == []


def test_by_keyboard(browser: Browser, page: Path) -> None:
    """The first Tab shows the skip link, Enter leads to the content, and whatever has the focus shows it."""
    browser.open(page)
    browser.press("Tab", 9)
    assert browser.ask("document.activeElement.className") == "skip"
    assert browser.ask("document.activeElement.getBoundingClientRect().left") >= 0
    browser.press("Enter", 13)
    assert browser.ask("location.hash") == "#content"
    assert browser.ask("document.activeElement.id") == "content"
    reached = set()
    for _ in range(40):
        browser.press("Tab", 9)
        reached.add(browser.ask("document.activeElement.getAttribute('aria-labelledby') || ''"))
        style = "getComputedStyle(document.activeElement)"
        assert browser.ask(f"document.activeElement === document.body || parseFloat({style}.outlineWidth) >= 2")
    wanted = browser.ask("[...document.querySelectorAll('.scroll, pre')].map(e => e.getAttribute('aria-labelledby'))")
    assert set(wanted) <= reached


def test_read_aloud(browser: Browser, page: Path) -> None:
    """The browser's accessibility tree has the landmarks, and every figure, image, table and region has a name."""
    browser.open(page)
    nodes: list[dict[str, Any]] = browser("Accessibility.getFullAXTree")["nodes"]
    spoken: dict[str, list[str]] = {}
    described = []
    for node in nodes:
        if not node.get("ignored"):
            role = node["role"]["value"]
            spoken.setdefault(role, []).append(node.get("name", {}).get("value", ""))
            if role in ("image", "img"):
                described.append(node.get("description", {}).get("value", ""))
    for landmark in ("banner", "navigation", "main", "contentinfo"):
        assert len(spoken[landmark]) == 1
    for role in ("figure", "table", "region", "link", "heading"):
        assert spoken[role]
        assert all(spoken[role]), role
    assert len(described) >= 4
    assert all(text.startswith("Line chart.") for text in described)
    assert len(spoken["columnheader"]) > 20
    assert len(spoken["rowheader"]) > 20


def test_in_the_dark_and_with_contrast(browser: Browser, page: Path) -> None:
    """With a dark scheme the ground is dark and the text light, drawings included."""
    browser.open(page, dark=True)
    ground = browser.ask("getComputedStyle(document.body).backgroundColor")
    text = browser.ask("getComputedStyle(document.querySelector('svg .letter')).fill")
    assert (brightness(ground) < 60, brightness(text) > 200) == (True, True)


def test_on_paper(browser: Browser, page: Path, tmp_path: Path) -> None:
    """Printed, the page is light even in dark mode, without contents list, and no table or listing is cut off."""
    browser.open(page, (1280, 900), dark=True)
    browser("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    browser.resize((794 - 106, 1123))  # A4 at 96 dpi without its margins
    assert brightness(browser.ask("getComputedStyle(document.body).backgroundColor")) == 255
    assert browser.ask("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert browser.ask("document.documentElement.scrollWidth <= innerWidth")
    every = "[...document.querySelectorAll('table, pre, svg.wide')]"
    cut = f"{every}.filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
    assert browser.ask(f"{cut}.map(e => e.id || e.className.baseVal)") == []
    assert browser.print(tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")


def brightness(colour: str) -> float:
    """Mean of the channels of a CSS rgb() colour."""
    channels = [float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    return sum(channels) / 3
