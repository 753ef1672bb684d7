"""What a run says of one selector, for its model card: a table, the metadata ``model-index`` of the hub, a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selector.errors import UsageError
from selector.files import atomic, output
from selector.record import METRICS
from selector.records import RUN, SETTINGS
from selector.report.columns import Figures, Summary, legend, marked
from selector.report.summary import summarize
from selector.report.tables import done, plain, settings_line

ALL = "full"
"""Label of the unpruned model in a run."""
AGREEMENT = "agreement with the unpruned model"


def results_of(run: Path, described: Mapping[str, Any]) -> tuple[Summary, str]:
    """The figures of a finished run, and the label that a selector has in it.

    Args:
        run: a folder that `selector compare` wrote.
        described: ``class``, ``init_args`` and ``weights`` of the selector, see `selector.measure.identity.identity`:
            a label alone might be that of an earlier training.

    Raises:
        UsageError: no run, an unfinished one, one without answers, or one without this selector.
    """
    summary = summarize(run)
    rows = json.loads((run / RUN).read_text(encoding="utf-8"))["rows"]
    wanted = _plain_values(described)

    labels = set()
    for row in rows:
        path = run / row["key"] / SETTINGS
        there = json.loads(path.read_text(encoding="utf-8")).get("selector") if path.is_file() else None
        if there is not None and _plain_values(there) == wanted:
            labels.add(row["label"])
    if not labels:
        names = ", ".join(dict.fromkeys(row["label"] for row in rows))
        raise UsageError(f"results must be of a run with this very selector, none in {run} has its weights: {names}")

    # A card outlives the run: what is not finished is not for it.
    for task in summary["tasks"]:
        if state := done(summary, task):
            raise UsageError(f"results must be of a finished run, {task} in {run} has {state}")
    if any(row["accuracy"] is None for row in summary["rows"]):
        raise UsageError(f"results must be of a run with answers, {run} has none")
    return summary, labels.pop()


def _plain_values(described: Mapping[str, Any]) -> Any:
    """What makes a selector the same one, as JSON has it; its source code may be newer than the run."""
    return json.loads(json.dumps({name: described.get(name) for name in ("class", "init_args", "weights")}))


def results_table(summary: Summary, label: str) -> str:
    """Markdown: per task and selector the score of every budget in % [95%], and in brackets the unchanged answers.

    Args:
        summary: see `selector.report.summary.summarize`.
        label: the selector whose card it is; its rows come first, and say "this one".
    """
    rows = {(row["task"], row["selector"], row["keep"]): row for row in summary["rows"]}
    keeps = list(dict.fromkeys(keep for _, _, keep in rows if keep))
    labels = [label, *dict.fromkeys(name for _, name, keep in rows if keep and name != label)]
    lines = [
        "| task | selector | all tokens | " + " | ".join(keeps) + " |",
        "|---|---|---|" + "---|" * len(keeps),
    ]

    for task in summary["tasks"]:
        for name in labels:
            cells = [_score(rows[task, ALL, None])]
            cells += [f"{_score(row)} ({100 * row['agreement']:.0f})" for row in (rows[task, name, k] for k in keeps)]
            first = f"{plain(task)} ({_metric_name(summary, task)})"
            shown = marked("this one" if name == label else plain(name), rows[task, name, keeps[0]]["sees_question"])
            lines.append(f"| {first} | {shown} | {' | '.join(cells)} |")
    return "\n".join(lines)


def model_index(summary: Summary, label: str, name: str) -> list[dict[str, Any]]:
    """The metadata ``model-index`` of a card: per task and budget the score and the agreement, as shares.

    The tokens that were really kept, the unpruned model's score and the interval are among the ``args`` of each.

    Args:
        name: of the model, as the hub shows it.
    """
    results = []
    for task, about in summary["tasks"].items():
        rows = [row for row in summary["rows"] if row["task"] == task]
        [full] = [row for row in rows if row["selector"] == ALL]
        metrics = [metric for row in rows if row["selector"] == label for metric in _metrics(summary, row, full)]
        dataset = {"name": task, "type": task.removeprefix("hf:"), "revision": about["fingerprint"]}
        results.append({"task": {"type": "visual-question-answering"}, "dataset": dataset, "metrics": metrics})
    return [{"name": name, "results": results}]


def _metrics(summary: Summary, row: Figures, full: Figures) -> list[dict[str, Any]]:
    """Score and agreement of one row, as ``model-index`` wants them."""
    kind = _metric(summary, row["task"])
    kept = {
        "keep": row["keep"],
        "visual_tokens": round(row["tokens"], 1),
        "all_visual_tokens": round(row["full_tokens"], 1),
        "samples": row["samples"],
        "seed": summary["seed"],
        "model": _model(summary),
    }

    # The hub knows "accuracy"; other metrics go by the names that tasks have for them.
    interval = [round(end, 4) for end in row["accuracy_interval"]]
    score = {
        "type": "accuracy" if kind == "exact" else kind,
        "value": round(row["accuracy"], 4),
        "name": f"{_metric_name(summary, row['task'])}, keep={row['keep']}",
        "args": kept | {"interval_95": interval, "unpruned": round(full["accuracy"], 4)},
    }
    agreement = {
        "type": "agreement",
        "value": round(row["agreement"], 4),
        "name": f"{AGREEMENT}, keep={row['keep']}",
        "args": kept,
    }
    return [score, agreement]


def about_run(summary: Summary) -> str:
    """A few sentences: what was asked of which model, where, and how its figures are written."""
    said = (
        f"`selector compare` on {plain(_model(summary))}, {plain(settings_line(summary))}. Score in % with its 95% "
        "interval; in brackets the answers that are the same as the unpruned model's, in %."
    )
    return " ".join([said, *legend(summary)])


def draw(summary: Summary, label: str, out: Path) -> None:
    """Writes a picture: score against visual tokens, a panel per task, the selector of the card as the thickest line.

    Args:
        out: an SVG or PNG.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    tasks = list(summary["tasks"])
    names = dict.fromkeys(row["selector"] for row in summary["rows"] if row["keep"])
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "results", "font.size": 9}):
        figure = Figure(figsize=(2.6 * len(tasks) + 0.9, 3.3), layout="constrained")
        panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
        for task, axes in zip(tasks, panels, strict=True):
            rows = [row for row in summary["rows"] if row["task"] == task]
            [full] = [row for row in rows if row["selector"] == ALL]
            axes.axhline(100 * full["accuracy"], color="0.4", linestyle=":", linewidth=1, label="all tokens")
            for name in [label, *(name for name in names if name != label)]:
                points = sorted((row["tokens"], 100 * row["accuracy"]) for row in rows if row["selector"] == name)
                width, text = (2.4, "this one") if name == label else (1.1, name)
                axes.plot(*zip(*points, strict=True), "o-", markersize=3, linewidth=width, label=text)

            # Budgets are powers of two apart; written out, since 10² means little here.
            axes.set(title=task, xscale="log", ylim=(0, 102), xlabel="visual tokens")
            axes.xaxis.set_major_formatter(ScalarFormatter())
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xticks(sorted({round(row["tokens"]) for row in rows if row["keep"]}))
            axes.grid(alpha=0.25)
        panels[0].set_ylabel("score, %")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        with output(out), atomic(out) as partial:
            figure.savefig(partial, metadata={"Date": None} if out.suffix == ".svg" else None, dpi=150)


def _score(row: Figures) -> str:
    low, high = row["accuracy_interval"]
    return f"{100 * row['accuracy']:.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def _metric(summary: Summary, task: str) -> str:
    return summary["tasks"][task].get("metric", "exact")


def _metric_name(summary: Summary, task: str) -> str:
    kind = _metric(summary, task)
    return METRICS[kind].note if kind == "exact" else METRICS[kind].header.removesuffix(" %")


def _model(summary: Summary) -> str:
    """The model without the folders of somebody's machine; a hub name keeps its owner."""
    name = str(summary["model"])
    return Path(name).name if name.startswith((".", "/", "~")) or Path(name).is_dir() else name
