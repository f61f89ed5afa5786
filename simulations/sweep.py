"""A sweep: one study over a grid of settings, budgets, lines and seeds, written out as a list of jobs.

    version: 1
    name: demo
    study: ../demo.yaml                          # relative to this file
    lines: [fedavg-one-step, logistic, ...]      # simulations/lines.py
    epsilon: [1, 3, 8, none]
    seeds: [0, 1, 2]
    grid: {model.cell: [gru, lstm]}              # dotted keys of the study x values
    partition: [{by: label, sites: 4, alpha: 0.3}]
    sites: [[north, east]]                       # some of the study's sites
    leave_out: each                              # train on the other sites, score everybody of the one left out

What a value of these axes becomes stands in `planning.py`. A seed is the same for every line, epsilon and setting:
starting weights, who is sampled and the noise stream are shared (common random numbers), so that differences between
lines are firmer than their spread over seeds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from common.study import Name
from common.terms import Terms, load
from simulations.scoring import Grouping

OWN_AXES = {"privacy.epsilon": "epsilon", "simulation.seed": "seeds", "sites": "sites", "quorum": "sites"}
NONE = "none"
Epsilon = Annotated[float, Field(gt=0)] | Literal["none"]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Sweep(Terms):
    """A sweep file; see the module docstring.

    resamples: bootstrap resamples behind each interval.
    scored_rounds: after so many rounds, evenly spaced, the pooled AUROC is taken for a figure; 0: final weights only.
    subgroups: how held-out patients are grouped, by name of the attribute.
    """

    version: Literal[1]
    name: Name
    study: str
    lines: tuple[str, ...] = Field(min_length=1)
    epsilon: tuple[Epsilon, ...] = Field(min_length=1)
    seeds: tuple[Seed, ...] = Field(min_length=1)
    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    partition: tuple[dict[str, Any], ...] = ()
    sites: tuple[tuple[str, ...], ...] = ()
    leave_out: tuple[str, ...] | Literal["each"] = ()
    resamples: int = Field(default=200, ge=1, le=100_000)
    scored_rounds: int = Field(default=10, ge=0, le=1000)
    subgroups: dict[str, Grouping] = Field(default_factory=dict)

    @field_validator("lines", "epsilon", "seeds", "partition", "sites")
    @classmethod
    def _distinct(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if len({json.dumps(value) for value in values}) < len(values):
            raise ValueError("a value stands there twice; keep one")
        return values

    @field_validator("grid")
    @classmethod
    def _free_keys(cls, grid: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        for key, values in grid.items():
            if key in OWN_AXES or key.split(".")[0] in OWN_AXES:
                raise ValueError(f"`{key}` is no key of the grid; use `{OWN_AXES.get(key, 'sites')}` of the sweep")
            if not values or len({json.dumps(value) for value in values}) < len(values):
                raise ValueError(f"`{key}` needs one or more values, each once")
        return grid


def load_sweep(file: Path) -> Sweep:
    """Read a sweep file. Raises ConfigurationError."""
    return load(file, Sweep)
