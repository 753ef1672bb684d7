"""How the figures of a run are shown: on the terminal, in Markdown, and in words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

EXPENDABLE = ("w→r", "r→w", "n", "ΔNLL", "select ms", "prefill ms", "same %", "evidence % (base)")
"""Columns that a narrow terminal does without, the first to go first; ``table.md`` has them all."""

NOTES = """\
tokens: visual tokens that reached the language model, base view and newlines included (mean). right: exact match with
its 95% Wilson interval. same: answers identical to the unpruned model's. r→w, w→r: answers that selection broke or
mended. ΔNLL: nats a token that the unpruned model's own answer loses. evidence: share of the answer's boxes under kept
tokens of the high-resolution tiles (base: of the base view; n: samples with boxes, where not all have some). select,
prefill: median ms a sample. Records: {run}"""


def columns(summary: dict[str, Any]) -> list[tuple[str, Any]]:
    """(header, how a row is written) of the columns for which the run has any figure."""
    rows = summary["rows"]
    flips = "flips"
    every = [
        ("keep", lambda r: r["keep"] or "", "selector"),
        ("selector", lambda r: r["selector"], "selector"),
        ("n", lambda r: str(r["samples"]), "samples"),
        ("tokens", _tokens, "tokens"),
        ("right % [95%]", _accuracy, "accuracy"),
        (f"vs {summary['baseline']}", _versus, "versus_baseline"),
        ("same %", lambda r: _percent(r["agreement"]), "agreement"),
        ("r→w", lambda r: str(r[flips]["right_to_wrong"]) if r["accuracy"] is not None else "–", "accuracy"),
        ("w→r", lambda r: str(r[flips]["wrong_to_right"]) if r["accuracy"] is not None else "–", "accuracy"),
        ("ΔNLL", lambda r: _number(r["nll_shift"], 2), "nll_shift"),
        ("evidence % (base)", _evidence, "evidence"),
        ("select ms", lambda r: _number(r["selection_ms"] if r["keep"] else None, 1), "selection_ms"),
        ("prefill ms", lambda r: _number(r["prefill_ms"], 1), "prefill_ms"),
    ]
    return [(header, write) for header, write, field in every if any(row[field] is not None for row in rows)]


def fitting_tables(summary: dict[str, Any], width: int) -> tuple[list[Table], list[str]]:
    """The tables with as many columns as `width` characters hold, and the names of the columns left out."""
    ruler, present = Console(width=1000), [name for name, _ in columns(summary)]
    dropped: list[str] = []
    for name in (None, *(name for name in EXPENDABLE if name in present)):
        dropped += [name] if name else []
        tables = rich_tables(summary, dropped)
        if all(ruler.measure(table).maximum <= width for table in tables):
            return tables, dropped
    return rich_tables(summary, dropped), dropped


def rich_tables(summary: dict[str, Any], without: Sequence[str] = ()) -> list[Table]:
    """One table a task; budgets in groups, the best selector of each group in bold."""
    tables = []
    for task in _tasks(summary):
        rows = [row for row in summary["rows"] if row["task"] == task]
        table = Table(title=f"{task} · {summary['model']}", title_justify="left", title_style="bold")
        shown = [column for column in columns(summary) if column[0] not in without]
        for header, _ in shown:
            table.add_column(header, justify="left" if header in ("keep", "selector") else "right", no_wrap=True)
        best = _best(rows)
        for i, row in enumerate(rows):
            group_ends = i + 1 < len(rows) and rows[i + 1]["keep"] != row["keep"]
            style = "dim" if row["keep"] is None else ("bold green" if id(row) in best else None)
            table.add_row(*(write(row) for _, write in shown), style=style, end_section=group_ends)
        tables.append(table)
    return tables


def markdown(summary: dict[str, Any]) -> str:
    """The same tables in Markdown."""
    shown = columns(summary)
    lines = [f"# Comparison on {summary['model']}", ""]
    for task in _tasks(summary):
        lines += [f"## {task}", "", "| " + " | ".join(header for header, _ in shown) + " |"]
        lines.append("|" + "---|" * len(shown))
        rows = [row for row in summary["rows"] if row["task"] == task]
        best = _best(rows)
        for row in rows:
            cells = [write(row) for _, write in shown]
            lines.append("| " + " | ".join(f"**{c}**" if id(row) in best and c else c for c in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def footnotes(summary: dict[str, Any], run: Path) -> str:
    """What the columns mean, and what the whole run says beside them."""
    lines = [NOTES.format(run=run)]
    how = {"original": "those of the whole prompt, with gaps", "contiguous": "counted anew, without gaps"}
    lines.append(f"Position ids of pruned prompts: {how[summary['positions']]} ({summary['positions']}).")
    rank = summary["correlations"]["ipr_shift_vs_agreement"]
    if rank is not None:
        points = summary["correlations"]["points"]
        lines.append(f"Rank correlation of |ΔIPR| with agreement over {points} rows: {rank:+.2f} (Spearman).")
    for task, names in summary["unreadable"].items():
        lines.append(f"{task}: {len(names)} images cannot be read and are left out: {', '.join(names)}")
    saturated = sum(row["saturated"] for row in summary["rows"])
    if saturated:
        lines.append(f"{saturated} records are saturated: the image has no more tokens than the budget, so all stayed.")
    return "\n".join(lines)


def _tasks(summary: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["task"] for row in summary["rows"]))


def _best(rows: list[dict[str, Any]]) -> set[int]:
    """The most accurate rows of each budget (evidence where nothing was answered); ties too, but not if all tie."""
    best = set()
    field = "accuracy" if any(row["accuracy"] is not None for row in rows) else "evidence"
    for keep in {row["keep"] for row in rows} - {None}:
        group = [row for row in rows if row["keep"] == keep and row[field] is not None]
        top = max((row[field] for row in group), default=None)
        winners = {id(row) for row in group if row[field] == top}
        best |= winners if len(winners) < len(group) else set()
    return best


def _tokens(row: dict[str, Any]) -> str:
    if row["tokens"] is None:
        return "–"
    share = f" ({100 * row['tokens'] / row['full_tokens']:.0f}%)" if row["full_tokens"] else ""
    return f"{row['tokens']:.0f}{share}"


def _accuracy(row: dict[str, Any]) -> str:
    if row["accuracy"] is None:
        return "–"
    low, high = row["accuracy_interval"]
    return f"{100 * row['accuracy']:.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def _versus(row: dict[str, Any]) -> str:
    if row["versus_baseline"] is None:
        return "" if row["keep"] is None else "–"
    low, high = row["versus_baseline"]["interval"]
    return f"{100 * row['versus_baseline']['difference']:+.0f} [{100 * low:+.0f}, {100 * high:+.0f}]"


def _evidence(row: dict[str, Any]) -> str:
    if row["evidence"] is None:
        return "–"
    text = f"{100 * row['evidence']:.0f} ({100 * row['base_evidence']:.0f})"
    # Samples without boxes have no evidence: a share of a few must not pass for one of all.
    return text if row["evidence_samples"] == row["samples"] else f"{text} n={row['evidence_samples']}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
