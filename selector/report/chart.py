"""Accuracy against tokens, a panel per task, from distilled standings: the picture of the front page.

python -m selector.report.chart configs/compare/standings.json --out configs/compare/standings.svg
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from selector.errors import UsageError
from selector.files import atomic, output
from selector.report.columns import LEGEND, marked

SHOWN = (
    "selector-llava-next-tiny-question",
    "selector-llava-next-tiny",
    "selector-llava-next-tiny-reconstruction",
    "ridge-leverage",
    "lofi",
    "svd-prune",
    "random",
)
"""Selectors that are drawn where nothing else is asked for: twenty curves in one panel cannot be told apart."""


def points(data: dict[str, Any], task: str, selector: str) -> list[tuple[float, float]]:
    """(visual tokens measured, right answers in %) of a selector on a task, by falling number of tokens.

    Args:
        data: distilled standings, see `selector.report.standings.distil`.
        task, selector: as they are called there.
    """
    rows = [row for row in data["rows"] if (row["task"], row["selector"]) == (task, selector)]
    return sorted(((row["tokens"], 100 * row["right"].count("1") / len(row["right"])) for row in rows), reverse=True)


def draw(data: dict[str, Any], selectors: tuple[str, ...], out: Path) -> None:
    """Writes the picture; its format is that of the file's ending.

    Args:
        data: distilled standings, see `selector.report.standings.distil`.
        selectors: labels, drawn in this order.
        out: an SVG or PNG.

    Raises:
        UsageError: a selector that the data lacks.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    known = {row["selector"]: row["sees_question"] for row in data["rows"]}
    if missing := [name for name in selectors if name not in known]:
        raise UsageError(f"selectors must be among those of the standings, {', '.join(missing)} is not")

    tasks = list(dict.fromkeys(row["task"] for row in data["rows"]))
    # Text stays text, and the same data gives the same bytes.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "standings", "font.size": 9}):
        figure = Figure(figsize=(2.6 * len(tasks) + 0.4, 3.3), layout="constrained")
        panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
        for task, axes in zip(tasks, panels, strict=True):
            [(_, full)] = points(data, task, "full")
            axes.axhline(full, color="0.4", linestyle=":", linewidth=1, label="all tokens")
            for rank, name in enumerate(selectors):
                tokens, right = zip(*points(data, task, name), strict=True)
                style = "--" if name == "random" else "-"
                axes.plot(tokens, right, f"o{style}", color=f"C{rank}", markersize=3, linewidth=1.3, label=_label(name))
            axes.set(title=task, xscale="log", ylim=(0, 102), xlabel="visual tokens")
            axes.set_xticks([16, 32, 64, 128], ["16", "32", "64", "128"], minor=False)
            axes.minorticks_off()
            axes.grid(alpha=0.25)
        panels[0].set_ylabel("right answers, %")

        handles, labels = panels[0].get_legend_handles_labels()
        marks = [marked(label, known[name]) for label, name in zip(labels, ("full", *selectors), strict=True)]
        figure.legend(handles, marks, loc="outside lower center", ncols=4, frameon=False)
        with output(out), atomic(out) as partial:
            figure.savefig(partial, metadata={"Date": None} if out.suffix == ".svg" else None)


def _label(name: str) -> str:
    """What a curve is called: the shipped checkpoints by what they were trained for."""
    kinds = {"-question": "trained, reads the question", "-reconstruction": "trained by reconstruction", "": "trained"}
    prefix = "selector-llava-next-tiny"
    return kinds.get(name.removeprefix(prefix), name) if name.startswith(prefix) else name


def main() -> int:
    """Entry point of ``python -m selector.report.chart``."""
    parser = argparse.ArgumentParser(prog="python -m selector.report.chart", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("standings", type=Path, help="distilled standings, a JSON")
    parser.add_argument("--out", type=Path, required=True, help="the picture, .svg or .png")
    parser.add_argument("--selectors", nargs="+", default=SHOWN, metavar="LABEL", help="curves to draw")
    options = parser.parse_args()
    try:
        draw(json.loads(options.standings.read_text(encoding="utf-8")), tuple(options.selectors), options.out)
    except (UsageError, OSError, ValueError) as error:
        print(f"selector.report.chart: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}. {LEGEND}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
