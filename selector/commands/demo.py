"""`selector demo`: a page on this machine that shows what selectors keep of an image, and what is answered then."""

from __future__ import annotations

import os
import tempfile
from typing import Any

from selector.commands import loading
from selector.commands.common import SMALL, choose, load_all, positive, whole
from selector.errors import UsageError
from selector.show import interface
from selector.show.demo import Demo


def run(settings: dict[str, Any]) -> int:
    """Serves the page until it is interrupted.

    Args:
        settings: by the names of ``DEFAULTS["demo"]`` in `selector.cli`.

    Returns:
        The exit code, 0.

    Raises:
        UsageError: a setting out of its range, a model or selector that cannot be loaded, no gradio, or a taken port.
    """
    # Mistakes in the settings, and a missing library, are errors before a model is loaded.
    budgets = loading.parse_budgets(settings["keep"], settings["scope"], settings["newlines"])
    share = budgets[0].keep
    if len(budgets) != 1 or not isinstance(share, int | float):
        raise UsageError(f"keep must be one count or share, where the slider starts, got {settings['keep']}")
    port = whole("port", settings["port"])
    if not 0 <= port < 65536:
        raise UsageError(f"port must be in 0..65535, got {port}")
    limit, seed = positive("max_new_tokens", settings["max_new_tokens"]), whole("seed", settings["seed"])
    positions = loading.check_positions(settings["positions"])
    interface.gradio()

    model, processor, selectors = load_all(settings, choose(settings))
    demo = Demo(model, processor, selectors, budgets[0], positions=positions, max_new_tokens=limit)

    # What is dropped into the page is stored by gradio, and goes when the server does.
    with tempfile.TemporaryDirectory(prefix="selector-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        # A large model answers when it is asked to, not whenever somebody opens the page.
        small = sum(weight.numel() for weight in model.parameters()) < SMALL
        blocks = interface.build(demo, settings["model"], share, seed, at_once=small)
        print(f"{interface.serve(blocks, port, settings['share'])} (Ctrl+C ends it)", flush=True)
        blocks.block_thread()
    return 0
