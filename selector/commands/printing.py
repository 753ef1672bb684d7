"""Tables on the terminal. Imports no torch, so that a table of stored records comes at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from selector.report import tables
from selector.report.summary import write_report

WIDTH = 210
"""Characters per line of a table that goes to a file or a pipe."""


def print_report(runs: Sequence[Path], out: Path | None = None) -> None:
    """Writes the report of some runs, and prints their tables as far as they fit.

    Args:
        runs: folders that `selector compare` wrote.
        out: see `selector.report.summary.write_report`.

    Raises:
        UsageError: a folder that is no run, or a place that cannot be written to.
    """
    summaries, page = write_report(runs, out)
    terminal = console()
    for run, summary in zip(runs, summaries, strict=True):
        fitting, left_out = tables.fitting_tables(summary, terminal.width)
        for table in fitting:
            terminal.print(table)
        if left_out:
            terminal.print(f"Too narrow for {', '.join(left_out)}: see {page}.", highlight=False)
        # Plain text: names may hold brackets, and a terminal breaks lines by itself.
        terminal.print(tables.footnotes(summary, run), highlight=False, markup=False, soft_wrap=True)
    terminal.print(f"Report: {page}", highlight=False, markup=False, soft_wrap=True)


def console() -> Console:
    """The terminal at its own width, a file or a pipe at `WIDTH`."""
    terminal = Console()  # which would take a pipe for 80 characters wide
    return terminal if terminal.is_terminal else Console(width=WIDTH)
