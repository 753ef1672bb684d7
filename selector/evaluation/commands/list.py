"""`selector list`: the shipped methods, and the checkpoints within reach."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from typing import Any

from rich.table import Table

from selector.base import ScoreSelector
from selector.evaluation.commands.printing import console
from selector.evaluation.loading import find_folder
from selector.registry import available_selectors


def run(settings: dict[str, Any]) -> int:
    table = Table(title="selectors", title_justify="left", title_style="bold")
    for header in ("name", "paper", "trained", "needs", "what it does"):
        table.add_column(header, no_wrap=header == "name")
    for name, cls in available_selectors().items():
        what = (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")
        kind = "" if issubclass(cls, ScoreSelector) else " (chooses a set)"
        needs = ", ".join(sorted(cls.needs)) or "nothing"
        table.add_row(name, cls.paper, "yes" if cls.learned else "no", needs, what + kind)
    terminal = console()
    terminal.print(table)
    for folder, class_path in _checkpoints():
        terminal.print(f"checkpoint {folder}: {class_path}", highlight=False)
    return 0


def _checkpoints() -> Iterator[tuple[str, str]]:
    root = find_folder("checkpoints")
    for config in sorted(root.glob("*/config.json")) if root else []:
        class_path = json.loads(config.read_text(encoding="utf-8")).get("class_path")
        if class_path:
            yield f"checkpoints/{config.parent.name}", class_path
