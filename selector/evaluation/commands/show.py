"""`selector show`: a PNG with a row an image and budget, and a panel a selector."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from selector.evaluation import loading, picture
from selector.evaluation.answering import answer, prepare
from selector.evaluation.commands.common import load_all, pages, positive, whole
from selector.evaluation.errors import UsageError
from selector.evaluation.evidence import evidence, model_rectangles
from selector.evaluation.metrics import exact_match
from selector.evaluation.tasks.folder import open_image
from selector.evaluation.tasks.sample import Sample
from selector.models import encode
from selector.plug import prune_inputs


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
        strips += _strips(model, processor, selectors, budgets, sample, limit, positions)
    page = picture.stack(strips, heading=f"{settings['model']}: what stays of the visual tokens")
    out.parent.mkdir(parents=True, exist_ok=True)
    page.save(out)
    print(f"{out}: {page.width} x {page.height}, {len(strips)} rows of {len(selectors) + 1} panels")
    return 0


def _strips(
    model: Any, processor: Any, selectors: Any, budgets: Any, sample: Sample, limit: int, positions: Any
) -> Iterator[Any]:
    inputs = prepare(processor, sample.image, sample.question, model.device)
    needs = frozenset({"features"}).union(*(s.needs for s in selectors.values()))
    try:
        with torch.no_grad():
            encoded = encode(model, inputs, needs)
    except ValueError as error:
        raise UsageError(f"{sample.id}: {error}") from error
    if encoded is None:
        raise RuntimeError("the processor made no pixels of an image")
    rectangles = model_rectangles(model.config, (sample.image.height, sample.image.width), encoded.tokens.grid)

    def panel(name: str, selector: Any, budget: Any) -> picture.Panel:
        try:
            pruned = prune_inputs(model, inputs, selector, budget, positions=positions, encoded=encoded)
        except ValueError as error:
            raise UsageError(f"{name} at keep={budget} on {sample.id}: {error}") from error
        kept = encoded.tokens.tiles_of(pruned.keep)  # type: ignore[arg-type]
        lines = [f"{pruned.measured[0]} of {pruned.full[0]} tokens"]
        shares = evidence(kept, rectangles, sample.boxes)
        if shares is not None:
            lines.append(f"evidence kept: {100 * shares[0]:.0f}%")
        right = None
        if sample.question is not None:
            said = answer(model, processor, pruned.inputs, limit).text
            lines += [f"Q: {sample.question}", f"A: {said}" + (f"   (right: {sample.answer})" if sample.answer else "")]
            right = None if sample.answer is None else exact_match(said, sample.answer)
        return picture.Panel(name, tuple(lines), kept, right)

    whole = panel("every token", None, None)
    for budget in budgets:
        panels = [panel(f"{name}, keep {budget}", selector, budget) for name, selector in selectors.items()]
        yield picture.draw(sample.image, rectangles, [whole, *panels], sample.boxes)
