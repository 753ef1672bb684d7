"""The table "On tasks" of a checkpoint's card, from distilled standings.

python -m selector.report.cards configs/compare/standings.json selector-llava-next-tiny ridge-leverage lofi random
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selector.errors import UsageError
from selector.report.statistics import wilson

HEADERS = {"0.25": "25%"}
"""Headers of columns whose budget reads better in another form."""


def table(data: dict[str, Any], label: str, others: Sequence[str]) -> str:
    """Markdown: right answers in % [95% Wilson], and in brackets the answers that stayed the same, in %.

    Args:
        data: see `selector.report.standings.distil`.
        label: the selector whose card it is; its rows say "this one".
        others: what stands beside it.

    Raises:
        UsageError: a selector that the data lacks.
    """
    rows: dict[tuple[str, str, Any], Any] = {(row["task"], row["selector"], row["keep"]): row for row in data["rows"]}
    known = {selector for _, selector, _ in rows}
    if missing := [name for name in (label, *others) if name not in known]:
        raise UsageError(f"selectors must be among those of the standings, {', '.join(missing)} is not")

    tasks = list(dict.fromkeys(task for task, _, _ in rows))
    keeps: list[str] = list(dict.fromkeys(keep for _, _, keep in rows if keep))
    lines = [
        "| task | selector | all tokens | " + " | ".join(HEADERS.get(keep, keep) for keep in keeps) + " |",
        "|---|---|---|" + "---|" * len(keeps),
    ]
    for task in tasks:
        for name in (label, *others):
            cells = [_right(rows[task, "full", None])]
            cells += [f"{_right(rows[task, name, keep])} ({_same(rows[task, name, keep])})" for keep in keeps]
            lines.append(f"| {task} | {'this one' if name == label else name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _right(row: dict[str, Any]) -> str:
    right, asked = row["right"].count("1"), len(row["right"])
    low, high = wilson(right, asked)
    return f"{100 * right / asked:.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def _same(row: dict[str, Any]) -> str:
    return f"{100 * row['same'].count('1') / len(row['same']):.0f}"


def main() -> int:
    """Entry point of ``python -m selector.report.cards``."""
    parser = argparse.ArgumentParser(prog="python -m selector.report.cards", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("standings", type=Path, help="distilled standings, a JSON")
    parser.add_argument("selector", help="label of the selector whose card it is")
    parser.add_argument("others", nargs="*", metavar="LABEL", help="selectors beside it")
    options = parser.parse_args()
    try:
        print(table(json.loads(options.standings.read_text(encoding="utf-8")), options.selector, options.others))
    except (UsageError, OSError, ValueError) as error:
        print(f"selector.report.cards: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
