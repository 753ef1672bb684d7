"""The table of a run: a pure function of its files (``run.json`` and the predictions it names).

Accuracy carries a 95% Wilson interval; the difference to the baseline selector at the same task and budget carries the
95% interval of a seeded paired bootstrap over the samples that both have.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from selector.evaluation.errors import UsageError
from selector.evaluation.records import PREDICTIONS, RUN, read_records, write_json, write_text
from selector.evaluation.statistics import mean, median, paired_bootstrap, spearman, wilson

FLIPS = ("right_to_wrong", "wrong_to_right", "wrong_to_wrong", "right_to_right")

EXPENDABLE = ("w→r", "r→w", "n", "ΔNLL", "select ms", "prefill ms", "same %", "evidence % (base)")
"""Columns that a narrow terminal does without, the first to go first; ``table.md`` has them all."""

NOTES = """\
tokens: visual tokens that reached the language model, base view and newlines included (mean). right: exact match with
its 95% Wilson interval. same: answers identical to the unpruned model's. r→w, w→r: answers that selection broke or
mended. ΔNLL: nats a token that the unpruned model's own answer loses. evidence: share of the answer's boxes under kept
tokens of the high-resolution tiles (base: of the base view). select, prefill: median ms a sample. Records: {run}"""


def summarize(run: Path) -> dict[str, Any]:
    """Figures of every row: {"model", ..., "rows": [...], "correlations": {...}}.

    Raises:
        UsageError: no run there, or broken records.
    """
    if not (run / RUN).is_file():
        raise UsageError(f"run must be a folder that `selector compare` wrote, {run / RUN} does not exist")
    settings = json.loads((run / RUN).read_text())
    limit = settings["samples"]
    tables: dict[tuple[str, str, str | None], list[dict[str, Any]]] = {}
    for row in settings["rows"]:
        found = {record["id"]: record for record in read_records(run / row["key"] / PREDICTIONS)}
        within = [record for record in found.values() if limit is None or record["index"] < limit]
        tables[row["task"], row["label"], row["keep"]] = within
    rows = []
    for (task, label, keep), found in tables.items():
        against = tables.get((task, settings["baseline"], keep)) if label != settings["baseline"] and keep else None
        rows.append({"task": task, "selector": label, "keep": keep} | _figures(found) | _difference(found, against))
    shifts = [r for r in rows if r["keep"] and r["ipr_shift"] is not None and r["agreement"] is not None]
    rank = spearman([abs(r["ipr_shift"]) for r in shifts], [r["agreement"] for r in shifts])
    return {name: settings[name] for name in ("model", "samples", "seed", "baseline", "unreadable")} | {
        "rows": rows,
        "correlations": {"ipr_shift_vs_agreement": rank, "points": len(shifts)},
    }


def _figures(found: list[dict[str, Any]]) -> dict[str, Any]:
    def values(name: str) -> list[Any]:
        return [record[name] for record in found if record.get(name) is not None]

    right = values("correct")
    flips = [record["flip"] for record in found if "flip" in record]
    return {
        "samples": len(found),
        "tokens": mean(values("tokens")),
        "full_tokens": mean(values("full_tokens")),
        "saturated": sum(values("saturated")),
        "accuracy": mean(right),
        "accuracy_interval": list(wilson(sum(right), len(right))) if right else None,
        "agreement": mean(values("agrees")),
        "flips": {name: flips.count(name) for name in FLIPS},
        "nll_shift": mean(values("nll_shift")),
        "first_token_kl": mean(values("first_token_kl")),
        "first_token_js": mean(values("first_token_js")),
        "ipr_shift": mean(values("ipr_shift")),
        "evidence": mean(values("evidence")),
        "base_evidence": mean(values("base_evidence")),
        "evidence_samples": len(values("evidence")),
        "encode_ms": median(values("encode_ms")),
        "selection_ms": median(values("selection_ms")),
        "prefill_ms": median(values("prefill_ms")),
    }


def _difference(found: list[dict[str, Any]], against: list[dict[str, Any]] | None) -> dict[str, Any]:
    """Accuracy minus the baseline's, over the samples that both have."""
    other = {record["id"]: record["correct"] for record in against or [] if "correct" in record}
    pairs = [(r["correct"], other[r["id"]]) for r in found if "correct" in r and r["id"] in other]
    if not pairs:
        return {"versus_baseline": None}
    gap, low, high = paired_bootstrap([a for a, _ in pairs], [b for _, b in pairs])
    return {"versus_baseline": {"difference": gap, "interval": [low, high], "pairs": len(pairs)}}


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
    ruler = Console(width=1000)
    for count in range(len(EXPENDABLE) + 1):
        tables = rich_tables(summary, EXPENDABLE[:count])
        if all(ruler.measure(table).maximum <= width for table in tables):
            break
    present = [name for name, _ in columns(summary)]
    return tables, [name for name in EXPENDABLE[:count] if name in present]


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


def write_report(run: Path) -> dict[str, Any]:
    """Writes ``table.md`` and ``results.json`` beside the records; returns the summary."""
    summary = summarize(run)
    write_json(run / "results.json", summary)
    write_text(run / "table.md", markdown(summary) + "\n" + footnotes(summary, run) + "\n")
    return summary


def _tasks(summary: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["task"] for row in summary["rows"]))


def _best(rows: list[dict[str, Any]]) -> set[int]:
    """Rows with the highest accuracy of their budget (evidence where nothing was answered); ties too, unless all tie."""
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
    return f"{100 * row['evidence']:.0f} ({100 * row['base_evidence']:.0f})"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
