"""The report as one HTML file that opens from disk: tables, plots and the explorer, with nothing fetched from anywhere.

A pure function of summaries and records, without torch. Without scripts tables and plots are still all there; sorting
and the explorer need them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from selector.report.columns import (
    KEEP,
    POOLED,
    SELECTOR,
    Column,
    Summary,
    consistency_columns,
    cost_columns,
    main_columns,
    share_of,
)
from selector.report.page.figures import correlation_plots, task_plots
from selector.report.page.overview import HINT, differing, overview
from selector.report.tables import best_rows, meanings, notes, rows_of, settings_line

HERE = Path(__file__).parent
NAMES, NUMBER = (KEEP, SELECTOR), ' class="number"'
FORMULAS = """\
Operations are counted by formula, 2 per multiply-add, matrix products only. With S tokens over a context of C,
width D, query width q, key width k, MLP width m, vocabulary V: a layer of the language model 4·S·D·(q + k) + 4·S·C·q +
6·S·D·m, and 2·D·V for one row of logits; a layer of the tower 8·S·D² + 4·S²·D + 4·S·D·m, and 2·N·(D·d + d²) for the
projector over every patch of every tile. Keys and values take 2 · layers · k · bytes per token. The tests check the
formulas against torch's FlopCounterMode; the selector's work is counted by that counter. Times are medians over the
samples, after one untimed call; the first token ends the prefill."""


def render(runs: Mapping[str, Summary], shown: Mapping[str, Any]) -> str:
    """The page of one or several runs.

    Args:
        runs: summaries by the name of the run, see `selector.report.summary.summarize`.
        shown: what the explorer shows, see `selector.report.page.explorer.explorer`.

    Returns:
        The HTML of the page, style, script and images included.
    """
    tasks = list(dict.fromkeys(task for summary in runs.values() for task in summary["tasks"]))
    models = " and ".join(dict.fromkeys(str(summary["model"]) for summary in runs.values()))

    # The sections from top to bottom; those without anything to show are left out, and so are their links.
    sections = [_section("overview", "What this run says" if len(runs) == 1 else "What these runs say", overview(runs))]
    if len(runs) > 1:
        sections.append(_section("differences", "What differs between the runs", differing(runs)))
    sections += [_task(task, runs) for task in tasks]
    averaged = {name: summary for name, summary in runs.items() if summary["pooled"]}
    if averaged:
        together = "".join(_table(f"{POOLED}, {n}", s, POOLED, main_columns(s)) for n, s in averaged.items())
        sections.append(_section("together", "All tasks together: shares on average", together))
    plots = correlation_plots(runs)
    if plots:
        sections.append(_section("spectrum", "Does the spectral shift predict agreement?", plots))
    if shown["samples"]:
        sections.append(
            _section("explorer", "Answers, one by one", (HERE / "explorer.html").read_text(encoding="utf-8"))
        )
    sections.append(_section("method", "How this was measured", _method(runs)))

    links = "".join(f'<a href="#{_slug(task)}">{escape(task)}</a>' for task in tasks)
    links += '<a href="#together">all tasks</a>' if averaged else ""
    links += '<a href="#spectrum">spectrum</a>' if plots else ""
    links += '<a href="#explorer">answers</a>' if shown["samples"] else ""

    # "<" is escaped in the JSON: an answer with "</script>" in it must not end the script element.
    data = json.dumps(shown, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    page = (HERE / "page.html").read_text(encoding="utf-8")
    parts = {
        "TITLE": escape(f"Visual-token selection on {models}"),
        "SUBTITLE": "<br>".join(escape(f"{name}: {settings_line(summary)}") for name, summary in runs.items()),
        "STYLE": (HERE / "style.css").read_text(encoding="utf-8"),
        "LINKS": links + '<a href="#method">method</a>',
        "BODY": "\n".join(sections),
        "SCRIPT": (HERE / "script.js").read_text(encoding="utf-8"),
        "DATA": data,
    }
    for name, text in parts.items():  # the data come last, so that no "<!--BODY-->" in them is filled
        page = page.replace(f"<!--{name}-->", text)
    return page


def _task(task: str, runs: Mapping[str, Summary]) -> str:
    """The section of a task: plots of all runs together, then their tables, of which the first kind is open."""
    having = {name: summary for name, summary in runs.items() if task in summary["tasks"]}
    parts = [task_plots(task, having)]

    # A table per run of each kind; columns depend on what the run has measured.
    kinds = (
        ("Head to head", lambda s: main_columns(s, task), True),
        ("Consistency with the unpruned model", consistency_columns, False),
        ("Cost", cost_columns, False),
    )

    for title, columns_of, opened in kinds:
        tables = "".join(
            _table(f"{title}: {task}" + (f", {name}" if len(having) > 1 else ""), summary, task, columns_of(summary))
            for name, summary in having.items()
        )
        parts.append(f"<details{' open' if opened else ''}><summary>{title}</summary>{tables}</details>")
    return _section(_slug(task), f"Task: {task}", "".join(parts))


def _table(caption: str, summary: Summary, task: str, columns: Sequence[Column]) -> str:
    """A table that a click on a header sorts; what its cells are sorted by is in their ``data-value``."""
    rows = rows_of(summary, task)
    best = best_rows(rows)
    head = "".join(
        f'<th scope="col"{"" if column in NAMES else NUMBER} title="{escape(column.note)}">'
        f'<button type="button">{escape(column.header)}</button></th>'
        for column in columns
    )

    body = []
    for i, row in enumerate(rows):
        cells = []
        for column in columns:
            value = column.value(row)
            number = isinstance(value, int | float)
            # Cells without a figure have no value: the script leaves them below, whichever way it sorts.
            sort = f' data-value="{value:.9g}"' if number else ""
            kind = "" if column in NAMES else NUMBER
            tag, scope = ("th", ' scope="row"') if column == SELECTOR else ("td", "")
            cells.append(f"<{tag}{scope}{kind}{sort}>{escape(column.text(row))}</{tag}>")

        # Classes of the style sheet: "ends" draws a rule below a group of budgets.
        marks = ["reference"] if row["keep"] is None else []
        marks += ["best"] if id(row) in best else []
        marks += ["ends"] if i + 1 < len(rows) and share_of(rows[i + 1]["keep"]) != share_of(row["keep"]) else []
        body.append(f'<tr class="{" ".join(marks)}">{"".join(cells)}</tr>')

    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table class="sortable">'
        f"<caption>{escape(caption)}{HINT}</caption><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _method(runs: Mapping[str, Summary]) -> str:
    """Settings and notes of every run, how intervals and operations are computed, and what every column means."""
    parts = []
    for name, summary in runs.items():
        title = f"<h3>{escape(name)}</h3>" if len(runs) > 1 else ""
        lines = "".join(f"<li>{escape(note)}</li>" for note in notes(summary))
        parts.append(f"{title}<p>{escape(settings_line(summary))}.</p><ul>{lines}</ul>")

    terms = "".join(f"<dt>{escape(header)}</dt><dd>{escape(note)}</dd>" for header, note in meanings(runs).items())

    layers = {summary["layer"] for summary in runs.values()}
    where = "; ".join(
        "what enters the language model" if k == 0 else f"what leaves its block {k}" for k in sorted(layers)
    )

    intervals = (
        "Intervals are 95%: Wilson's for shares, a seeded bootstrap over samples for means and paired differences. "
        "p: exact McNemar on the answers that changed side. n for 1 pt: samples at which a paired comparison of this "
        "spread sees one point (two-sided 5%, power 80%). Where no answer changed side a bootstrap has no width: at n "
        "samples a loss up to 1 − 0.05^(1/n) may still hide. Shaded in the plots: the Pareto front. "
        f"Spectra are of the visual tokens, {where}."
    )
    return f"{''.join(parts)}<p>{escape(intervals)}</p><p>{escape(FORMULAS)}</p><h3>Columns</h3><dl>{terms}</dl>"


def _section(name: str, title: str, body: str) -> str:
    # The title labels the section for screen readers, too.
    head = f'<h2 id="{name}-title">{escape(title)}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-title">{head}{body}</section>'


def _slug(task: str) -> str:
    # The prefix keeps a task called "method" apart from the section of that name.
    return "task-" + "".join(c if c.isalnum() else "-" for c in task)
