"""`selector list`: the shipped methods, and the checkpoints within reach; as Markdown with ``--markdown``."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from typing import Any

from selector.commands.loading import find_folder
from selector.registry import available_selectors

HEADERS = ("name", "paper", "trained", "needs", "dropped ones", "time", "rule")


def run(settings: dict[str, Any]) -> int:
    """Prints the methods and the checkpoints.

    Args:
        settings: ``markdown`` prints the table of methods as Markdown, and nothing else.

    Returns:
        The exit code, 0.
    """
    if settings.get("markdown"):
        print(markdown())
        return 0
    # Imported here: the Markdown needs no terminal.
    from rich.table import Table

    from selector.commands.printing import console

    table = Table(title="selectors", title_justify="left", title_style="bold")
    for header in HEADERS:
        table.add_column(header, no_wrap=header == "name")
    for row in rows():
        table.add_row(*row)

    terminal = console()
    terminal.print(table)
    terminal.print("time: per image; N tokens, D channels, K kept, W inner width, P pivots", highlight=False)
    for folder, class_path in _checkpoints():
        terminal.print(f"checkpoint {folder}: {class_path}", highlight=False, markup=False)
    return 0


def rows() -> Iterator[tuple[str, ...]]:
    """One row per method, from what its class says of itself: the cells below `HEADERS`."""
    for name, cls in available_selectors().items():
        # The first paragraph of the docstring is the rule.
        rule = (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")
        dropped = "are merged" if cls.merges else "are gone"
        # A composition needs what the selectors in it need, which its class cannot know.
        needs = "as its parts" if cls.paper == "composition" else ", ".join(sorted(cls.needs)) or "nothing"
        yield name, cls.paper, "yes" if cls.learned else "no", needs, dropped, cls.cost, rule


def markdown() -> str:
    """The methods as a Markdown table, which ``selector/methods/README.md`` shows."""
    lines = ["| " + " | ".join(HEADERS) + " |", "|---" * len(HEADERS) + "|"]
    for name, *rest in rows():
        lines.append(f"| `{name}` | " + " | ".join(rest) + " |")
    return "\n".join(lines)


def _checkpoints() -> Iterator[tuple[str, str]]:
    """(folder, class) of every selector checkpoint below ``checkpoints``."""
    root = find_folder("checkpoints")
    for config in sorted(root.glob("*/config.json")) if root else []:
        try:
            about = json.loads(config.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue  # no checkpoint of ours: a list is not the place for errors about it
        if isinstance(about, dict) and isinstance(about.get("class_path"), str):
            yield f"checkpoints/{config.parent.name}", about["class_path"]
