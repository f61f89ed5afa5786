"""Figures of a report. matplotlib is imported on use: a client that draws nothing does not pay for it."""

from __future__ import annotations

from pathlib import Path

AUROC_COLOUR, EPSILON_COLOUR = "#1b5e9b", "#b3541e"


def rounds_figure(
    path: Path,
    *,
    rounds: list[int],
    auroc: list[float],
    epsilon: list[float],
    budget: float | None,
    best_possible: float | None,
    title: str,
) -> None:
    """AUROC (above) and the epsilon of the steps so far (below) by round, as PNG.

    Args:
        rounds: [R] rounds at which both were taken.
        auroc: [R] pooled held-out AUROC.
        epsilon: [R] the highest epsilon of any site; infinite values leave the lower panel out.
        budget: the study's epsilon, drawn as a line: the admitted plan is what is guaranteed, not the curve.
        best_possible: AUROC of the true probabilities where they are known.
    """
    from matplotlib.figure import Figure  # object interface: no display, no global state

    private = budget is not None
    figure = Figure(figsize=(7, 5.2 if private else 3.2), layout="constrained")
    axes = figure.subplots(2 if private else 1, 1, sharex=True, squeeze=False)[:, 0]
    axes[0].set_title(title, loc="left", fontsize=10)
    axes[0].plot(rounds, auroc, marker="o", color=AUROC_COLOUR, label="this run")
    if best_possible is not None:
        axes[0].axhline(best_possible, color="black", linestyle=":", label="best possible")
    axes[0].set_ylabel("AUROC, held-out patients")
    axes[0].legend(loc="lower right", fontsize=8)
    if private:
        axes[1].plot(rounds, epsilon, marker="s", color=EPSILON_COLOUR, label="steps so far")
        axes[1].axhline(budget, color=EPSILON_COLOUR, linestyle="--", label="admitted plan (the guarantee)")
        axes[1].set_ylabel("epsilon per patient")
        axes[1].set_ylim(bottom=0)
        axes[1].legend(loc="lower right", fontsize=8)
    axes[-1].set_xlabel("round")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
