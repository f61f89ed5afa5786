"""The site file: pins a study, names a budget, and is refused when either does not hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from client.site_file import load_site_file
from common.errors import ConfigurationError

EXAMPLE = Path(__file__).resolve().parents[2] / "configs" / "sites" / "north.yaml"


def changed(folder: Path, **changes: object) -> Path:
    """The example with some keys changed, in `folder`."""
    terms = yaml.safe_load(EXAMPLE.read_text()) | {"study": str(EXAMPLE.parent.parent / "demo.yaml")} | changes
    (folder / "site.yaml").write_text(yaml.safe_dump(terms))
    return folder / "site.yaml"


def test_the_shipped_example_pins_the_shipped_study() -> None:
    """configs/sites/north.yaml loads and pins configs/demo.yaml as it is."""
    site, study = load_site_file(EXAMPLE)
    assert site.site in study.sites
    assert site.study_digest == study.digest()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"study_digest": "0" * 64}, "study_digest pins 000000000000"),
        ({"study_digest": "short"}, "study_digest"),
        ({"site": "nowhere"}, "`nowhere` is not in the study"),
        ({"budget": {"max_epsilon": 1.0, "delta": 1e-5}}, "asks for epsilon 3.0, this site allows 1.0"),
        ({"budget": {"max_epsilon": 3.0, "delta": 1e-6}}, "delta 1e-05 exceeds this site's 1e-06"),
        ({"recordz": "x"}, "did you mean `records`"),
        ({"budget": {"max_epsilon": -1.0, "delta": 1e-5}}, "max_epsilon"),
    ],
)
def test_a_site_file_that_does_not_hold_is_refused(changes: dict[str, object], expected: str, tmp_path: Path) -> None:
    """Another study, a foreign site, a study beyond the site's budget and a typing error are one clear error each."""
    with pytest.raises(ConfigurationError, match=expected):
        load_site_file(changed(tmp_path, **changes))
