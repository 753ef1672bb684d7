"""The top of the page: what the runs say, the fewest tokens that suffice, and what differs between the runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from selector.report.columns import LEGEND, Figures, Summary, legend, selector_name
from selector.report.findings import sentences

MARGIN = 0.05
"""A budget passes where it is shown to lose less accuracy than this share."""
HINT = '<span class="hint"> · swipe for more columns →</span>'
"""Shown on narrow screens only."""


def overview(runs: Mapping[str, Summary]) -> str:
    """The findings of every run in words, and a table of the smallest budgets shown to lose less than `MARGIN`.

    Args:
        runs: summaries by the name of the run.

    Returns:
        HTML.
    """
    parts = []
    for name, summary in runs.items():
        lines = []
        for task in summary["tasks"]:
            rows = [row for row in summary["rows"] if row["task"] == task]
            findings = sentences(rows)
            lines += [f"<b>{escape(task)}.</b> {escape(' '.join(findings))}"] if findings else []

        title = f"<h3>{escape(name)}</h3>" if len(runs) > 1 else ""
        items = "".join(f"<li>{line}</li>" for line in lines)
        parts.append(f"{title}<ul class='findings'>{items}</ul>{_smallest(name, summary)}")
    if any(legend(summary) for summary in runs.values()):
        parts.append(f"<p>{escape(LEGEND)}</p>")
    return "".join(parts)


def _smallest(name: str, summary: Summary) -> str:
    """A table: per selector and task, the fewest tokens at which, and above which, the loss is shown to be small."""
    tasks = [t for t in summary["tasks"] if any(r["task"] == t and r["versus_full"] for r in summary["rows"])]
    if not tasks:
        return ""

    selectors = {r["selector"]: selector_name(r) for r in summary["rows"] if r["keep"]}
    head = "".join(f'<th scope="col">{escape(task)}</th>' for task in tasks)
    body = []
    for selector, shown in selectors.items():
        cells = []
        for task in tasks:
            own = [r for r in summary["rows"] if (r["task"], r["selector"]) == (task, selector) and r["versus_full"]]
            row = _last_good(own)
            cells.append(f"<td>{escape(_cell(row)) if row else 'not shown for any tried'}</td>")
        body.append(f'<tr><th scope="row">{escape(shown)}</th>{"".join(cells)}</tr>')

    points = f"{100 * MARGIN:.0f} points"
    title = f"Fewest tokens shown to lose less than {points} of accuracy"
    # Without a broken answer 1 − (1 − margin)^n must be above 95%.
    least = math.ceil(math.log(0.05) / math.log(1 - MARGIN))
    caption = (
        f"{title}: the difference to the unpruned model on the same questions, with its 95% interval, whose lower end "
        f"is above −{points}, here and at every larger budget tried. Where no answer broke, the lower end is the loss "
        f"that so many questions can hide: fewer than {least} show nothing."
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{title}, {escape(name)}"><table class="words">'
        f'<caption>{caption}</caption><thead><tr><th scope="col">selector</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _last_good(rows: list[Figures]) -> Figures | None:
    # From many tokens to few, up to the first failure: a lucky small budget below a bad one does not count.
    good = None
    for row in sorted(rows, key=lambda r: -r["tokens"]):
        if _lower_end(row["versus_full"]) <= -MARGIN:
            break
        good = row
    return good


def _lower_end(versus: dict[str, Any]) -> float:
    """Lower end of the interval of the difference.

    A bootstrap over questions of which none broke cannot draw one that did. There the exact bound counts: the share of
    broken answers that still shows none in so many questions in 5% of the cases.
    """
    low = versus["interval"][0]
    return low if versus["broken"] else min(low, -_hidden(versus["pairs"]))


def _hidden(pairs: int) -> float:
    """The share of broken answers that shows none among this many questions with a chance of 5%."""
    return 1 - 0.05 ** (1 / pairs)


def _cell(row: Figures) -> str:
    """The tokens of a row, its difference to the unpruned model, and the share of answers that stayed."""
    versus = row["versus_full"]
    low, high = versus["interval"]
    share = f" ({100 * row['tokens'] / row['full_tokens']:.0f}%)" if row["full_tokens"] else ""
    gap = f"{100 * versus['difference']:+.0f} [{100 * low:+.0f}, {100 * high:+.0f}] points"
    if versus["broken"] == versus["fixed"] == 0:  # a bootstrap of equal pairs has no width: say what n allows
        gap = f"none lost (a loss up to {100 * _hidden(versus['pairs']):.0f} points may hide)"
    return f"{row['tokens']:.0f} tokens{share}: {gap}, {100 * row['agreement']:.0f}% same answers"


def differing(runs: Mapping[str, Summary]) -> str:
    """A table of the settings that are not the same in all runs, as HTML; a sentence where there are none."""
    flat = {name: _flat(summary) for name, summary in runs.items()}
    keys = list(dict.fromkeys(key for settings in flat.values() for key in settings))
    rows = [key for key in keys if len({str(settings.get(key, "–")) for settings in flat.values()}) > 1]
    if not rows:
        return "<p>Nothing that is recorded: model, versions and settings are the same.</p>"

    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in runs)
    body = "".join(
        f'<tr><th scope="row">{escape(key)}</th>'
        + "".join(f"<td>{escape(str(settings.get(key, '–')))}</td>" for settings in flat.values())
        + "</tr>"
        for key in rows
    )
    return (
        '<div class="scroll" role="region" tabindex="0" aria-label="differences"><table><caption>Settings that differ'
        f'</caption><thead><tr><th scope="col">setting</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _flat(summary: Summary) -> dict[str, Any]:
    """The settings of a run as one level of names and values; a task counts by its fingerprint."""
    skipped = ("rows", "pooled", "correlations", "environment", "tasks", "unreadable")
    # What is left of a summary without its figures are settings.
    plain = {key: value for key, value in summary.items() if key not in skipped}
    tasks = {f"task {name}": task["fingerprint"] for name, task in summary["tasks"].items()}
    selectors = ", ".join(dict.fromkeys(selector_name(row) for row in summary["rows"] if row["keep"]))
    budgets = ", ".join(dict.fromkeys(row["keep"] for row in summary["rows"] if row["keep"]))
    return plain | summary["environment"] | tasks | {"selectors": selectors, "budgets": budgets}
