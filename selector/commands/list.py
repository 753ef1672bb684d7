"""`selector list`: the shipped methods, and the checkpoints within reach; as the README's table with ``--markdown``."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from typing import Any

from selector.commands.loading import find_folder
from selector.registry import available_selectors

HEADERS = ("name", "paper", "trained", "needs", "acts", "time", "rule")


def run(settings: dict[str, Any]) -> int:
    if settings.get("markdown"):
        print(markdown())
        return 0
    from rich.table import Table

    from selector.commands.printing import console

    table = Table(title="selectors", title_justify="left", title_style="bold")
    for header in HEADERS:
        table.add_column(header, no_wrap=header == "name")
    for row in rows():
        table.add_row(*row)
    terminal = console()
    terminal.print(table)
    terminal.print("time: an image; N tokens, D channels, K kept, W inner width, P pivots", highlight=False)
    for folder, class_path in _checkpoints():
        terminal.print(f"checkpoint {folder}: {class_path}", highlight=False, markup=False)
    return 0


def rows() -> Iterator[tuple[str, ...]]:
    """One a method: what it says of itself."""
    for name, cls in available_selectors().items():
        rule = (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")
        acts = f"{cls.acts} the LM" + (", merges" if cls.merges else "")
        needs = "as its parts" if cls.paper == "composition" else ", ".join(sorted(cls.needs)) or "nothing"
        yield name, cls.paper, "yes" if cls.learned else "no", needs, acts, cls.cost, rule


def markdown() -> str:
    """The table of the README."""
    lines = ["| " + " | ".join(HEADERS) + " |", "|---" * len(HEADERS) + "|"]
    for name, *rest in rows():
        lines.append(f"| `{name}` | " + " | ".join(rest) + " |")
    return "\n".join(lines)


def _checkpoints() -> Iterator[tuple[str, str]]:
    root = find_folder("checkpoints")
    for config in sorted(root.glob("*/config.json")) if root else []:
        try:
            about = json.loads(config.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue  # of something else: a list is not the place to complain
        if isinstance(about, dict) and isinstance(about.get("class_path"), str):
            yield f"checkpoints/{config.parent.name}", about["class_path"]
