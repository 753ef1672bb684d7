"""`selector bench`: one table of times and ratios per budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from selector.commands import loading
from selector.commands.common import choose, load_all, pages, positive, whole
from selector.commands.printing import console
from selector.errors import UsageError
from selector.images import open_image
from selector.measure import speed


def run(settings: dict[str, Any]) -> int:
    """Times every selector at every budget on one image, a table per budget.

    Args:
        settings: by the names of ``DEFAULTS["bench"]`` in `selector.cli`.

    Returns:
        The exit code, 0.

    Raises:
        UsageError: a setting out of its range, or a budget that removes nothing from the image.
    """
    # Mistakes in the settings are errors before a model is loaded.
    budgets = loading.parse_budgets(settings["keep"], settings["scope"], settings["newlines"])
    repeats = positive("repeats", settings["repeats"])
    # Any image will do: times depend on the number of tiles, not on what it shows.
    image = (
        open_image(Path(settings["image"])) if settings["image"] else pages(whole("seed", settings["seed"]))[0].image
    )

    model, processor, selectors = load_all(settings, choose(settings))

    terminal = console()
    for budget in budgets:
        try:
            result = speed.measure(model, processor, selectors, budget, image, repeats)
        except ValueError as error:
            # Only now is it known how many tokens the image has.
            raise UsageError(f"keep={budget}: {error}") from error
        where = f"{model.device.type}, {torch.get_num_threads()} threads"
        terminal.print(speed.table(result, f"{settings['model']} · keep {budget} · {where} · median of {repeats}"))
    return 0
