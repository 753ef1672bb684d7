"""What a benchmark's server scores where the answers are not public: a table of predictions, one file per row of a run.

MMBench takes an Excel file with the columns index, question, A, B, C, D and prediction. Imports no torch.
"""

from __future__ import annotations

import csv
import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from selector.errors import UsageError
from selector.files import atomic, output
from selector.record import Record
from selector.report.summary import read_run

EXCEL = "pip install 'visual-token-selector[benchmarks]'"
"""How openpyxl is installed, which writes Excel files."""
Line = Mapping[str, str]
"""One line of a submission file: text by column."""


def submissions(run: Path) -> dict[str, list[Line]]:
    """The tables that a finished run has for a server.

    Args:
        run: a folder that `selector compare` wrote, with a task that a server scores and ``--samples all``.

    Returns:
        Lines by the name of a file, without its ending: task, selector and budget. The prediction is the answer as it
        was given; the server looks for the option in it.

    Raises:
        UsageError: no run, no such task in it, one that is not finished, or a part of the samples.
    """
    plan, tables = read_run(run)
    records = {row: some for row, some in tables.items() if any("submission" in record for record in some)}
    if not records:
        raise UsageError(
            f"submission must be of a run with answers to a task that a server scores (hf:mmbench-test), {run} has none"
        )

    tasks = {task for task, _, _ in records}
    # A server counts what is not there as wrong, so a part would look like a score.
    if plan["samples"] is not None:
        raise UsageError(f"submission must be of a run with --samples all, {run} has {plan['samples']}")
    if left_out := sorted(tasks.intersection(plan["unreadable"])):
        raise UsageError(f"submission must have every question, images of {', '.join(left_out)} were left out in {run}")
    for unmet in plan["unmet"]:
        if unmet["task"] in tasks:
            raise UsageError(
                f"submission must have an answer to every question, {unmet['selector']} cannot meet {unmet['keep']} "
                f"on {unmet['images']} of them in {run}"
            )

    sheets: dict[str, list[Line]] = {}
    for (task, label, keep), some in tables.items():
        if task not in tasks:
            continue
        wanted = plan["tasks"][task]["samples"]
        if len(some) != wanted:
            raise UsageError(
                f"submission must be of a finished run, {label} at {keep or 'all tokens'} in {run} has {len(some)} of "
                f"{wanted} samples: the same `selector compare` goes on from there"
            )
        name = _file_name(task, label, keep)
        if name in sheets:
            raise UsageError(f"submission must have a file per row, two are called {name!r}: NAME=SPEC renames one")
        sheets[name] = [_line(record) for record in some]
    return sheets


def can_write_excel() -> bool:
    """Whether openpyxl is installed."""
    return importlib.util.find_spec("openpyxl") is not None


def write_submission(lines: Sequence[Line], path: Path) -> None:
    """Writes a table, whole or not at all.

    Args:
        lines: all with the columns of the first; there is at least one.
        path: ending in ``.xlsx`` (which needs openpyxl) or ``.tsv``.

    Raises:
        UsageError: a place that cannot be written to.
    """
    columns = list(lines[0])
    rows = [[_value(name, line[name]) for name in columns] for line in lines]
    with output(path), atomic(path) as partial:
        if path.suffix == ".xlsx":
            _write_excel([columns, *rows], partial)
            return
        with partial.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, dialect="excel-tab", lineterminator="\n").writerows([columns, *rows])


def _line(record: Record) -> Line:
    return {**record["submission"], "prediction": record["answer"]}


def _value(name: str, text: str) -> str | int:
    """A cell. The server knows questions by their number, and a number as text is another key."""
    return int(text) if name == "index" and text.isdecimal() else text


def _file_name(task: str, label: str, keep: str | None) -> str:
    """Such as "mmbench-test-random-0.25"; whatever may not stand in a file's name is a hyphen."""
    short = re.split(r"[/=:]", task)[-1]
    return re.sub(r"[^\w.=-]+", "-", "-".join([short, label, *([keep] if keep else [])]))


def _write_excel(rows: Sequence[Sequence[str | int]], path: Path) -> None:
    from openpyxl import Workbook  # pyright: ignore[reportMissingModuleSource, reportMissingImports]
    from openpyxl.cell import WriteOnlyCell  # pyright: ignore[reportMissingModuleSource, reportMissingImports]
    from openpyxl.cell.cell import (  # pyright: ignore[reportMissingModuleSource, reportMissingImports]
        ILLEGAL_CHARACTERS_RE,
    )

    book = Workbook(write_only=True)
    sheet = book.create_sheet()
    for row in rows:
        # Excel cannot hold control characters, which a model may well say.
        values = [ILLEGAL_CHARACTERS_RE.sub("\N{REPLACEMENT CHARACTER}", v) if isinstance(v, str) else v for v in row]
        cells = [WriteOnlyCell(sheet, value) for value in values]
        # An answer that begins with "=" is no formula.
        for cell, value in zip(cells, values, strict=True):
            if isinstance(value, str):
                cell.data_type = "s"
        sheet.append(cells)
    book.save(path)
