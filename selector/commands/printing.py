"""Tables on the terminal. Imports no torch: a table of stored records should come at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from selector.report import tables
from selector.report.summary import write_report

WIDTH = 210
"""Columns of a table that goes to a file or a pipe."""


def print_report(runs: Sequence[Path], out: Path | None = None) -> None:
    summaries, page = write_report(runs, out)
    terminal = console()
    for run, summary in zip(runs, summaries, strict=True):
        fitting, left_out = tables.fitting_tables(summary, terminal.width)
        for table in fitting:
            terminal.print(table)
        if left_out:
            terminal.print(f"Too narrow for {', '.join(left_out)}: see {page}.", highlight=False)
        terminal.print(tables.footnotes(summary, run), highlight=False, markup=False, soft_wrap=True)
    terminal.print(f"Report: {page}", highlight=False, markup=False, soft_wrap=True)


def console() -> Console:
    """The terminal at its own width, a file or a pipe at `WIDTH`."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=WIDTH)
