"""Tables on the terminal. Imports no torch: a table of stored records should come at once."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from selector.evaluation import report, tables

WIDTH = 180
"""Columns of a table that goes to a file or a pipe."""


def print_report(run: Path) -> None:
    summary = report.write_report(run)
    terminal = console()
    fitting, left_out = tables.fitting_tables(summary, terminal.width)
    for table in fitting:
        terminal.print(table)
    if left_out:
        terminal.print(f"Too narrow for {', '.join(left_out)}: see {run / 'table.md'}.", highlight=False)
    terminal.print(tables.footnotes(summary, run), highlight=False, markup=False, soft_wrap=True)


def console() -> Console:
    """The terminal at its own width, a file or a pipe at `WIDTH`."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=WIDTH)
