"""A hospital's evaluation in a real browser: on a phone, on a desktop, in the dark. As tests/browser/test_report.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from client.prediction.asked import Asked
from client.prediction.evaluation import evaluate
from client.prediction.groups import by_name
from client.prediction.page import page
from common.report.html import render
from common.schema import FeatureSchema
from common.sequences import Sequences
from common.terms import load
from tests.browser.chromium import DESKTOP, PHONE, Browser, find_chromium
from tests.browser.test_report import CUT_OFF, OVERLAPPING, SMALL_TEXT, TOO_WIDE
from tests.client.hospitals import CONFIGS

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed (apt-get install chromium)")
SIZES = {"phone": PHONE, "desktop": DESKTOP}
CASES = {"usual": (600, 0.15), "rare": (600, 0.02), "frequent": (600, 0.7), "few": (12, 0.2)}


def made_up(patients: int, prevalence: float) -> tuple[Asked, np.ndarray]:  # type: ignore[type-arg]  # of floats
    """Two predictions of each patient, with a risk that knows something."""
    random = np.random.default_rng(0)
    owner = np.repeat(np.arange(patients), 2)
    logit = random.normal(np.log(prevalence / (1 - prevalence)), 1.2, len(owner))
    risk = 1 / (1 + np.exp(-logit))
    label = (random.random(len(owner)) < risk).astype(np.float32)
    label[:2] = 0, 1
    steps = len(owner)
    sequences = Sequences(
        patient_id=np.arange(patients),
        patient=owner,
        start=np.arange(steps + 1),
        values=np.zeros((steps, 6), np.float32),
        measured=np.zeros((steps, 6), bool),
        gap=np.zeros(steps, np.float32),
        codes=np.zeros(0, np.int64),
        code_start=np.zeros(steps + 1, np.int64),
        statics=np.stack([random.normal(0, 1, steps), random.integers(0, 2, steps)], axis=1).astype(np.float32),
        label=label,
        prediction_time=np.zeros(steps, "datetime64[us]"),
    )
    return Asked(sequences, np.ones(steps, bool), np.ones(steps, bool)), risk


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    schema = load(CONFIGS / "features" / "synthetic.yaml", FeatureSchema)
    folder = tmp_path_factory.mktemp("pages")
    for name, (patients, prevalence) in CASES.items():
        asked, risk = made_up(patients, prevalence)
        found = evaluate(schema, by_name(schema), asked, risk, threshold=prevalence, resamples=20)
        facts = [("site", "north"), ("weights, sha256 of the file", "0123456789abcdef" * 4)]
        (folder / f"{name}.html").write_text(render(page("Predictions at north", found, facts)), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in CASES}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_it_is_readable_and_asks_for_nothing(browser: Browser, pages: dict[str, Path], case: str, size: str) -> None:
    """Nothing on the console, no request, nothing wider than the page, no words cut off, on one another or tiny."""
    browser.open(pages[case], SIZES[size], dark=case == "rare")
    assert browser.said == []
    assert browser.requests == [pages[case].as_uri()]
    for fault in (TOO_WIDE, CUT_OFF, OVERLAPPING, SMALL_TEXT):
        assert browser.ask(fault) == [], fault
