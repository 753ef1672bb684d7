"""What a task hands out: one `Sample` is one question about one image; a generated `Page` carries all its questions.

A generator first makes a `Draft` (what stands where, without pixels), then draws it.

Boxes are `(x0, y0, x1, y1)` in pixels of the image, the origin at its upper left corner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from PIL import Image

Box = tuple[float, float, float, float]
"""(x0, y0, x1, y1) in pixels of the image."""


@dataclass(frozen=True)
class Turn:
    """One question, its answer, and the boxes where the evidence for the answer lies (none if it is an absence).

    >>> Turn("is there a red thing?", "no", boxes=()).answer
    'no'
    """

    question: str
    answer: str
    boxes: tuple[Box, ...]


Marks = tuple[tuple[str, Box], ...]
"""Names and boxes of all there is to see: a glyph ("A"), an object ("red circle") or a coloured area ("red bar")."""


@dataclass(frozen=True)
class Draft:
    """A page before its pixels: everything known about it, and how to draw it.

    Training on symbols needs no pixels, so drafts are cheap and drawing is left until asked for. `marks` and
    `everything` serve training alone, but only a generator knows the layout that they come from; scenes are split by
    theirs.

    Attributes:
        size: (width, height) in pixels.
        turns: the questions it answers.
        marks: what stands where, for dense supervision.
        everything: the prompt that asks for all there is, and its answer.
        draw: returns the image; the same one at every call.

    >>> from random import Random
    >>> from selector.tasks.generated import documents
    >>> draft = documents.draft(Random(0), size=(192, 96))
    >>> draft.draw().size == draft.size == (192, 96)
    True
    """

    size: tuple[int, int]
    turns: tuple[Turn, ...]
    marks: Marks
    everything: tuple[str, str]
    draw: Callable[[], Image.Image]

    def page(self) -> Page:
        """The page with its pixels drawn."""
        return Page(self.draw(), self.turns, self.marks)


@dataclass(frozen=True)
class Page:
    """A drawn page with everything known about it: `turns` and `marks` are those of its `Draft`.

    Example:
        >>> from selector.tasks.generated import documents
        >>> page = documents.page("test", seed=0, index=0)
        >>> page.image.size, page.turns[0].question, page.turns[0].answer, page.marks[0][0]
        ((192, 96), 'what is TOTAL?', 'TOTAL 6541', 'T')
    """

    image: Image.Image
    turns: tuple[Turn, ...]
    marks: Marks


@dataclass(frozen=True)
class Sample:
    """One question about one image.

    Attributes:
        id: unique within the task and seed; records are keyed by it.
        image: RGB.
        question: None where a task has only images (a photo folder).
        answer: the reference; None where there is none.
        boxes: where the evidence for the answer lies, in pixels; empty if unknown or an absence.
        answers: every reference, where there are several; `answer` is the one to show.
        choices: the words of the options, in the order of their letters; the question already lists them.
        group: "category/image" of questions that are scored together, see `selector.report.statistics.paired_score`.
        submission: what a line of a submission file says beside the prediction, by column; None where no server scores.

    Example:
        >>> from selector.tasks import load_task
        >>> sample = next(load_task("documents").samples(1, seed=0))
        >>> sample.id, sample.question, sample.references, len(sample.boxes)
        ('documents-0-0', 'is there a GRID?', ('yes',), 1)
    """

    id: str
    image: Image.Image
    question: str | None
    answer: str | None
    boxes: tuple[Box, ...]
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    group: str | None = None
    submission: Mapping[str, str] | None = None

    @property
    def references(self) -> tuple[str, ...]:
        """What an answer is compared with: `answers`, or the one `answer`; none where there is none."""
        return self.answers or (() if self.answer is None else (self.answer,))
