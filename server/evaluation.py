"""The metrics of a finished study: asked for once, estimated, written beside the weights, and told to people.

`evaluation.json` holds the estimates, the noised sum that they follow from, and why sites did not answer. All of it is
noised and charged at the hospitals, so it may be published like the weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.score_histogram import HISTOGRAM
from server.estimates import estimate
from server.files import write_atomically

if TYPE_CHECKING:
    from common.study import Study
    from server.participation import Replies

FILE = "evaluation.json"
NAMES = {"auroc": "AUROC", "auprc": "AUPRC", "slope": "calibration slope", "in_the_large": "calibration in the large"}
COVERS = (
    "95 % intervals cover the hospitals' noise and the chance of who became a patient; held-out patients of these "
    "hospitals, each counting once; the score as its bins see it"
)


def evaluation(study: Study, replies: Replies) -> dict[str, Any]:
    """What is written: estimates (None if no site answered), what they cover, and why other sites did not answer."""
    assert study.metrics is not None
    told = {site: arrays[HISTOGRAM] for site, arrays in replies.updates.items()}
    bins, noise = study.score_bins(study.metrics), study.metrics.noise_multiplier
    return {
        "version": 1,
        "metrics": estimate(told, noise, bins).as_dict() if told else None,
        "bins": {"logit": bins.middles.tolist()},
        "covers": COVERS,
        "refused": dict(sorted(replies.refused.items())),
    }


def write(folder: Path, found: Mapping[str, Any]) -> None:
    """Write it beside the weights."""
    write_atomically(folder / FILE, json.dumps(found, indent=1, allow_nan=False).encode() + b"\n")


def read(folder: Path) -> dict[str, Any] | None:
    """What was written, or None."""
    try:
        found: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return found


def lines(found: Mapping[str, Any]) -> list[str]:
    """For people: a line a metric, then what the intervals cover, and who did not answer."""
    said: list[str] = []
    if (metrics := found["metrics"]) is None:
        said.append("metrics: no hospital told any")
    else:
        said.append(f"metrics of {', '.join(metrics['sites'])}, noise {metrics['noise']:.3g} patients a cell")
        for key, name in NAMES.items():
            value = metrics[key]
            said.append(
                f"  {name}  {value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
                if value is not None
                else f"  {name}  not to be told from the noise"
            )
        said.append(f"  {found['covers']}")
    said += [f"  {site} told no metrics ({reason})" for site, reason in found["refused"].items()]
    return said
