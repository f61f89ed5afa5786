"""The page on too-small epsilons: each figure that it prints is computed anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.common.privacy.designs import DESIGNS, Design, ours, renyi

PAGE = Path(__file__).resolve().parents[3] / "docs" / "why-this-epsilon-differs.md"

no_advice = pytest.mark.filterwarnings("ignore:Optimal order is the:UserWarning:opacus")  # on its own orders


def rows_of_the_page() -> list[list[str]]:
    """The cells of the table's rows, without its head."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_page_has_a_row_for_each_design() -> None:
    """Design, settings and reason are printed as they stand in tests/common/privacy/designs.py, in that order."""
    assert [[d.design, d.settings, d.why] for d in DESIGNS] == [[r[0], r[1], r[4]] for r in rows_of_the_page()]


@no_advice
@pytest.mark.parametrize(
    ("row", "design"), list(enumerate(DESIGNS)), ids=[f"{d.design}: {d.settings}"[:60] for d in DESIGNS]
)
def test_the_page_prints_what_is_computed(row: int, design: Design) -> None:
    """What a design prints, and what its training costs, to the digits printed; the second is larger."""
    _, _, printed, costs, _ = rows_of_the_page()[row]
    assert design.printed() == pytest.approx(float(printed), abs=0.0051)
    assert design.costs() == pytest.approx(float(costs), abs=0.0051)
    assert float(printed) < float(costs)


def test_the_difference_is_not_the_accountant() -> None:
    """FL4Health's own accountant, without the client rate, charges even more than ours: its 2.21 is not its method."""
    rate, batches, delta = 64 / 2000, 32, 1 / 6000
    assert ours(rate, 1.0, 10 * batches, delta) < renyi(rate, 1.0, 10 * batches, delta) == pytest.approx(3.42, abs=0.01)
    assert ours(rate, 1.0, 7 * batches, delta) > 2.21  # nor does it hold for a site drawn in 7 rounds of the 10
