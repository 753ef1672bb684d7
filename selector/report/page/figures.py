"""The plots of the page: accuracy and agreement against tokens, time and memory; agreement against the spectrum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from selector.report.columns import Figures, Summary, batch_size, selector_name, timed
from selector.report.page.plots import Point, Reference, Series, axis, legend, plot

SPECTRA = {  # by field of a row: the label of the axis, and what has shifted
    "ipr_shift": ("|ΔIPR|", "IPR"),
    "rank_shift": ("|Δ effective rank|", "effective rank"),
    "energy_shift": ("energy shift", "energy distribution"),
}


def names_of(runs: Mapping[str, Summary]) -> dict[tuple[str, str], tuple[str, int]]:
    """(run, selector) -> (its name on the page, its number); the same in every plot, so that colours are, too."""
    shown = {
        (name, row["selector"]): selector_name(row)
        for name, summary in runs.items()
        for row in summary["rows"]
        if row["keep"]
    }
    # One number per run and selector: two runs of a selector are two curves.
    several = len(runs) > 1
    return {key: (f"{label} · {key[0]}" if several else label, i) for i, (key, label) in enumerate(shown.items())}


def task_plots(task: str, runs: Mapping[str, Summary]) -> str:
    """The plots of a task as HTML: up to four; evidence instead of answers where nothing was asked.

    Args:
        task: its name.
        runs: summaries of the runs that have it, by name.
    """
    rows = [row for summary in runs.values() for row in summary["rows"] if row["task"] == task and row["keep"]]
    answered = any(row["accuracy"] is not None for row in rows)
    peak = any(row["peak_bytes"] is not None for row in rows)
    # Peak memory is known on a GPU only; elsewhere the cache of the prompt stands in for it.
    memory = (
        ("peak memory, GB", lambda r: _scaled(r["peak_bytes"], 1e-9))
        if peak
        else (
            "keys and values of the prompt, MB",
            lambda r: _scaled(r["kv_bytes"], 1e-6),
        )
    )

    # (title, field of the y axis, label of the x axis, its value, whether it is logarithmic)
    kinds: list[tuple[str, str, str, Callable[[Figures], Any], bool]] = []
    field = "accuracy" if answered else "evidence"
    if answered or any(row["evidence"] is not None for row in rows):
        kinds.append((f"{_word(field)} against measured tokens", field, "visual tokens", lambda r: r["tokens"], True))
    if any(row["agreement"] is not None for row in rows):
        kinds.append(("agreement against measured tokens", "agreement", "visual tokens", lambda r: r["tokens"], True))
    if answered:
        most = max(runs.values(), key=batch_size)  # one run in batches, and the axis is marked
        kinds.append(("accuracy against time", "accuracy", timed("selection + prefill, ms", most), _time, False))
        kinds.append(("accuracy against memory", "accuracy", memory[0], memory[1], False))

    drawn = [_curves(task, runs, *kind) for kind in kinds]
    marks = [pair for key, pair in names_of(runs).items() if any(r["selector"] == key[1] for r in rows)]
    return f'{legend(marks)}<div class="plots">{"".join(drawn)}</div>' if drawn else ""


def _curves(
    task: str,
    runs: Mapping[str, Summary],
    title: str,
    field: str,
    label: str,
    across: Callable[[Figures], Any],
    log: bool,
) -> str:
    """One plot: a curve per run and selector over its budgets, and lines for the references where they have figures."""
    series, lines, values = [], [], []
    for (run, selector), (name, number) in names_of(runs).items():
        if run not in runs:
            continue
        points = []

        # Joined in the order of tokens, which need not be that of the x axis.
        for row in sorted(runs[run]["rows"], key=lambda r: r["tokens"] or 0):
            if (row["task"], row["selector"]) != (task, selector) or not row["keep"]:
                continue
            x, y = across(row), row[field]
            if x is None or y is None:  # not measured in this run
                continue
            interval = row[f"{field}_interval"]
            words = f"keep {row['keep']}, {row['tokens']:.0f} tokens, {label} {x:.4g}, {_word(field)} {100 * y:.0f}%"
            words += f" [{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]"
            points.append(Point(x, y, words, (interval[0], interval[1])))
        values += [point.x for point in points]
        series.append(Series(name, number, points))

    if field == "accuracy":
        for run, summary in runs.items():
            for row in summary["rows"]:
                if row["task"] == task and row["keep"] is None and row["accuracy"] is not None:
                    of = f" ({run})" if len(runs) > 1 else ""
                    lines.append(Reference(f"{row['selector']}{of} {100 * row['accuracy']:.0f}%", row["accuracy"]))

    # Percent axes always span 0 to 1: a difference of a point must not look like a cliff.
    y_axis = axis(_word(field), [], percent=True)
    words = f"{task}: {title}. {_described(series)}"
    drawn = plot(words, axis(label, values, log=log, zero=True), y_axis, series, lines, front=True)
    return f"<figure>{drawn}<figcaption>{escape(title[0].upper() + title[1:])}</figcaption></figure>"


def correlation_plots(runs: Mapping[str, Summary]) -> str:
    """The paper's claim as plots: does the change of the spectrum predict how many answers change?

    Returns:
        HTML; nothing where fewer than three rows have both figures.
    """
    rows = [(name, row) for name, summary in runs.items() for row in summary["rows"] if row["keep"]]
    rows = [(name, row) for name, row in rows if row["agreement"] is not None and row["ipr_shift"] is not None]
    if len(rows) < 3:
        return ""

    numbers = names_of(runs)
    drawn = []
    for shift, (label, words) in SPECTRA.items():
        series = []
        for key, (name, number) in numbers.items():
            points = [
                Point(
                    abs(r[shift]),
                    r["agreement"],
                    f"{r['task']}, keep {r['keep']}: {label} {abs(r[shift]):.4g}, same {100 * r['agreement']:.0f}%",
                )
                for run, r in rows
                if (run, r["selector"]) == key
            ]
            series.append(Series(name, number, points, joined=False))

        # The correlation is in the words for screen readers and in the caption.
        x = axis(label, [p.x for each in series for p in each.points], zero=True)
        correlations = "; ".join(_correlation(name, summary, shift, len(runs) > 1) for name, summary in runs.items())
        title = f"Agreement against the shift of the {words} over selectors, budgets and tasks. {correlations}"
        figure = plot(title, x, axis("same answers", [], percent=True), series)
        drawn.append(f"<figure>{figure}<figcaption>{escape(correlations)}</figcaption></figure>")

    claim = (
        "<p>The paper behind LoFi (arXiv 2503.06794) says that the change of the inverse participation ratio of the "
        "singular spectrum goes with consistency. Each mark is one selector at one budget on one task; the interval of "
        "a rank correlation takes the marks to be independent, which they are not quite: they share samples. Marks of "
        "several budgets mix two things: fewer tokens change both, whichever selector dropped the others.</p>"
    )
    return f'{claim}{legend(list(numbers.values()))}<div class="plots three">{"".join(drawn)}</div>'


def _correlation(name: str, summary: Summary, shift: str, several: bool) -> str:
    """The rank correlations of one shift in words, over all tasks and per task."""
    parts = []
    for each in summary["correlations"]:
        if each["shift"] == shift and each["rank"] is not None:
            between = f" [{each['interval'][0]:+.2f}, {each['interval'][1]:+.2f}]" if each["interval"] else ""
            parts.append(f"{each['task'] or 'all'} {each['rank']:+.2f}{between}")
    text = "Spearman: " + (", ".join(parts) or "not defined")
    return f"{name}, {text}" if several else text


def _described(series: Sequence[Series]) -> str:
    # A plot that cannot be seen is read out: every figure of it.
    return " ".join(
        f"{s.name}: {', '.join(f'{100 * p.y:.0f}% at {p.x:.4g}' for p in s.points)}." for s in series if s.points
    )


def _time(row: Figures) -> Any:
    # To the first token: what selection costs counts against what it saves.
    return None if None in (row["selection_ms"], row["prefill_ms"]) else row["selection_ms"] + row["prefill_ms"]


def _scaled(value: Any, scale: float) -> Any:
    return None if value is None else scale * value


def _word(field: str) -> str:
    return {"accuracy": "accuracy", "agreement": "same answers", "evidence": "evidence kept"}[field]
