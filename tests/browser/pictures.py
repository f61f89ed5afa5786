"""Pictures of a report for the docs, on a phone and on a desktop.

    python -m tests.browser.pictures FOLDER docs/images

FOLDER holds a report.html (`wardround simulate report`). Also writes report.pdf beside it, to look at the paper.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.browser.chromium import DESKTOP, PHONE, Browser


def take(folder: Path, images: Path) -> None:
    """report-phone.png: how the page begins; report-desktop.png: its curve."""
    images.mkdir(parents=True, exist_ok=True)
    # The browser may still be writing to its profile when it is stopped.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, Browser(Path(profile)) as browser:
        browser.open(folder / "report.html", PHONE)
        browser.picture(images / "report-phone.png")
        browser.open(folder / "report.html", DESKTOP)
        browser.ask("document.querySelector('#accuracy h2').scrollIntoView()")
        browser.picture(images / "report-desktop.png")
        browser.print(folder / "report.pdf")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python -m tests.browser.pictures FOLDER IMAGES")
    take(Path(sys.argv[1]), Path(sys.argv[2]))
