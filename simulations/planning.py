"""From a sweep to its jobs: every axis turns a setup into several, every line and budget of a setup is a job.

Decisions a reader would question:

- A line that does not depend on epsilon is one job per seed and setting, not one per epsilon.
- `privacy.clip: typical` stands for the rule of simulations/typical.py, applied after the other settings: the clip
  that suits one network may not suit another.
- Jobs are sorted by seed: a process that reads a seed's records serves all of its lines.
- Every job is made, and every plan computed, before the first one runs: what cannot be run is refused at once.
- A job's key leaves out the code. Rows of other code are not silently made again, nor mixed: see `sweep_folder.py`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from common.errors import ConfigurationError
from common.schema import HELD_OUT, SPLITS
from common.study import Study, load_study
from common.terms import parse
from simulations.cohort import true_tasks
from simulations.lines import SWEEP_LINES, How, Line, sweep_lines
from simulations.overrides import override
from simulations.prepared import described, prepare
from simulations.rows import Setting
from simulations.scoring import Grouping, check_groupings
from simulations.sweep import NONE, Sweep
from simulations.typical import typical_clip

CLIP, TYPICAL = "privacy.clip", "typical"
LOGISTIC_SHARE = 0.3  # of a recurrent network's step
FREE_SHARE = {How.POOLED_FREE: 3.0, How.FEDERATED_FREE: 2.6}  # candidates on a part, then the final training
SCORING = 6.0  # passes over the training records that reading and scoring cost


@dataclass(frozen=True)
class Setup:
    """A study under some settings, with its records: what lines and budgets are drawn for.

    Attributes:
        study: its sites are those that train.
        settings: what the sweep changed, as the rows will say.
        directories: MEDS directory of every site that trains or is scored.
        scored: sites on whose held-out patients is scored.
        records: fingerprint of real records; "" for synthetic ones, which follow from study and seed.
        splits: which patients of the scored sites are held out: all of a site that is left out.
    """

    study: Study
    settings: dict[str, Setting] = field(default_factory=dict)
    directories: dict[str, Path] = field(default_factory=dict)
    scored: tuple[str, ...] = ()
    records: str = ""
    splits: tuple[str, ...] = (HELD_OUT,)


@dataclass(frozen=True)
class Job:
    """One row to be: everything that its numbers follow from, and nothing else.

    Attributes:
        line: what is trained, and how.
        setup: the study before it became a line, at this job's epsilon, and its records.
        epsilon: the place on the curve; None where nothing is private or epsilon has no influence.
        seed: of everything random.
        resamples, scored_rounds, subgroups: as in the sweep.
    """

    line: Line
    setup: Setup
    epsilon: float | None
    seed: int
    resamples: int
    scored_rounds: int
    subgroups: dict[str, Grouping]

    @cached_property
    def key(self) -> str:
        """Hash of everything that the row's numbers follow from, apart from the code."""
        facts = {
            "line": [self.line.name, self.line.how],
            "studies": [study.digest(without=frozenset()) for study in (self.line.study, self.setup.study)],
            "settings": self.setup.settings,
            "epsilon": self.epsilon,
            "seed": self.seed,
            "records": [self.setup.records, self.setup.scored, self.setup.splits],
            "measured": [self.resamples, self.scored_rounds],
            "subgroups": {name: grouping.model_dump(mode="json") for name, grouping in self.subgroups.items()},
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def file_name(self) -> str:
        """Readable, and distinct for distinct jobs."""
        line = self.line.name.replace(": ", "-")
        return f"{line}_epsilon-{shown_epsilon(self.epsilon)}_seed-{self.seed}_{self.key[:16]}.json"

    @property
    def title(self) -> str:
        """One line for a person."""
        settings = "".join(f", {key} {value}" for key, value in self.setup.settings.items())
        return f"{self.line.name}, epsilon {shown_epsilon(self.epsilon)}{settings}, seed {self.seed}"

    @property
    def effort(self) -> float:
        """Rough work, in patients passed through a recurrent network, for the estimate of the time that is left."""
        study = self.line.study
        patients = sum(site.declared_patients for site in self.setup.study.sites.values())
        trained = sum(site.declared_patients for site in study.sites.values())
        steps = study.training.rounds * study.training.local_steps if self.line.trains else 0
        share = (LOGISTIC_SHARE if study.model.cell == "none" else 1.0) * FREE_SHARE.get(self.line.how, 1.0)
        return trained * study.privacy.sampling_rate * steps * share + SCORING * patients


def shown_epsilon(epsilon: float | None) -> str:
    """`3`, `0.5` or `none`."""
    return NONE if epsilon is None else f"{epsilon:g}"


def plan_jobs(sweep: Sweep, file: Path, data: Path | None, out: Path) -> list[Job]:
    """Every job of the sweep, by seed, setting, line and epsilon. Writes the records that it makes below `out`.

    Args:
        sweep: what was read from `file`.
        file: the sweep's own path; its study is named relative to it.
        data: folder with a MEDS directory per site, for a study of real records.
        out: the sweep's folder.

    Raises:
        ConfigurationError, DataError: a setting, line or record that cannot be used.
    """
    study_file = file.parent / sweep.study
    base = load_study(study_file)
    check_groupings(base.features, sweep.subgroups, str(file))
    jobs = []
    for seed in sweep.seeds:
        setups: Iterator[Setup] = iter([Setup(override(base, seed=seed, source=str(file)))])
        setups = (new for setup in setups for new in _grid(sweep, setup, str(file)))
        setups = (new for setup in setups for new in _records(sweep, setup, data, study_file, out))
        setups = (new for setup in setups for new in _sites(sweep, setup, str(file)))
        setups = (new for setup in setups for new in _left_out(sweep, setup, str(file)))
        jobs += [job for setup in setups for job in _jobs(sweep, _clipped(setup, str(file)), seed, str(file))]
    for job in jobs:
        job.line.study.plan()  # refuses what has no plan
    return jobs


def _jobs(sweep: Sweep, setup: Setup, seed: int, where: str) -> Iterator[Job]:
    """The lines and budgets of a setup."""
    for name in sweep.lines:
        for epsilon in _epsilons(sweep, name):
            at_epsilon = replace(setup, study=_changed(setup.study, {"privacy.epsilon": epsilon}, where))
            for line in sweep_lines(at_epsilon.study, name):
                task = at_epsilon.study.task.name
                known = all(task in true_tasks(setup.directories[site]) for site in setup.scored)
                if line.how is How.TRUTH and not known:
                    raise ConfigurationError(
                        f"{where}: lines: `{name}` needs synthetic records, of a task with known chances; remove it"
                    )
                yield Job(line, at_epsilon, epsilon, seed, sweep.resamples, sweep.scored_rounds, sweep.subgroups)


def _epsilons(sweep: Sweep, line: str) -> list[float | None]:
    """The places on the axis at which a line is drawn; `sweep_lines` refuses an unknown one."""
    _, over_epsilon, at_none = SWEEP_LINES.get(line, (None, False, False))
    if not over_epsilon:
        return [None]
    return [None if value == NONE else float(value) for value in sweep.epsilon if value != NONE or at_none]


def _grid(sweep: Sweep, setup: Setup, where: str) -> Iterator[Setup]:
    """Every combination of the grid's values."""
    for values in itertools.product(*sweep.grid.values()):
        chosen = dict(zip(sweep.grid, values, strict=True))
        now = {key: value for key, value in chosen.items() if (key, value) != (CLIP, TYPICAL)}
        shown = {key: _setting(value) for key, value in chosen.items()}
        yield replace(setup, study=_changed(setup.study, now, where), settings=setup.settings | shown)


def _records(sweep: Sweep, setup: Setup, data: Path | None, study_file: Path, out: Path) -> Iterator[Setup]:
    """The study's own sites, or every partition."""
    for spec in sweep.partition or (None,):
        study, directories, mark = prepare(setup.study, spec, data, study_file, out)
        shown: dict[str, Setting] = {} if spec is None else {"partition": described(spec)}
        yield Setup(study, setup.settings | shown, directories, tuple(study.sites), mark)


def _sites(sweep: Sweep, setup: Setup, where: str) -> Iterator[Setup]:
    """All sites, or every listed set of them; the others' patients are neither trained on nor scored."""
    if not sweep.sites:
        yield setup
    for names in sweep.sites:
        study = _with_sites(setup.study, names, where)
        shown = setup.settings | {"sites": "+".join(study.sites)}
        yield replace(setup, study=study, settings=shown, scored=tuple(study.sites))


def _left_out(sweep: Sweep, setup: Setup, where: str) -> Iterator[Setup]:
    """Nobody left out, or one site after the other: the rest trains, all of its patients are scored."""
    if not sweep.leave_out:
        yield setup
        return
    for name in setup.study.sites if sweep.leave_out == "each" else sweep.leave_out:
        rest = [site for site in setup.study.sites if site != name]
        if len(rest) in (0, len(setup.study.sites)):
            raise ConfigurationError(f"{where}: leave_out: `{name}` must be one of two or more sites of the study")
        study = _with_sites(setup.study, rest, where)
        shown = setup.settings | {"leave_out": name}
        yield replace(setup, study=study, settings=shown, scored=(name,), splits=SPLITS)


def _clipped(setup: Setup, where: str) -> Setup:
    """The setup with its own typical clip, where the grid asks for it."""
    if setup.settings.get(CLIP) != TYPICAL:
        return setup
    return replace(setup, study=_changed(setup.study, {CLIP: typical_clip(setup.study)}, where))


def _with_sites(study: Study, names: tuple[str, ...] | list[str], where: str) -> Study:
    """The study with some of its sites."""
    unknown = [name for name in names if name not in study.sites]
    if unknown or not names:
        raise ConfigurationError(f"{where}: sites: `{', '.join(unknown)}` not in {', '.join(study.sites)}")
    terms = {name: study.sites[name].model_dump(mode="json") for name in names}
    return _changed(study, {"sites": terms, "quorum": min(study.quorum, len(names))}, where)


def _changed(study: Study, values: dict[str, Any], where: str) -> Study:
    """The study with some dotted keys set; checked as its file is."""
    data: Any = study.model_dump(mode="json")
    for key, value in values.items():
        *sections, last = key.split(".")
        place = data
        for section in sections:
            place = place.get(section) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise ConfigurationError(f"{where}: grid: the study has no section for `{key}`; write section.key")
        place[last] = value
    return parse(data, Study, where)


def _setting(value: Any) -> Setting:
    """A grid value as a row shows it."""
    return value if isinstance(value, str | int | float | bool) or value is None else json.dumps(value)
