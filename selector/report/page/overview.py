"""The top of the page: what the runs say, how far one can go down, and what differs between them."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from selector.report.columns import LEGEND, legend, selector_name
from selector.report.findings import Row, sentences

Summary = dict[str, Any]


def overview(runs: Mapping[str, Summary]) -> str:
    """A short list a run and task, and a table of the smallest budgets without measurable loss."""
    parts = []
    for name, summary in runs.items():
        lines = []
        for task in summary["tasks"]:
            rows = [row for row in summary["rows"] if row["task"] == task]
            said = sentences(rows)
            lines += [f"<b>{escape(task)}.</b> {escape(' '.join(said))}"] if said else []
        title = f"<h3>{escape(name)}</h3>" if len(runs) > 1 else ""
        items = "".join(f"<li>{line}</li>" for line in lines)
        parts.append(f"{title}<ul class='findings'>{items}</ul>{_smallest(name, summary)}")
    if any(legend(summary) for summary in runs.values()):
        parts.append(f"<p>{escape(LEGEND)}</p>")
    return "".join(parts)


def _smallest(name: str, summary: Summary) -> str:
    """For every selector and task, the fewest tokens at which, and above which, no loss is measurable."""
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
            cells.append(f"<td>{escape(_cell(row)) if row else 'none of those tried'}</td>")
        body.append(f'<tr><th scope="row">{escape(shown)}</th>{"".join(cells)}</tr>')
    caption = (
        "Fewest tokens without measurable loss of accuracy (difference to the unpruned model, 95% interval holds 0)"
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}, {escape(name)}"><table>'
        f'<caption>{caption}</caption><thead><tr><th scope="col">selector</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _last_good(rows: list[Row]) -> Row | None:
    good = None
    for row in sorted(rows, key=lambda r: -r["tokens"]):
        if row["versus_full"]["interval"][1] < 0:
            break
        good = row
    return good


def _cell(row: Row) -> str:
    versus = row["versus_full"]
    low, high = versus["interval"]
    share = f" ({100 * row['tokens'] / row['full_tokens']:.0f}%)" if row["full_tokens"] else ""
    gap = f"{100 * versus['difference']:+.0f} [{100 * low:+.0f}, {100 * high:+.0f}] points"
    if versus["broken"] == versus["mended"] == 0:  # a bootstrap of equal pairs has no width: say what n allows
        gap = f"none lost (a loss up to {100 * (1 - 0.05 ** (1 / versus['pairs'])):.0f} points may hide)"
    return f"{row['tokens']:.0f} tokens{share}: {gap}, {100 * row['agreement']:.0f}% same answers"


def differing(runs: Mapping[str, Summary]) -> str:
    """A table of the settings that are not the same in all runs."""
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
    skipped = ("rows", "pooled", "correlations", "environment", "tasks", "unreadable")
    plain = {key: value for key, value in summary.items() if key not in skipped}
    tasks = {f"task {name}": task["fingerprint"] for name, task in summary["tasks"].items()}
    selectors = ", ".join(dict.fromkeys(selector_name(row) for row in summary["rows"] if row["keep"]))
    budgets = ", ".join(dict.fromkeys(row["keep"] for row in summary["rows"] if row["keep"]))
    return plain | summary["environment"] | tasks | {"selectors": selectors, "budgets": budgets}
