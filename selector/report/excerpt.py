"""Some figures of a run as one small file: what a page quotes is committed beside it, without the run.

    python -m selector.report.excerpt runs/real --fields evidence evidence_interval --out configs/compare/real.json

`selector.report.standings` does the same for answers, sample by sample.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from selector.errors import UsageError
from selector.files import output, write_json
from selector.report.summary import summarize

NAMES = ("task", "selector", "keep", "samples")
"""What every row holds: which it is, and of how many samples."""


def excerpt(run: Path, fields: list[str]) -> dict[str, Any]:
    """The model, the seed, and of every row its name and the figures asked for.

    Args:
        run: a folder that `selector compare` wrote.
        fields: names of figures, as in the run's ``results.json``.

    Raises:
        UsageError: no run there, or a field that its rows lack.
    """
    summary = summarize(run)
    rows = summary["rows"]

    # Named before anything is written: a misspelt field would be a column of nothing.
    if missing := [name for name in fields if any(name not in row for row in rows)]:
        raise UsageError(f"fields must be among those of results.json, {', '.join(missing)} is not")

    return {
        "model": summary["model"],
        "seed": summary["seed"],
        "rows": [
            {"task": _short(row["task"])} | {name: _rounded(row[name]) for name in (*NAMES[1:], *fields)}
            for row in rows
        ],
        "correlations": [
            _rounded(each) | {"task": each["task"] and _short(each["task"])} for each in summary["correlations"]
        ],
    }


def _short(task: str) -> str:
    """A task by its name, a folder without the path that it had on the machine that measured it."""
    kind, _, path = task.partition(":")
    return Path(path.partition("?")[0]).name if kind == "folder" else task


def _rounded(value: Any) -> Any:
    """The value with every float rounded to four decimals, more than any table shows."""
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def main() -> int:
    """Entry point of ``python -m selector.report.excerpt``."""
    words = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m selector.report.excerpt", description=words)
    parser.add_argument("run", type=Path, help="a folder that `selector compare` wrote")
    parser.add_argument("--fields", nargs="+", required=True, metavar="NAME", help="figures of results.json")
    parser.add_argument("--out", type=Path, required=True, metavar="JSON")
    options = parser.parse_args()
    try:
        with output(options.out):
            write_json(options.out, excerpt(options.run, options.fields))
    except UsageError as error:
        print(f"selector.report.excerpt: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
