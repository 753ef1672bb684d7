"""What selectors keep of an image: `kept_picture` for notebooks and loggers, strips of panels for `selector show`."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from PIL import Image
from torch import Tensor

from selector.base import RankSelector, TokenSelector
from selector.budget import Budget
from selector.errors import UsageError
from selector.images import to_rgb
from selector.measure.answering import answer, prepare
from selector.measure.evidence import Canvas, evidence, model_canvas
from selector.measure.metrics import exact_match
from selector.models import Encoded, encode
from selector.pruning import Positions, prune_inputs
from selector.show import picture
from selector.tasks.sample import Sample
from selector.tokens import INSIDE


@dataclass(frozen=True)
class Seen:
    """What a selector left of an image, and what the model then answered.

    Attributes:
        kept: ``[T, N]`` patches whose token is kept.
        measured: visual tokens that reached the language model; their average over its layers, where they leave inside.
        full: the same before pruning.
        answer: None where nothing was asked.

    Example:
        >>> Seen(torch.ones(5, 16, dtype=torch.bool), measured=88, full=88, answer="red").answer
        'red'
    """

    kept: Bool[Tensor, "T N"]
    measured: int | float
    full: int
    answer: str | None


class View:
    """An image, perhaps with a question, encoded once: pruned and answered under any number of selectors.

    Args:
        sample: image, and perhaps a question to ask.
        needs: fields of `VisualTokens` that some selector reads. One that the model cannot give is an error for the
            selectors that read it, and for no others.
        max_new_tokens: per answer.
        positions: position ids of pruned prompts, see `selector.pruning.prune_inputs`.

    Attributes:
        tokens: what the selectors see.

    Raises:
        UsageError: no adapter for the model, or an image that it cannot encode.

    Example:
        >>> from selector import Norm
        >>> from selector.commands.loading import load_model
        >>> from selector.tasks import load_task
        >>> sample = next(load_task("scenes").samples(1, seed=0))
        >>> view = View(*load_model("checkpoints/llava-next-tiny", "cpu"), sample, frozenset({"features"}))
        >>> view.under(Norm(), Budget(64), "norm").measured
        64
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        sample: Sample,
        needs: frozenset[str],
        *,
        max_new_tokens: int = 48,
        positions: Positions = "original",
    ):
        self.model, self.processor, self.sample = model, processor, sample
        self.max_new_tokens = max_new_tokens
        self.positions: Positions = positions
        self.inputs = prepare(processor, sample.image, sample.question, model.device)
        self._missing: dict[str, str] = {}  # fields that the model cannot give, and why
        self._encoded = self._encode(frozenset(needs) - INSIDE)
        self.tokens = self._encoded.tokens

    @functools.cached_property
    def canvas(self) -> Canvas:
        """Where the patches lie in the image; a UsageError for models that do not say."""
        image = self.sample.image
        return model_canvas(self.model.config, (image.height, image.width), self.tokens.grid, len(self.tokens.features))

    def under(self, selector: TokenSelector | None, budget: Budget | None, name: str) -> Seen:
        """What is left of the image under a selector, and the answer; `None, None` keeps every token.

        Args:
            name: of the selector, for messages.

        Raises:
            UsageError: a budget that this image cannot meet, or a selector that this model cannot serve.
        """
        for field in sorted(self._missing.keys() & (selector.needs if selector else ())):
            raise UsageError(f"{name} on {self.sample.id}: {self._missing[field]}")
        inside = selector is not None and selector.acts == "inside"
        if inside and self.sample.question is None:
            raise UsageError(f"{name} on {self.sample.id}: it acts inside the language model: ask a question")

        text = None
        try:
            pruned = prune_inputs(
                self.model,
                self.inputs,
                selector,
                budget,
                positions=self.positions,
                encoded=self._encoded,
                inside=inside,
            )
            if self.sample.question is not None:
                with pruned.acting(self.model):
                    text = answer(self.model, self.processor, pruned.inputs, self.max_new_tokens).text
        except ValueError as error:
            raise UsageError(f"{name} on {self.sample.id}: {error}") from error

        # Packed tokens back to patches, so that newlines and unpadding need no place in a picture.
        kept = self.tokens.tiles_of(pruned.keep)  # type: ignore[arg-type]
        return Seen(kept, pruned.measured[0], pruned.full[0], text)

    def _encode(self, needs: frozenset[str]) -> Encoded:
        """The image with what the selectors need beyond features, which is recorded on the way."""
        try:
            try:
                return self._encode_for(needs)
            except ValueError:
                # Field by field, to learn which of them it is.
                for field in needs - {"features"}:
                    try:
                        self._encode_for(frozenset({"features", field}))
                    except ValueError as error:
                        self._missing[field] = str(error)
                return self._encode_for(needs.difference(self._missing))
        except ValueError as error:
            raise UsageError(f"{self.sample.id}: {error}") from error

    def _encode_for(self, needs: frozenset[str]) -> Encoded:
        with torch.no_grad():
            encoded = encode(self.model, self.inputs, needs)
        if encoded is None:
            raise RuntimeError("the processor made no pixels of an image")
        return encoded


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
    needs = frozenset({"features"}).union(*(s.needs for s in selectors.values()))
    view = View(model, processor, sample, needs, max_new_tokens=max_new_tokens, positions=positions)
    tokens, canvas = view.tokens, view.canvas

    def panel(name: str, selector: TokenSelector | None, budget: Budget | None) -> picture.Panel:
        seen = view.under(selector, budget, name if budget is None else f"{name} at keep={budget}")
        title = name if budget is None else f"{name}, keep {budget}"

        lines = [f"{seen.measured} of {seen.full} tokens"]
        shares = evidence(seen.kept, canvas.rectangles(), sample.boxes)
        if shares is not None:
            lines.append(f"evidence kept: {100 * shares[0]:.0f}%")
        right = None  # colours the answer, where the right one is known
        if seen.answer is not None:
            target = f"   (right: {sample.answer})" if sample.answer else ""
            lines += [f"Q: {sample.question}", f"A: {seen.answer}{target}"]
            right = None if sample.answer is None else exact_match(seen.answer, sample.answer)
        return picture.Panel(title, tuple(lines), seen.kept, tokens.valid, right=right)

    def heat(name: str, selector: TokenSelector) -> picture.Panel:
        if not isinstance(selector, RankSelector):  # no order of the patches, only a set
            return picture.Panel(f"{name}, no scores", ("it chooses a set",), tokens.valid, tokens.valid)
        with torch.no_grad():
            values = selector.ranking(tokens, budgets[0])
        return picture.Panel(f"{name}, scores", ("bright: ranks high",), tokens.valid, tokens.valid, values)

    whole = panel("every token", None, None)  # the same in every strip, and answered once
    for budget in budgets:
        panels = [panel(name, selector, budget) for name, selector in selectors.items()]
        words = [f"{sample.id}: {p.title}: {'; '.join(p.lines)}" for p in panels]
        yield picture.draw(sample.image, canvas, [whole, *panels], sample.boxes), words
    if scores:
        panels = [heat(name, selector) for name, selector in selectors.items()]
        yield picture.draw(sample.image, canvas, [whole, *panels], sample.boxes), []
