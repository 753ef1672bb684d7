"""`selector show`: a PNG with a row an image and budget, and a panel a selector; and what it shows in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selector.errors import UsageError
from selector.evaluation import gallery, loading, picture
from selector.evaluation.commands.common import load_all, pages, positive, whole
from selector.evaluation.tasks.sample import Sample
from selector.images import open_image


def run(settings: dict[str, Any]) -> int:
    budgets = loading.parse_budgets(settings["keep"], settings["scope"], settings["newlines"])
    out = Path(settings["out"])
    if out.suffix.lower() != ".png":
        raise UsageError(f"out must be the name of a PNG file, got {settings['out']!r}")
    question = settings["question"]
    samples = [Sample(name, open_image(Path(name)), question, None, ()) for name in settings.get("images", [])]
    samples = samples or pages(whole("seed", settings["seed"]))
    limit = positive("max_new_tokens", settings["max_new_tokens"])
    positions = loading.check_positions(settings["positions"])
    model, processor, selectors = load_all(settings)
    strips = []
    for sample in samples:
        for strip, words in gallery.strips(
            model,
            processor,
            selectors,
            budgets,
            sample,
            max_new_tokens=limit,
            positions=positions,
            scores=settings["scores"],
        ):
            strips.append(strip)
            for line in words:
                print(line)
    page = picture.stack(strips, heading=f"{settings['model']}: what stays of the visual tokens")
    out.parent.mkdir(parents=True, exist_ok=True)
    page.save(out)
    print(f"{out}: {page.width} x {page.height}, {len(strips)} rows of {len(selectors) + 1} panels")
    return 0
