"""A row: one finished run of a sweep as plain numbers, with everything that is needed to make it again.

A row is stored as JSON, one file each, and is all that tables, figures and reports read. It holds aggregates only:
no patient, no identifier, no prediction. Neither torch nor Flower is imported here, so that a report starts fast.

Decisions a reader would question:

- A number that does not exist is None, never NaN or infinity, which JSON does not have: `epsilon` is None for a run
  without privacy, an interval's ends where a site has too few patients for one.
- A subgroup with fewer than MIN_EVENTS positives, or negatives, is masked here and not in the report: what is not in
  the row cannot be shown by mistake.
- `settings` says what this row differs in from the sweep's study (dotted keys), `terms` what the line then made of it:
  tables group by the former, and the digest alone says that two rows are the same study.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from common.errors import ConfigurationError, DataError
from common.privacy.plan import Plan
from common.scores import MIN_EVENTS as MIN_EVENTS
from common.scores import Bin as Bin
from common.scores import CalibrationRow as CalibrationRow
from common.scores import Estimate as Estimate

VERSION = 1
JOBS, ROWS = "jobs.json", "rows"  # in a sweep's folder (simulations/sweep_folder.py): names of rows in order, and rows
POOLED = "pooled"  # the `site` of all held-out patients together
Setting = str | int | float | bool | None


@dataclass(frozen=True)
class SiteRow:
    """The final weights on one site's held-out patients; `site` is `pooled` for those of all scored sites.

    Attributes:
        declared_patients: public training size; of a site that did not train (left out) 0, of `pooled` the sum.
        patients: held-out patients.
        positives: held-out sequences with the label, out of `sequences`.
        best_possible: AUROC that no model can beat on these patients, where the records are synthetic.
    """

    site: str
    declared_patients: int
    patients: int
    sequences: int
    positives: int
    auroc: Estimate
    auprc: Estimate
    brier: Estimate
    best_possible: float | None = None


@dataclass(frozen=True)
class Subgroup:
    """AUROC in a group of held-out patients of all sites.

    Attributes:
        attribute: `sex`, `age`, or whatever the sweep file calls it.
        group: such as `female` or `60-74`.
        patients, events, auroc: all None where events or non-events are fewer than MIN_EVENTS.
    """

    attribute: str
    group: str
    patients: int | None
    events: int | None
    auroc: Estimate | None


@dataclass(frozen=True)
class RoundRow:
    """Pooled AUROC after a round, and the largest epsilon any site had spent by then (None: no privacy)."""

    round: int
    auroc: float
    epsilon: float | None


@dataclass(frozen=True)
class Traffic:
    """Bytes of a round's message content between the server and one site; 0 where nothing is sent."""

    down: int
    up: int


@dataclass(frozen=True)
class Row:
    """One line at one epsilon, one setting and one seed.

    Attributes:
        line: what is drawn: `fedavg-one-step`, `pooled-private`, `alone: north`, ... (simulations/lines.py).
        study: name of the study that was run.
        settings: what the sweep changed in its study for this row: dotted key -> value; epsilon and seed are not here.
        terms: further facts about how this line was trained, such as the candidate that was chosen.
        epsilon: the budget on the curve's axis, per patient and site; None without privacy, and for lines that do
            not depend on it.
        spent: what the admitted plan costs, PLD epsilon rounded up by the accountant; None without privacy.
        delta, seed: of the budget; of records, starting weights, sampling and noise.
        plan: of every site; None for lines without a private plan.
        weighting: `precision`, `declared`, `uniform`, or None where nothing is averaged.
        weights: public weight of each training site; sums to 1.
        sites: per scored site, `pooled` last.
        bytes_per_round: per training site; parameters: trained numbers.
        seconds: wall-clock of this row; cpu_seconds: processor time. Neither is part of `identity`.
        study_digest, code_digest: of the terms; of every Python file of the four rooms.
        versions: of Python and the libraries that numbers depend on.
        research_mode: the data were treated as public: real records, scored freely.
    """

    line: str
    study: str
    settings: dict[str, Setting]
    terms: dict[str, Setting]
    epsilon: float | None
    spent: float | None
    delta: float
    seed: int
    plan: Plan | None
    weighting: str | None
    weights: dict[str, float]
    sites: tuple[SiteRow, ...]
    calibration: CalibrationRow | None
    subgroups: tuple[Subgroup, ...]
    rounds: tuple[RoundRow, ...]
    bytes_per_round: dict[str, Traffic]
    parameters: int
    seconds: float
    cpu_seconds: float
    study_digest: str
    code_digest: str
    versions: dict[str, str]
    research_mode: bool
    version: int = VERSION

    def site(self, name: str = POOLED) -> SiteRow:
        """The scores on a site's held-out patients. Raises KeyError for a site that was not scored."""
        found = next((site for site in self.sites if site.site == name), None)
        if found is None:
            raise KeyError(name)
        return found

    def identity(self) -> dict[str, Any]:
        """Everything but the time it took: equal for two runs of the same row."""
        return {key: value for key, value in self.to_json().items() if key not in ("seconds", "cpu_seconds")}

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps(..., allow_nan=False)`; tuples become lists."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self), allow_nan=False))
        return plain

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """The row that `to_json` wrote. Raises DataError for another version or other keys."""
        if data.get("version") != VERSION:
            raise DataError(f"a row of version {data.get('version')}, this wardround reads {VERSION}; run it again")
        if set(data) != {field.name for field in fields(cls)}:
            raise DataError("a row with missing or unknown keys; it was damaged or edited: remove it and run it again")
        plan, calibration = data["plan"], data["calibration"]
        try:
            return cls(
                **{
                    **data,
                    "plan": None if plan is None else Plan(**plan),
                    "sites": tuple(_site(site) for site in data["sites"]),
                    "calibration": None
                    if calibration is None
                    else CalibrationRow(**{**calibration, "bins": tuple(Bin(**part) for part in calibration["bins"])}),
                    "subgroups": tuple(
                        Subgroup(**{**group, "auroc": _estimate(group["auroc"])}) for group in data["subgroups"]
                    ),
                    "rounds": tuple(RoundRow(**each) for each in data["rounds"]),
                    "bytes_per_round": {site: Traffic(**each) for site, each in data["bytes_per_round"].items()},
                }
            )
        except (TypeError, KeyError, AttributeError):
            raise DataError("a row with missing or unknown keys; it was damaged: remove it and run it again") from None


def load_rows(out: Path) -> list[Row]:
    """The finished rows of a sweep's folder, in the order of its tables; fewer than all while it runs.

    Raises:
        ConfigurationError: `out` is no sweep's folder.
        DataError: a damaged row.
    """
    try:
        names = json.loads((out / JOBS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigurationError(f"{out}: no folder of a sweep; name the --out of `wardround simulate sweep`") from None
    return [read_row(out / ROWS / name) for name in names if (out / ROWS / name).is_file()]


def read_row(path: Path) -> Row:
    """The row in a file. Raises DataError with its path."""
    try:
        return Row.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: not a row ({type(error).__name__}); remove the file and run the sweep again"
        ) from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _site(data: Mapping[str, Any]) -> SiteRow:
    metrics = {name: Estimate(**data[name]) for name in ("auroc", "auprc", "brier")}
    return SiteRow(**{**data, **metrics})


def _estimate(data: Mapping[str, Any] | None) -> Estimate | None:
    return None if data is None else Estimate(**data)
