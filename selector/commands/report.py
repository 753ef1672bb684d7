"""`selector report`: the table and the page of one or several runs, from their records alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selector.commands.printing import print_report
from selector.errors import UsageError


def run(settings: dict[str, Any]) -> int:
    """Writes the report of one or several runs, and prints their tables.

    Args:
        settings: ``runs``, names of folders, and perhaps ``out``, the page to write.

    Returns:
        The exit code, 0.

    Raises:
        UsageError: a folder that is no run, or a place that cannot be written to.
    """
    runs = [Path(name) for name in settings["runs"]]
    out = settings.get("out")
    # The Markdown is written next to it, under the same name: an ".md" here would be overwritten.
    if out is not None and Path(out).suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"out must be the name of an HTML file, got {out!r}")
    if out is None and len(runs) > 1:  # a page on several runs belongs to none of them
        out = "report.html"
    print_report(runs, None if out is None else Path(out))
    return 0
