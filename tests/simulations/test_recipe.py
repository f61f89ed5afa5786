"""Recipes and presets: fixed settings, and refusals that name value and bound."""

from __future__ import annotations

from typing import Any

import pytest

from common.errors import ConfigurationError
from simulations.recipe import PRESETS, Preset, SiteRecipe, find_preset


def test_medium_is_the_measured_setting() -> None:
    """`medium` has the four hospitals on which the default plan was measured: 8,800 patients."""
    medium = find_preset("medium")
    assert [site.name for site in medium.sites] == ["north", "east", "south", "west"]
    assert [site.patients for site in medium.sites] == [4000, 2500, 1500, 800]
    assert [site.prevalence for site in medium.sites] == [0.12, 0.22, 0.06, 0.15]
    assert medium.signal == 1.4
    assert medium.held_out_ratio == 2


def test_twelve_has_many_small_hospitals() -> None:
    """`twelve` has 12 hospitals of 307 to 2,439 patients, 10,994 in all."""
    sizes = [site.patients for site in find_preset("twelve").sites]
    assert (len(sizes), min(sizes), max(sizes), sum(sizes)) == (12, 307, 2439, 10_994)


def test_easy_and_hard_are_sites_of_the_same_names() -> None:
    """Presets easy, medium and hard have the same four hospitals by name; hard has a quarter of the patients."""
    easy, medium, hard = (find_preset(name) for name in ("easy", "medium", "hard"))
    assert [[site.name for site in preset.sites] for preset in (easy, hard)] == [[s.name for s in medium.sites]] * 2
    assert [sum(site.patients for site in preset.sites) for preset in (easy, medium, hard)] == [8800, 8800, 2200]


def test_recorded_prevalence_includes_recording_errors() -> None:
    """The share of labels is prevalence (1 - missed) + (1 - prevalence) false."""
    east = find_preset("medium").sites[1]
    assert east.recorded_prevalence == pytest.approx(0.22 * 0.95 + 0.78 * 0.01)


def test_an_unknown_preset_is_refused_with_the_nearest_name() -> None:
    """A typing error is answered with the nearest preset, anything else with all of them."""
    with pytest.raises(ConfigurationError, match="did you mean `medium`"):
        find_preset("medum")
    with pytest.raises(ConfigurationError, match=", ".join(PRESETS)):
        find_preset("zzz")


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "../north"},
        {"name": ""},
        {"patients": 0},
        {"prevalence": 0.0},
        {"prevalence": float("nan")},
        {"visit_frequency": 0.0},
        {"visit_frequency": 5.0},
        {"shift": float("inf")},
        {"missed_label_rate": 0.5},
        {"false_label_rate": -0.1},
        {"code_rotation": -1},
        {"local_code_share": 1.1},
        {"measurement_frequency": 0.0},
        {"measurement_frequency": float("nan")},
        {"female_share": -0.1},
    ],
)
def test_a_recipe_out_of_range_is_refused_by_name(wrong: dict[str, Any]) -> None:
    """Every field has a bound; the message names the field and its value."""
    ((field, value),) = wrong.items()
    with pytest.raises(ConfigurationError, match=field) as error:
        SiteRecipe(**{"name": "north", "patients": 10, "prevalence": 0.1, **wrong})
    assert str(value) in str(error.value)


def test_a_preset_needs_sites_with_names_of_their_own() -> None:
    """No site, or two sites of one name (they would share a folder), is refused."""
    site = SiteRecipe("north", 10, 0.1)
    for sites in ((), (site, site)):
        with pytest.raises(ConfigurationError, match="each with its own name"):
            Preset("mine", sites)
