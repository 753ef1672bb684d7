"""How the figures of a run are shown: on the terminal, in Markdown, and in words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from selector.report.columns import (
    AVERAGED,
    KEEP,
    POOLED,
    SAMPLES,
    SELECTOR,
    Column,
    Figures,
    Summary,
    consistency_columns,
    cost_columns,
    legend,
    main_columns,
    scored,
    share_of,
)
from selector.report.findings import sentences

MOST_NAMES = 6
"""Rows that a line names at most."""
EXPENDABLE = ("ANLS", "vs full", "w→r", "r→w", "n", "ΔNLL", "select ms", "prefill ms", "same %", "evidence % (base)")
"""Columns that a narrow terminal does without, in the order in which they go; the report has them all."""


def fitting_tables(summary: Summary, width: int) -> tuple[list[Table], list[str]]:
    """The tables with as many columns as `width` characters hold, and the headers of the columns left out."""
    ruler, present = Console(width=1000), [column.header for column in main_columns(summary)]

    # Measured, not estimated: a column is as wide as its widest cell. None first tries all of them.
    dropped: list[str] = []
    for name in (None, *(name for name in EXPENDABLE if name in present)):
        dropped += [name] if name else []
        tables = rich_tables(summary, dropped)
        if all(ruler.measure(table).maximum <= width for table in tables):
            return tables, dropped
    return rich_tables(summary, dropped), dropped  # too wide even so: the terminal cuts


def rich_tables(summary: Summary, without: Sequence[str] = ()) -> list[Table]:
    """One table per task (and one of all, where a budget is an average), grouped by budget, the best of each in bold.

    Args:
        summary: the figures of a run, see `selector.report.summary.summarize`.
        without: headers of columns to leave out.
    """
    tables = []
    for task in tables_of(summary):
        rows = rows_of(summary, task)
        title = " · ".join([task, str(summary["model"]), *([done(summary, task)] if done(summary, task) else [])])
        table = Table(title=Text(title), title_justify="left", title_style="bold")
        shown = [column for column in main_columns(summary, task) if column.header not in without]
        for column in shown:
            side = "left" if column in (KEEP, SELECTOR) else "right"
            # The name of the baseline is in a header, and may hold brackets, which rich would read as markup.
            table.add_column(escape(column.header), justify=side, no_wrap=True)

        best = best_rows(rows)
        for i, row in enumerate(rows):
            group_ends = i + 1 < len(rows) and share_of(rows[i + 1]["keep"]) != share_of(row["keep"])
            style = "dim" if row["keep"] is None else ("bold green" if id(row) in best else None)
            table.add_row(*(Text(column.text(row)) for column in shown), style=style, end_section=group_ends)
        tables.append(table)
    return tables


def markdown(runs: Mapping[str, Summary]) -> str:
    """The report in Markdown: every table of every run, the notes, and what the columns mean.

    Args:
        runs: summaries by the name of the run.
    """
    lines = []
    for name, summary in runs.items():
        lines += [plain(f"# {name}: comparison on {summary['model']}"), "", plain(settings_line(summary)), ""]
        for task in summary["tasks"]:
            findings = " ".join(sentences([row for row in summary["rows"] if row["task"] == task]))
            lines += [plain(f"## {task}"), "", *([plain(findings), ""] if findings else [])]
            lines += [*_markdown_table(summary, task, main_columns(summary, task)), ""]
            for title, columns in (("consistency", consistency_columns(summary)), ("cost", cost_columns(summary))):
                if len(columns) > 3:  # more than budget, selector and tokens
                    lines += [plain(f"### {task}: {title}"), "", *_markdown_table(summary, task, columns), ""]
        if summary["pooled"]:
            lines += [f"## {POOLED}", "", *_markdown_table(summary, POOLED, main_columns(summary)), ""]
        lines += [f"- {plain(note)}" for note in notes(summary)] + [""]

    terms = "; ".join(f"*{plain(header)}*: {note}" for header, note in meanings(runs).items())
    return "\n".join([*lines, f"Columns: {terms}."])


def meanings(runs: Mapping[str, Summary]) -> dict[str, str]:
    """What each column means, by its header; every column once, whichever run and table has it."""
    notes_of: dict[str, str] = {}
    for summary in runs.values():
        # A table has the metric of its task in a header; all tasks together may have several.
        each = [column for task in summary["tasks"] for column in main_columns(summary, task)]
        for column in (*main_columns(summary), *each, *consistency_columns(summary), *cost_columns(summary)):
            notes_of.setdefault(column.header, column.note)
    return notes_of


def _markdown_table(summary: Summary, task: str, columns: Sequence[Column]) -> list[str]:
    rows = rows_of(summary, task)
    best = best_rows(rows)
    lines = ["| " + " | ".join(plain(column.header) for column in columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [plain(column.text(row)) for column in columns]
        lines.append("| " + " | ".join(f"**{c}**" if id(row) in best and c else c for c in cells) + " |")
    return lines


def plain(text: str) -> str:
    """The text as Markdown that shows it and does nothing else: no tag, no link, no image that a viewer would fetch.

    Brackets around numbers, such as an interval, stay as they are.

    Example:
        >>> print(plain("50 [40, 60] <b> | ![x](http://example.org)"))
        50 [40, 60] &lt;b> \\| \\!\\[x](http://example.org)
    """
    # Questions and answers come from files and models. A line break would end a table's row.
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    text = re.sub(r"([\\`!|])", r"\\\1", text)
    return re.sub(r"\[(?![-+−\d., %]+\](?![(\[:]))", r"\\[", text)


def done(summary: Summary, task: str) -> str:
    """How much of a task is done, such as "partial: 2 of 8 samples"; nothing for a whole task."""
    lacks = summary.get("unfinished", {}).get(task)  # the pooled table is none of its tasks, which say so one by one
    return f"partial: {_span(lacks)}" if lacks else ""


def _span(lacks: Mapping[str, Any]) -> str:
    least, most = lacks["done"]
    return f"{least if least == most else f'{least} to {most}'} of {lacks['of']} samples"


def missing(task: str, lacks: Mapping[str, Any]) -> str:
    """One line on what an unfinished task lacks: shards, and the rows with the fewest samples.

    Example:
        >>> lacks = {"done": [1, 4], "of": 8, "shards": [["0/2", 3, 4], ["1/2", 4, 4]], "fewest": [["a", "9", 1]]}
        >>> missing("toy", lacks)
        'toy is partial: 1 to 4 of 8 samples. Shard 0/2 lacks 3 of 4, shard 1/2 all 4. Fewest: a at 9.'
    """
    parts = [f"shard {name} lacks {f'all {of}' if n == of else f'{n} of {of}'}" for name, n, of in lacks["shards"] if n]
    # The verb once.
    text = ", ".join([*parts[:1], *(part.replace(" lacks", "") for part in parts[1:])])
    lines = [f"{task} is partial: {_span(lacks)}", *([text[0].upper() + text[1:]] if text else [])]

    least, most = lacks["done"]
    if least < most:
        names = [label + (f" at {keep}" if keep else "") for label, keep, _ in lacks["fewest"]]
        more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        lines.append(f"Fewest: {', '.join(names[:MOST_NAMES])}{more}")
    return ". ".join(lines) + "."


def settings_line(summary: Summary) -> str:
    """The settings that figures depend on, in one line: samples, seed, machine and versions."""
    where = summary["environment"]
    # Without the machine and its threads, times mean nothing.
    number = "all samples" if summary["samples"] is None else f"{summary['samples']} samples per task"
    if summary.get("shards", 1) > 1:
        number += f" in {summary['shards']} shards"
    threads = f"{where['threads']} thread" + ("" if where["threads"] == 1 else "s")
    weights = f"{where['dtype']}, weights by {where['quantization']}" if "quantization" in where else where["dtype"]
    if where.get("batch_threads", where["threads"]) != where["threads"]:
        threads += f" ({where['batch_threads']} for batches)"
    return (
        f"{number}, seed {summary['seed']}; {where['device']}, {threads}, {weights}; "
        f"torch {where['torch']}, transformers {where['transformers']}"
    )


def notes(summary: Summary) -> list[str]:
    """What a reader must know besides the tables: positions, correlations, multiple testing, missing samples."""
    how = {"original": "those of the whole prompt, with gaps", "contiguous": "counted anew, without gaps"}
    lines = legend(summary)
    lines += scored(summary)
    if any(row["last_tokens"] is not None for row in summary["rows"]):
        lines.append(AVERAGED)
    lines.append(f"Position ids of pruned prompts: {how[summary['positions']]} ({summary['positions']}).")

    if summary.get("no_evidence"):
        lines.append(f"No evidence is measured, and no picture of what is kept: {summary['no_evidence']}.")

    for each in summary["correlations"]:
        if each["rank"] is not None and each["shift"] == "ipr_shift":
            where = f" on {each['task']}" if each["task"] else ""
            between = f" [{each['interval'][0]:+.2f}, {each['interval'][1]:+.2f}]" if each["interval"] else ""
            lines.append(
                f"Rank correlation of |ΔIPR| with agreement over {each['points']} rows{where}: "
                f"{each['rank']:+.2f}{between} (Spearman)."
            )

    tests = max((row["versus_full"]["tests"] for row in summary["rows"] if row["versus_full"]), default=0)
    if tests:
        lines.append(
            f"{tests} comparisons with the unpruned model are in this run: at 5% each, {0.05 * tests:.1f} would look "
            "real by chance; * marks those that stay below 5% after Holm's correction."
        )
    lines += spent_line(summary.get("spent", {}))
    lines += [missing(task, lacks) for task, lacks in summary.get("unfinished", {}).items()]
    for task, names in summary["unreadable"].items():
        lines.append(f"{task}: {len(names)} images cannot be read and are left out: {', '.join(names)}")

    for each in summary.get("unmet", []):
        lines.append(
            f"{each['task']}: {each['selector']} cannot meet keep={each['keep']} on {each['images']} of "
            f"{each['samples']} images; all could meet {each['least']}. The row is left out."
        )

    saturated = sum(row["saturated"] for row in summary["rows"])
    if saturated:
        lines.append(f"{saturated} records are saturated: the image has no more tokens than the budget, so all stayed.")
    return lines


def spent_line(seconds: Mapping[str, float]) -> list[str]:
    """What the time of a run went into, the most first; no line where nothing was noted.

    >>> spent_line({"encode": 3.0, "prefill": 9.0, "flops": 0.0})
    ['Time: 12 s, of which prefill 75%, encode 25%.']
    """
    total = sum(seconds.values())
    shares = sorted(((value / total, name) for name, value in seconds.items()), reverse=True) if total > 0 else []
    parts = [f"{name} {100 * share:.0f}%" for share, name in shares if share >= 0.005]
    return [f"Time: {total:,.0f} s, of which {', '.join(parts)}."] if parts else []


def footnotes(summary: Summary, run: Path) -> str:
    """Below the tables of the terminal: what their columns mean, the notes, and where the records are."""
    columns = [c for c in main_columns(summary) if c not in (KEEP, SELECTOR, SAMPLES)]
    terms = "; ".join(f"{column.header}: {column.note}" for column in columns)
    return "\n".join([terms, *notes(summary), f"Records: {run}"])


def tables_of(summary: Summary) -> list[str]:
    """The tasks, and all of them together where a budget is a share on average."""
    return [*summary["tasks"], *([POOLED] if summary["pooled"] else [])]


def rows_of(summary: Summary, task: str) -> list[Figures]:
    """The rows of one task, or of all tasks together (`POOLED`)."""
    return [row for row in (*summary["rows"], *summary["pooled"]) if row["task"] == task]


def best_rows(rows: Sequence[Figures]) -> set[int]:
    """The most accurate rows of each budget (by evidence where nothing was answered); ties too, but not if all tie.

    A share on average competes with the fixed share over all tasks only: task by task it keeps more or less.

    Returns:
        The ``id`` of each such row, which is a dictionary and has no hash.
    """
    best = set()
    field = "accuracy" if any(row["accuracy"] is not None for row in rows) else "evidence"

    budget_of = [share_of(row["keep"]) if row["task"] == POOLED else row["keep"] for row in rows]
    for keep in set(budget_of) - {None}:
        group = [row for row, own in zip(rows, budget_of, strict=True) if own == keep and row[field] is not None]
        top = max((row[field] for row in group), default=None)
        winners = {id(row) for row in group if row[field] == top}
        best |= winners if len(winners) < len(group) else set()
    return best
