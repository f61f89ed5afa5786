"""Rows as a sweep would leave them, made by a formula: four hospitals, three budgets, three seeds, every line."""

from __future__ import annotations

from dataclasses import replace

from common.privacy.plan import Plan
from simulations.rows import (
    POOLED,
    Bin,
    CalibrationRow,
    Estimate,
    RoundRow,
    Row,
    Setting,
    SiteRow,
    Subgroup,
    Traffic,
)

SIZES = {"east": 2500, "north": 4000, "south": 1500, "west": 800}
BEST = {"east": 0.842, "north": 0.864, "south": 0.878, "west": 0.816, POOLED: 0.865}
SIGMAS = {1.0: 11.0, 3.0: 4.1, 8.0: 1.9}  # near what these budgets cost; tests need no exact price
POWERS = {"precision": 2, "declared": 1, "uniform": 0}
FREE = {"best-possible": 0.865, "pooled-no-privacy": 0.801, "federated-no-privacy": 0.794, "prevalence": 0.5}
PRIVATE = {  # AUROC at epsilon 1, 3, 8
    "pooled-private": (0.764, 0.785, 0.797),
    "fedavg-one-step": (0.745, 0.772, 0.785),
    "fedavg-local": (0.718, 0.759, 0.780),
    "naive": (0.657, 0.693, 0.729),
    "logistic": (0.730, 0.764, 0.775),
}
ALONE = {"east": 0.69, "north": 0.74, "south": 0.66, "west": 0.62}


def example_rows(seeds: int = 3) -> list[Row]:
    """Every line at every budget and seed, and the three weightings at epsilon 3."""
    rows = []
    for seed in range(seeds):
        rows += [_row(line, None, seed, auroc) for line, auroc in FREE.items()]
        for line, scores in PRIVATE.items():
            rows += [_row(line, e, seed, auroc) for e, auroc in zip(SIGMAS, scores, strict=True)]
        rows += [
            _row(f"alone: {site}", e, seed, auroc + 0.03 * i, trained=(site,))
            for site, auroc in ALONE.items()
            for i, e in enumerate(SIGMAS)
        ]
        for weighting in ("declared", "uniform"):
            row = _row("fedavg-one-step", 3.0, seed, 0.768, settings={"training.aggregation": weighting})
            rows.append(replace(row, weighting=weighting, weights=_weights(POWERS[weighting])))
    return rows


def _row(
    line: str,
    epsilon: float | None,
    seed: int,
    auroc: float,
    *,
    settings: dict[str, Setting] | None = None,
    trained: tuple[str, ...] = tuple(SIZES),
) -> Row:
    exact = line in ("best-possible", "prevalence")
    shake = 0.0 if exact else 0.004 * ((seed * 7 + len(line)) % 3 - 1)
    private = epsilon is not None
    weighting = {"naive": "uniform", "fedavg-local": "declared"}.get(line, "precision") if private else None
    return Row(
        line=line,
        study="demo",
        settings=settings or {},
        terms={},
        epsilon=epsilon,
        spent=epsilon,
        delta=1e-5,
        seed=seed,
        plan=Plan(0.25, SIGMAS[epsilon], 3.0, 1e-5, 160, 4) if epsilon is not None else None,
        weighting=weighting,
        weights=_weights(POWERS[weighting or "declared"], trained),
        sites=tuple(_site(line, site, auroc + shake, exact, trained) for site in (*SIZES, POOLED)),
        calibration=_calibration(seed) if not exact else None,
        subgroups=_subgroups(auroc + shake) if not exact else (),
        rounds=_rounds(auroc + shake, epsilon) if private else (),
        bytes_per_round=dict.fromkeys(trained, Traffic(down=51_870, up=52_031)) if private else {},
        parameters=12_690,
        seconds=36.0,
        cpu_seconds=36.0,
        study_digest="3f" * 32,
        code_digest="a7" * 32,
        versions={"python": "3.11.7", "torch": "2.13.0", "wardround": "0.1.0"},
        research_mode=False,
    )


def _weights(power: int, trained: tuple[str, ...] = tuple(SIZES)) -> dict[str, float]:
    raw = {site: float(SIZES[site] ** power) for site in trained}
    return {site: weight / sum(raw.values()) for site, weight in raw.items()}


def _site(line: str, site: str, auroc: float, exact: bool, trained: tuple[str, ...]) -> SiteRow:
    size = sum(SIZES.values()) if site == POOLED else SIZES[site]
    if line == "best-possible":
        value = BEST[site]
    elif exact or site == POOLED:
        value = auroc
    else:
        value = auroc + 0.5 * (BEST[site] - BEST[POOLED]) + (0.02 if trained == (site,) else 0.0)
    half = 0.9 / size**0.5
    estimate = Estimate(value) if exact else Estimate(value, value - half, value + half)
    return SiteRow(
        site=site,
        declared_patients=size if site in trained or site == POOLED else 0,
        patients=2 * size,
        sequences=2 * size,
        positives=size // 4,
        auroc=estimate,
        auprc=estimate,
        brier=Estimate(0.1),
        best_possible=BEST[site],
    )


def _calibration(seed: int) -> CalibrationRow:
    risks = [0.02 * 1.45**i for i in range(10)]
    bins = tuple(Bin(1760, risk, min(0.9 * risk, 1.0), 0.8 * risk, min(risk, 1.0)) for risk in risks)
    return CalibrationRow((replace(bins[0], sequences=400), *bins[1:]), 0.93 - 0.01 * seed, -0.05, -0.08 + 0.01 * seed)


def _subgroups(auroc: float) -> tuple[Subgroup, ...]:
    def shown(attribute: str, group: str, patients: int, lift: float) -> Subgroup:
        value = auroc + lift
        return Subgroup(attribute, group, patients, patients // 7, Estimate(value, value - 0.02, value + 0.02))

    return (
        shown("sex", "female", 9003, 0.004),
        shown("sex", "male", 8597, -0.005),
        shown("age", "< 45", 1803, -0.041),
        shown("age", "45 to < 60", 5511, 0.006),
        shown("age", "60 to < 75", 7002, 0.002),
        Subgroup("age", ">= 75", None, None, None),
    )


def _rounds(auroc: float, epsilon: float | None) -> tuple[RoundRow, ...]:
    return tuple(
        RoundRow(r, auroc - 0.2 * 2 ** (-r / 30), epsilon * (r / 164) ** 0.6 if epsilon is not None else None)
        for r in range(16, 161, 16)
    )
