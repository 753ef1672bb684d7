"""`selector report`: the table and the page of one or several runs, from their records alone."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selector.commands.printing import print_report
from selector.errors import UsageError
from selector.files import check_output
from selector.report.submission import EXCEL, Line, can_write_excel, submissions, write_submission


def run(settings: dict[str, Any]) -> int:
    """Writes the report of one or several runs, and prints their tables.

    Args:
        settings: ``runs``, names of folders, and perhaps ``out``, the page to write, and ``submission``, a folder.

    Returns:
        The exit code, 0.

    Raises:
        UsageError: a folder that is no run, a place that cannot be written to, or a run that is not to be submitted.
    """
    runs = [Path(name) for name in settings["runs"]]
    out = settings.get("out")
    # The Markdown is written next to it, under the same name: an ".md" here would be overwritten.
    if out is not None and Path(out).suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"out must be the name of an HTML file, got {out!r}")
    if out is None and len(runs) > 1:  # a page on several runs belongs to none of them
        out = "report.html"

    # Refused before anything is written.
    folder = settings.get("submission")
    if folder is not None and len(runs) > 1:
        raise UsageError(f"submission must be of one run, got {', '.join(settings['runs'])}")
    sheets = {} if folder is None else submissions(runs[0])
    if folder is not None:
        check_output(Path(folder))

    print_report(runs, None if out is None else Path(out))
    if folder is not None:
        _submit(sheets, Path(folder))
    return 0


def _submit(sheets: Mapping[str, Sequence[Line]], folder: Path) -> None:
    """Writes the submission files, as Excel where that can be written, and names them."""
    ending = ".xlsx" if can_write_excel() else ".tsv"
    for name, lines in sheets.items():
        path = folder / f"{name}{ending}"
        write_submission(lines, path)
        print(f"Submission: {path} ({len(lines)} lines)")
    if ending == ".tsv":
        print(
            f"selector report: tab-separated, since openpyxl is not installed; the server takes .xlsx: {EXCEL}",
            file=sys.stderr,
        )
