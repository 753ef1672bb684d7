"""What ships beside the code: ``checkpoints/`` and ``configs/``, at the root of a clone or inside a wheel."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
INSTALLED = PACKAGE / "shipped"
"""Where a wheel has them, by ``[tool.hatch.build.targets.wheel]`` of ``pyproject.toml``; a clone has no such folder."""
ROOT = INSTALLED if INSTALLED.is_dir() else PACKAGE.parent


def candidates(name: str) -> tuple[Path, Path]:
    """Where a file or folder of that name may be: relative to the current folder, or else among what ships."""
    return Path(name), ROOT / name
