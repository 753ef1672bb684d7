"""A plugin of lmms-eval: its benchmarks on a model whose visual tokens a selector chooses.

lmms-eval finds `manifest` by the entry point ``lmms_eval.models`` of this package. `answers` asks a model and knows
nothing of lmms-eval; `model` has the two classes that lmms-eval runs. Nothing else of this package imports either.
"""

from __future__ import annotations

from typing import Any

NAME = "selector_llava_next"
"""What ``python -m lmms_eval --model`` calls it."""


def manifest() -> Any:
    """What lmms-eval is told of the plugin: its name, and where its simple and its chat class are."""
    # Here: the entry point is loaded while lmms-eval imports itself, and must not need more of it than this.
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    home = f"{__name__}.model"
    return ModelManifest(NAME, simple_class_path=f"{home}.SelectorSimple", chat_class_path=f"{home}.SelectorChat")
