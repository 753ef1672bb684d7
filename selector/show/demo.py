"""The work behind `selector demo`: an image and a question under several selectors, as cards beside each other.

Nothing here knows gradio: `Demo` asks the model and `page` writes what it said as HTML. The form around both is in
`selector.show.interface`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from selector.base import TokenSelector
from selector.budget import Budget
from selector.errors import UsageError
from selector.images import open_image
from selector.measure.answering import prepare
from selector.pruning import Positions
from selector.show import picture
from selector.show.gallery import Seen, View
from selector.tasks import check_question, load_task
from selector.tasks.sample import Sample

EXAMPLES = ("documents", "scenes", "charts")
"""Generated tasks, from which examples come in turn."""
WHOLE = "every token"
"""Title of the card of the unpruned model."""


@dataclass(frozen=True)
class Card:
    """What one selector left of an image, and what the model then answered.

    Attributes:
        title: the selector's label.
        seen: None where the selector could not be used.
        pictures: what is kept of the tiles and of the base view, painted where it lies; None for a model whose patches
            have no known place.
        same: whether the answer is that of the unpruned model; None on the card of that model itself.
        note: why there is no picture, or no answer.

    Example:
        >>> card = Card("cdpruner", note="it needs `text`, and this model has none")
        >>> "it needs" in page([card])
        True
    """

    title: str
    seen: Seen | None = None
    pictures: tuple[Image.Image, Image.Image | None] | None = None
    same: bool | None = None
    note: str = ""


class Demo:
    """A model and its selectors, loaded once; asks about one image at a time.

    What was encoded last is kept: another budget, or another choice of selectors, encodes nothing anew.

    Args:
        selectors: by label, on the model's device.
        budget: whose scope and newlines hold for every budget of the slider.
        positions: position ids of pruned prompts, see `selector.pruning.prune_inputs`.
        max_new_tokens: per answer.

    Example:
        >>> from selector import Norm
        >>> from selector.commands.loading import load_model
        >>> demo = Demo(*load_model("checkpoints/llava-next-tiny", "cpu"), {"norm": Norm()}, Budget(64))
        >>> example(0).image.save("page.png")
        >>> [card.seen.measured for card in demo.cards("page.png", "is there a GRID?", 64, ["norm"])]
        [444, 64]
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        selectors: Mapping[str, TokenSelector],
        budget: Budget,
        *,
        positions: Positions = "original",
        max_new_tokens: int = 48,
    ):
        self.model, self.processor, self.selectors = model, processor, dict(selectors)
        self.budget, self.max_new_tokens = budget, max_new_tokens
        self.positions: Positions = positions
        self._latest: tuple[tuple[Any, ...], View, Seen] | None = None

    def count(self, image: Image.Image) -> int:
        """Visual tokens of an image before pruning, by the placeholders in its prompt: nothing is encoded."""
        inputs = prepare(self.processor, image, None, self.model.device)
        return int((inputs["input_ids"] == self.model.config.image_token_id).sum())

    def cards(self, path: str | None, question: str, keep: int, chosen: Sequence[str]) -> Iterator[Card]:
        """One card for the unpruned model, then one per selector, each as soon as it is there.

        Args:
            path: of an image file; None is an error that says so.
            question: asked under every selector.
            keep: visual tokens that may stay, base view and newlines included.
            chosen: labels of selectors.

        Raises:
            UsageError: no image, one that cannot be read, a question that cannot be asked, or a budget below 1.
        """
        image = opened(path)
        if not question.strip():
            raise UsageError("there is no question: type one")
        check_question(question)
        try:
            budget = Budget(int(keep), self.budget.scope, self.budget.newlines)
        except ValueError as error:
            raise UsageError(str(error)) from error

        view, whole = self._viewed(image, question)
        yield self._card(WHOLE, view, whole)
        for label in chosen:
            try:
                seen = view.under(self.selectors[label], budget, label)
            except UsageError as error:
                yield Card(label, note=str(error))
                continue
            yield self._card(label, view, seen, same=seen.answer == whole.answer)

    def _viewed(self, image: Image.Image, question: str) -> tuple[View, Seen]:
        """The image encoded, and answered by the unpruned model; as it was, where both are those of the last call."""
        key = (image.size, image.tobytes(), question)
        if self._latest is None or self._latest[0] != key:
            # Encoded for whichever selector may be chosen next.
            needs = frozenset({"features"}).union(*(s.needs for s in self.selectors.values()))
            sample = Sample("this image", image, question, None, ())
            view = View(
                self.model,
                self.processor,
                sample,
                needs,
                max_new_tokens=self.max_new_tokens,
                positions=self.positions,
            )

            self._latest = (key, view, view.under(None, None, WHOLE))
        return self._latest[1:]

    def _card(self, title: str, view: View, seen: Seen, same: bool | None = None) -> Card:
        """The card of a selector; without a picture, but with the reason, where patches have no known place."""
        try:
            panel = picture.Panel("", (), seen.kept, view.tokens.valid)
            return Card(title, seen, picture.painted(view.sample.image, view.canvas, panel), same)
        except UsageError as error:
            return Card(title, seen, None, same, f"No picture: {error}")


def opened(path: str | None) -> Image.Image:
    """The image in a file, by the rules of every other command: transparent on white, turned as its EXIF says.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    if path is None:
        raise UsageError("there is no image: drop one, or take an example")
    return open_image(Path(path))


def example(number: int, seed: int = 0) -> Sample:
    """A generated image with a question: a page, a scene, a chart, another page, and so on.

    Args:
        number: from 0 on; each is another image.
        seed: of the images.

    Example:
        >>> [example(number).id for number in range(4)]
        ['documents-0-0', 'scenes-0-0', 'charts-0-0', 'documents-0-1']
    """
    round_, place = divmod(number, len(EXAMPLES))
    return list(load_task(EXAMPLES[place]).samples(round_ + 1, seed))[round_]


def page(cards: Sequence[Card], error: str = "") -> str:
    """Cards beside each other as HTML, below what went wrong if anything did; whatever was typed in is escaped.

    Example:
        >>> page([], error="the question is empty")
        '<div class="cards-error" role="alert">the question is empty</div>'
    """
    alert = f'<div class="cards-error" role="alert">{escape(error)}</div>' if error else ""
    return alert + (f'<div class="cards">{"".join(map(_card, cards))}</div>' if cards else "")


def _card(card: Card) -> str:
    """One card: title and tokens, the tiles, and the base view beside the answer."""
    if card.seen is None:
        return f'<article class="card"><h3>{escape(card.title)}</h3>{_note(card)}</article>'

    seen = card.seen
    tokens = f"{_number(seen.measured)} of {seen.full} visual tokens"
    tiles = base = ""
    if card.pictures is not None:
        words = f"{card.title}: {tokens}, kept patches clear, dropped ones veiled"
        tiles, base = (
            f'<img class="{kind}" src="{_data_url(image)}" alt="{escape(f"{words}; {kind}")}">' if image else ""
            for kind, image in zip(("tiles", "base"), card.pictures, strict=True)
        )

    answer = f'<p class="answer">{escape(seen.answer or "") or "<i>no words</i>"}</p>'
    if card.same is not None:
        kind, words = ("same", "same answer") if card.same else ("other", "another answer")
        answer += f'<p class="verdict {kind}">{words}</p>'
    return (
        f'<article class="card"><h3>{escape(card.title)}</h3>'
        f'<p class="tokens">{tokens} <span>{100 * seen.measured / seen.full:.0f}%</span></p>'
        f'{tiles}<div class="below">{base}<div>{answer}</div></div>{_note(card)}</article>'
    )


def _note(card: Card) -> str:
    return f'<p class="note">{escape(card.note)}</p>' if card.note else ""


def _number(count: int | float) -> str:
    """A count; with one decimal where it is an average over layers."""
    return f"{count:.1f}".removesuffix(".0")


def _data_url(image: Image.Image) -> str:
    content = io.BytesIO()
    image.save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
