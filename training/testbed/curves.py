"""A picture of a run's log: the loss and the shares predicted correctly, stage by stage."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure

from selector.files import atomic

STAGES = {
    "tower": ("characters", "objects", "background", "centres"),
    "reader": ("documents_asked", "scenes_asked", "charts_asked", "receipts_asked"),
    "join": ("documents_asked", "scenes_asked", "charts_asked", "receipts_asked"),
}
"""The values drawn for each stage, besides its loss."""


def draw_curves(log: Path, out: Path, smooth: float = 0.7) -> None:
    """Writes a PNG with one panel per stage.

    Args:
        log: the JSON lines that `state.Log` writes.
        out: the picture.
        smooth: every curve is a running mean that keeps this share of its last value.
    """
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    figure = Figure(figsize=(12, 3.6), layout="constrained")

    for axes, (stage, names) in zip(figure.subplots(1, len(STAGES)), STAGES.items(), strict=True):
        for name in (*names, "loss"):
            # A stage logs a value only where it is finite, so curves have points of their own.
            points = [(row["step"], row[name]) for row in rows if row["stage"] == stage and name in row]
            if points:
                # Begins at the first value rather than at 0, which would bend the start of every curve.
                running, curve = points[0][1], []
                for _, value in points:
                    running = smooth * running + (1 - smooth) * value
                    curve.append(running)
                # The loss is dashed: it shares the axis with accuracies.
                axes.plot([step for step, _ in points], curve, "--" if name == "loss" else "-", label=name, lw=1.2)

        axes.set(title=stage, xlabel="step", ylim=(0, 1.05))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7)

    with atomic(out) as partial:
        figure.savefig(partial, format="png", dpi=100)
