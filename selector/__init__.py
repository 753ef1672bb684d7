"""Visual-token selection for vision-language models. See README.md for the ten-line tour.

Names are imported on first use, so that ``import selector`` (and ``selector --help``) costs nothing; ``__init__.pyi``
lists them.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

# One list for type checkers and for Python: the stub is read instead of repeated. Parsing it takes about a millisecond.
_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_HOME = {
    alias.name: str(line.module) for line in _STUB.body if isinstance(line, ast.ImportFrom) for alias in line.names
}
__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'selector' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
