"""What selectors keep of an image: `kept_picture` for notebooks and loggers, strips of panels for `selector show`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from selector.base import RankSelector, TokenSelector
from selector.budget import Budget
from selector.errors import UsageError
from selector.images import to_rgb
from selector.measure.answering import answer, prepare
from selector.measure.evidence import evidence, model_canvas
from selector.measure.metrics import exact_match
from selector.models import encode
from selector.pruning import Positions, prune_inputs
from selector.show import picture
from selector.tasks.sample import Sample


def kept_picture(
    model: Any,
    processor: Any,
    image: Image.Image,
    selectors: Mapping[str, TokenSelector],
    keep: int | float | str = 0.25,
    question: str | None = None,
    scores: bool = False,
) -> Image.Image:
    """One strip of panels: first every token, then one per selector.

    Args:
        selectors: by the name above their panel.
        keep: a budget, see `Budget`.
        question: asked, too, with the answers shown; None asks nothing.
        scores: add a strip of heat maps of the selectors' scores below.

    Returns:
        An RGB image.

    Raises:
        UsageError: no adapter for the model, or a budget that this image cannot meet.
    """
    sample = Sample("image", to_rgb(image), question, None, ())
    drawn = strips(model, processor, selectors, [Budget.parse(keep)], sample, scores=scores)
    return picture.stack([strip for strip, _ in drawn])


def strips(
    model: Any,
    processor: Any,
    selectors: Mapping[str, TokenSelector],
    budgets: Sequence[Budget],
    sample: Sample,
    *,
    max_new_tokens: int = 48,
    positions: Positions = "original",
    scores: bool = False,
) -> Iterator[tuple[Image.Image, list[str]]]:
    """Strips of panels, one per budget, each with what it shows in words.

    Args:
        selectors: by the name above their panel.
        sample: image, and perhaps a question to ask, its answer, and boxes to outline.
        max_new_tokens: per answer.
        positions: position ids of pruned prompts, see `selector.pruning.prune_inputs`.
        scores: one more strip, without words, of heat maps of the selectors' scores at the first budget.

    Returns:
        Yields (strip, one line per panel).

    Raises:
        UsageError: no adapter for the model, or a budget that this image cannot meet.
    """
    # Encoded once; what the selectors need beyond features is recorded on the way.
    inputs = prepare(processor, sample.image, sample.question, model.device)
    needs = frozenset({"features"}).union(*(s.needs for s in selectors.values()))
    try:
        with torch.no_grad():
            encoded = encode(model, inputs, needs)
    except ValueError as error:
        raise UsageError(f"{sample.id}: {error}") from error
    if encoded is None:
        raise RuntimeError("the processor made no pixels of an image")
    tokens = encoded.tokens
    # Where the patches lie: this is what limits pictures to models that cut images into tiles.
    canvas = model_canvas(model.config, (sample.image.height, sample.image.width), tokens.grid)

    def panel(name: str, selector: TokenSelector | None, budget: Budget | None) -> picture.Panel:
        try:
            pruned = prune_inputs(model, inputs, selector, budget, positions=positions, encoded=encoded)
        except ValueError as error:
            raise UsageError(f"{name} at keep={budget} on {sample.id}: {error}") from error
        # Packed tokens back to patches, so that newlines and unpadding need no place in the picture.
        kept = tokens.tiles_of(pruned.keep)  # type: ignore[arg-type]

        lines = [f"{pruned.measured[0]} of {pruned.full[0]} tokens"]
        shares = evidence(kept, canvas.rectangles(), sample.boxes)
        if shares is not None:
            lines.append(f"evidence kept: {100 * shares[0]:.0f}%")
        right = None  # colours the answer, where the right one is known
        if sample.question is not None:
            text = answer(model, processor, pruned.inputs, max_new_tokens).text
            lines += [f"Q: {sample.question}", f"A: {text}" + (f"   (right: {sample.answer})" if sample.answer else "")]
            right = None if sample.answer is None else exact_match(text, sample.answer)
        return picture.Panel(name, tuple(lines), kept, tokens.valid, right=right)

    def heat(name: str, selector: TokenSelector) -> picture.Panel:
        if not isinstance(selector, RankSelector):  # no order of the patches, only a set
            return picture.Panel(f"{name}, no scores", ("it chooses a set",), tokens.valid, tokens.valid)
        with torch.no_grad():
            values = selector.ranking(tokens, budgets[0])
        return picture.Panel(f"{name}, scores", ("bright: ranks high",), tokens.valid, tokens.valid, values)

    whole = panel("every token", None, None)  # the same in every strip, and answered once
    for budget in budgets:
        panels = [panel(f"{name}, keep {budget}", selector, budget) for name, selector in selectors.items()]
        words = [f"{sample.id}: {p.title}: {'; '.join(p.lines)}" for p in panels]
        yield picture.draw(sample.image, canvas, [whole, *panels], sample.boxes), words
    if scores:
        panels = [heat(name, selector) for name, selector in selectors.items()]
        yield picture.draw(sample.image, canvas, [whole, *panels], sample.boxes), []
