"""What makes one virtual hospital differ from another, and the named sets of hospitals.

`medium` and `twelve` are the settings on which the default plan and every accuracy goal of wardround were
measured; their numbers are fixed, because a curve is comparable only with curves of the same hospitals. `easy` is
for curves that should not lie flat at small epsilon, `hard` for what goes wrong in practice (docs/cohort.md).
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from common.errors import ConfigurationError


@dataclass(frozen=True)
class SiteRecipe:
    """One virtual hospital: its size, its patients and its habits.

    Attributes:
        name: Lower-case word; also the site's folder.
        patients: Training patients at scale 1.
        prevalence: P(disease) over the site's patients, before recording errors.
        shift: Moves age (4 years per unit) and the level of vitals (.15 per unit).
        visit_frequency: Visits relative to the usual nine in two years; also raises what is measured.
        missed_label_rate: P(label 0 | disease).
        false_label_rate: P(label 1 | no disease).
        code_rotation: By how many places the rarer codes are rotated (coding habit).
        local_code_share: Share of the common codes that are written by a local code of the hospital's own (coding
            habit): `CODE//12.1` for `CODE//12`.
        measurement_frequency: Odds of measuring a vital at a visit, relative to the usual.
        female_share: P(female).
    """

    name: str
    patients: int
    prevalence: float
    shift: float = 0.0
    visit_frequency: float = 1.0
    missed_label_rate: float = 0.0
    false_label_rate: float = 0.0
    code_rotation: int = 0
    local_code_share: float = 0.0
    measurement_frequency: float = 1.0
    female_share: float = 0.5

    def __post_init__(self) -> None:
        where = f"site recipe {self.name!r}"
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", self.name):
            raise ConfigurationError(f"{where}: name must be a lower-case word, it becomes a folder")
        if self.patients < 1:
            raise ConfigurationError(f"{where}: patients={self.patients} must be at least 1")
        if not 0 < self.prevalence < 1:
            raise ConfigurationError(f"{where}: prevalence={self.prevalence} must lie between 0 and 1")
        if not 0 < self.visit_frequency <= 4:
            raise ConfigurationError(f"{where}: visit_frequency={self.visit_frequency} must lie in (0, 4]")
        if not abs(self.shift) <= 5:
            raise ConfigurationError(f"{where}: shift={self.shift} must lie in [-5, 5]")
        for rate in ("missed_label_rate", "false_label_rate"):
            if not 0 <= getattr(self, rate) < 0.5:
                raise ConfigurationError(f"{where}: {rate}={getattr(self, rate)} must lie in [0, 0.5)")
        if self.code_rotation < 0:
            raise ConfigurationError(f"{where}: code_rotation={self.code_rotation} must not be negative")
        if not 0 < self.measurement_frequency <= 10:
            raise ConfigurationError(f"{where}: measurement_frequency={self.measurement_frequency} must lie in (0, 10]")
        for share in ("local_code_share", "female_share"):
            if not 0 <= getattr(self, share) <= 1:
                raise ConfigurationError(f"{where}: {share}={getattr(self, share)} must lie in [0, 1]")

    @property
    def recorded_prevalence(self) -> float:
        """P(label = 1) at this site, recording errors included."""
        return self.prevalence * (1 - self.missed_label_rate) + (1 - self.prevalence) * self.false_label_rate


@dataclass(frozen=True)
class Preset:
    """A named set of virtual hospitals.

    Attributes:
        name: What a person types.
        sites: The hospitals; a site's place is part of its random key, so append, never insert.
        signal: Strength of the label mechanism, a factor on the whole score; 1.4 allows an AUROC of about
            .865.
        order: Strength of the terms that need the order of events, a factor on these alone.
        held_out_ratio: Held-out patients per training patient, from the same site.
    """

    name: str
    sites: tuple[SiteRecipe, ...]
    signal: float = 1.4
    order: float = 1.0
    held_out_ratio: float = 2.0

    def __post_init__(self) -> None:
        names = [site.name for site in self.sites]
        if not names or len(set(names)) < len(names):
            raise ConfigurationError(f"preset {self.name!r}: sites {names} must be one or more, each with its own name")


# fmt: off
PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        # As `medium`, with a stronger label of which less depends on order, similar hospitals, hardly any errors.
        #      name     patients prevalence shift visits missed false rotation
        Preset("easy", (
            SiteRecipe("north", 4000, 0.15,  0.0, 1.0, 0.00, 0.00,  0),
            SiteRecipe("east",  2500, 0.20,  0.4, 1.2, 0.00, 0.00,  0),
            SiteRecipe("south", 1500, 0.12, -0.3, 0.8, 0.00, 0.00, 20),
            SiteRecipe("west",   800, 0.18,  0.2, 1.0, 0.02, 0.00,  0),
        ), signal=2.2, order=0.5),
        # Four hospitals of unequal size and habit: 8,800 training patients.
        #      name     patients prevalence shift visits missed false rotation
        Preset("medium", (
            SiteRecipe("north", 4000, 0.12,  0.0, 1.0, 0.00, 0.00,  0),
            SiteRecipe("east",  2500, 0.22,  0.8, 1.5, 0.05, 0.01,  0),
            SiteRecipe("south", 1500, 0.06, -0.5, 0.7, 0.00, 0.00, 60),
            SiteRecipe("west",   800, 0.15,  0.3, 1.0, 0.10, 0.02, 20),
        )),
        # A quarter of the patients, and hospitals that code, measure and err differently: 2,200 training patients.
        #      name     patients prevalence shift visits missed false rotation local measured female
        Preset("hard", (
            SiteRecipe("north", 1000, 0.12,  0.0, 1.0, 0.05, 0.01,   0, 0.0, 1.0, 0.50),
            SiteRecipe("east",   600, 0.20,  1.0, 1.5, 0.10, 0.02,   0, 0.5, 1.5, 0.45),
            SiteRecipe("south",  400, 0.06, -0.8, 0.7, 0.05, 0.00,  60, 0.0, 0.6, 0.60),
            SiteRecipe("west",   200, 0.15,  0.5, 1.0, 0.15, 0.03, 120, 1.0, 1.0, 0.50),
        ), order=1.2),
        # Many small hospitals: 10,994 training patients, the smallest 307.
        Preset("twelve", (
            SiteRecipe("site-01",  443, 0.12,  0.64, 1.0, 0.00, 0.01, 60),
            SiteRecipe("site-02",  307, 0.22, -0.03, 1.2, 0.00, 0.01, 20),
            SiteRecipe("site-03",  652, 0.18, -0.29, 0.7, 0.05, 0.00,  0),
            SiteRecipe("site-04", 1042, 0.22, -0.24, 1.0, 0.05, 0.00, 60),
            SiteRecipe("site-05", 1720, 0.12, -0.10, 0.7, 0.05, 0.01,  0),
            SiteRecipe("site-06",  838, 0.06, -0.52, 1.5, 0.00, 0.00, 20),
            SiteRecipe("site-07",  527, 0.12, -0.42, 1.0, 0.05, 0.00,  0),
            SiteRecipe("site-08",  448, 0.22, -0.54, 0.7, 0.00, 0.00, 20),
            SiteRecipe("site-09", 1311, 0.18,  0.29, 1.0, 0.05, 0.00,  0),
            SiteRecipe("site-10", 2439, 0.12, -0.44, 1.2, 0.05, 0.00, 20),
            SiteRecipe("site-11",  940, 0.22, -0.09, 0.7, 0.00, 0.01, 60),
            SiteRecipe("site-12",  327, 0.06, -0.47, 1.0, 0.00, 0.01, 60),
        )),
    )
}
# fmt: on


def find_preset(name: str) -> Preset:
    """The preset of this name. Raises ConfigurationError naming the nearest or all known names."""
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"did you mean `{near[0]}`?" if near else f"known presets: {', '.join(PRESETS)}"
    raise ConfigurationError(f"unknown preset `{name}`; {hint}")
