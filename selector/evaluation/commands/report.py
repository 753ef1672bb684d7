"""`selector report`: the table of a run folder again, from its records alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selector.evaluation.commands.printing import print_report


def run(settings: dict[str, Any]) -> int:
    print_report(Path(settings["run"]))
    return 0
