"""A lesson: one page with its exchanges, as drawn for the reader (labels only) and for the joint tuning (pixels too).

Half of the lessons ask for everything on the page, half are several questions in random order: with questions alone the
reader never learns to look.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from selector.tasks.generated.drawing import COLOURS, SHAPES
from selector.tasks.generated.scenes import kind_of, plural
from selector.tasks.sample import Draft, Marks, Turn
from training import pages
from training.testbed.symbols import CLASSES, GRID, cut_labels, page_labels
from training.testbed.vocabulary import BOS, IMAGE_ID, PAD, conversation, recital

NEWLINE = len(CLASSES)
"""The symbol that ends a row of the packed page."""


@dataclass(frozen=True)
class Lesson:
    """One training sequence, with what its visual slots show.

    Attributes:
        kind: its task and form, as "charts_asked" or "scenes_drill".
        ids: tokens; every visual slot that is not left out is an image token.
        labels: -100 except for the answers.
        positions: those of all tokens, as on the whole page.
        symbols: [2, slots], class and centre flag of the visual slots.
        kept: numbers of these slots in the packed order of the whole page (slots,).
        tiles: [tiles, 2, 12, 12], what lies under every patch.
        image: the page, if the lesson was drawn.

    >>> from training.testbed.vocabulary import build_tokenizer
    >>> page = pages.draft("documents", Random(0), size=(192, 96), count=(1, 1))
    >>> one = lesson(Random(0), build_tokenizer(), "documents", page, turns=1, aloud=1.0)
    >>> one.kind, one.symbols.shape, one.tiles.shape  # 3 tiles of 12 x 12 patches, and 12 newlines
    ('documents_all', (2, 444), (3, 2, 12, 12))
    >>> build_tokenizer().decode([label for label in one.labels if label != -100])
    'MONTH KWX</s>'
    """

    kind: str
    ids: list[int]
    labels: list[int]
    positions: list[int]
    symbols: np.ndarray
    kept: np.ndarray
    tiles: np.ndarray
    image: Image.Image | None


def pack_symbols(base: np.ndarray | None, full: np.ndarray) -> np.ndarray:
    """[2, slots]: the base tile, then every row of the page with a newline behind it, as LLaVA-NeXT packs them.

    Args:
        base: labels of the base tile [2, 12, 12]; left out if None.
        full: labels of the page [2, rows, columns].
    """
    newline = np.zeros((2, full.shape[1], 1), full.dtype)
    # Its second channel stays 0: a newline is no object's centre.
    newline[0] = NEWLINE

    rows = np.concatenate([full, newline], axis=2).reshape(2, -1)
    return rows if base is None else np.concatenate([base.reshape(2, -1), rows], axis=1)


_SHORT = (
    ("what is the value of ", ""),
    ("what is beside ", "beside "),
    ("what is left of the ", "left "),
    ("what is right of the ", "right "),
    ("what is ", ""),
    ("which is ", ""),
    ("what color is ", "color "),
    ("is there a ", "there "),
    ("how many lines are there?", "lines?"),
    ("read the line that starts with ", "starts "),
)
"""How questions begin, and what is left of that in a drill."""


def shortened(question: str) -> str:
    """The question without its frame.

    Raises:
        ValueError: it begins like none of the tasks' questions.

    >>> shortened("what is TOTAL?"), shortened("what color is JAN?")
    ('TOTAL?', 'color JAN?')
    """
    for start, rest in _SHORT:
        if question.startswith(start):
            return rest + question.removeprefix(start)
    raise ValueError(f"question must begin like one of {[start for start, _ in _SHORT]}, got {question!r}")


def facts(task: str, turns: Sequence[Turn], marks: Marks) -> list[tuple[str, str]]:
    """The shortest questions on a page with their answers: ("TOTAL?", "415"), ("circles?", "2"), ("red?", "yes").

    Args:
        task: the page's; of scenes every count, colour and shape is listed, as their turns are only a sample of them.
        turns: the page's questions.
        marks: what stands on it.
    """
    if task != "scenes":
        # Except for scenes, the page's own questions are enough.
        return [(shortened(turn.question), turn.answer) for turn in turns]
    things = [label.split() for label, _ in marks]
    pairs = [(shortened(turn.question), turn.answer) for turn in turns if kind_of(turn.question) == "beside"]

    for shape in SHAPES:
        colours = [colour for colour, kind in things if kind == shape]
        pairs.append((f"{plural(shape)}?", str(len(colours))))
        pairs += [(f"{shape}?", colours[0])] if len(colours) == 1 else []

    for colour in COLOURS:
        kinds = [kind for hue, kind in things if hue == colour]
        pairs.append((f"{colour}?", "yes" if kinds else "no"))
        pairs += [(f"{colour} thing?", kinds[0])] if len(kinds) == 1 else []

    return pairs


def lesson(
    rng: Random,
    tokenizer: PreTrainedTokenizerFast,
    task: str,
    draft: Draft,
    turns: int,
    aloud: float,
    drill: float = 0.0,
    base: bool = True,
    blanks: float = 1.0,
    hint: bool = False,
    draw: bool = False,
) -> Lesson:
    """One lesson on a page.

    Args:
        rng: decides what is asked and which slots are left out.
        tokenizer: the testbed's.
        task: the page's task.
        draft: the page.
        turns: questions per lesson, if the page has so many.
        aloud: the share of lessons that read out everything on the page.
        drill: the share that asks all `facts` of the page, one right behind the other.
        base: whether the page has its base tile.
        blanks: the mean share of background slots that stay (each lesson has its own, between its root and its
            square); the others are left out of the sequence while all positions stay as on the whole page, which makes
            lessons several times cheaper. In every second lesson those right behind text or an object stay too: there
            the end of a word can be seen.
        hint: see `conversation`.
        draw: with the image too.
    """
    # One draw decides the form: at its low end everything is read out, at its high end it is a drill.
    way = rng.random()
    reads_all, drills = way < aloud, way > 1 - drill

    chosen = rng.sample(draft.turns, min(turns, len(draft.turns)))
    exchanges = [draft.everything] if reads_all else [(turn.question, turn.answer) for turn in chosen]

    first, full = page_labels(draft.marks, draft.size)
    symbols = pack_symbols(first if base else None, full)

    if drills:
        # All facts, in random order: that of the page must not help.
        known = facts(task, draft.turns, draft.marks)
        ids, labels = recital(tokenizer, rng.sample(known, len(known)), symbols.shape[1])
    else:
        ids, labels = conversation(tokenizer, exchanges, symbols.shape[1], hint)

    kind = f"{task}_{'all' if reads_all else 'drill' if drills else 'asked'}"

    # Which slots stay: all that show something, and a random share of the rest.
    empty = (symbols[0] == 0) | (symbols[0] == NEWLINE)
    # Every lesson has a density of its own, so that the reader depends on none.
    share = blanks ** rng.uniform(0.5, 2.0)
    stays = ~empty | (np.random.default_rng(rng.getrandbits(64)).random(symbols.shape[1]) < share)
    # The slot right behind what is shown: there the end of a word can be seen.
    if rng.random() < 0.5:
        stays[1:] |= ~empty[:-1]

    # The page's slots are one run of image tokens; text always stays.
    start = ids.index(IMAGE_ID)
    whole = np.ones(len(ids), bool)
    whole[start : start + len(stays)] = stays

    # Positions keep their gaps: every token stands where it would on the whole page.
    positions, kept = np.flatnonzero(whole).tolist(), np.flatnonzero(stays)
    shorter = [ids[i] for i in positions], [labels[i] for i in positions]

    return Lesson(
        kind, *shorter, positions, symbols[:, kept], kept, cut_labels(first, full), draft.draw() if draw else None
    )


def comparisons(rng: Random, tokenizer: PreTrainedTokenizerFast, tasks: Sequence[str], count: int = 10) -> Lesson:
    """A lesson without a page: comparisons of numbers that the text itself gives.

    Reading is not what makes "which is larger" hard for a small language model: comparing is, and on a page there is
    one such decision among forty tokens that are read. Only the first token of the name is asked for: the rest of it
    only spells the name.

    Args:
        rng: decides the pages whose questions are taken.
        tokenizer: the testbed's.
        tasks: which of those that compare numbers, documents and charts.
        count: comparisons, each from another draft.

    Raises:
        ValueError: no such task.
    """
    if not tasks:
        raise ValueError("compared must be 0 where shares name neither documents nor charts: only they compare numbers")

    ids, labels = [BOS], [-100]
    for _ in range(count):
        # Not every page compares: draw until one does.
        comparing: list[Turn] = []
        while not comparing:
            drawn = pages.draft(rng.choice(tasks), rng).turns
            comparing = [turn for turn in drawn if turn.question.startswith("which")]

        turn = rng.choice(comparing)
        # The answer "TAX 41, TOTAL 1022: TOTAL" falls into what is given and what is asked.
        given, _, name = turn.answer.partition(": ")
        asked = tokenizer.encode(f"USER: {turn.question} ASSISTANT:{given}: ")

        first, *rest = tokenizer.encode(f"{name}</s>")
        # A single label per comparison: neither what is given nor the rest of the name is learnt here.
        ids, labels = [*ids, *asked, first, *rest], labels + [-100] * len(asked) + [first] + [-100] * len(rest)

    # No page: no visual slots and no tiles.
    nothing = np.zeros((2, 0), np.int64)
    return Lesson(
        "compared",
        ids,
        labels,
        list(range(len(ids))),
        nothing,
        nothing[0],
        np.zeros((0, 2, GRID, GRID), np.int64),
        None,
    )


def by_length(lessons: Sequence[Lesson], groups: int = 3) -> list[tuple[list[Lesson], float]]:
    """The lessons in groups of like length, each with its share of all answer tokens: half the padding of one batch.

    The losses of the groups, each weighted by its share, add up to the loss of all lessons at once.

    Args:
        lessons: a batch.
        groups: how many, at most.
    """
    ranked = sorted(lessons, key=lambda one: len(one.ids))
    size = -(-len(ranked) // groups)
    parts = [ranked[start : start + size] for start in range(0, len(ranked), size)]

    # The loss is a mean over answer tokens, so groups count by how many they have.
    asked = [sum(label != -100 for one in part for label in one.labels) for part in parts]
    return [(part, count / sum(asked)) for part, count in zip(parts, asked, strict=True)]


def collate(lessons: list[Lesson]) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B L"], Int[Tensor, "B L"]]:
    """Ids, labels and positions of a batch, padded on the right (a causal model never sees what comes later).

    Args:
        lessons: the batch; the longest one gives the length L.
    """
    length = max(len(one.ids) for one in lessons)
    ids = torch.full((len(lessons), length), PAD)
    labels = torch.full((len(lessons), length), -100)
    # Positions of the padding do not matter: no label is there and no token comes after it.
    positions = torch.arange(length).repeat(len(lessons), 1)

    for row, one in enumerate(lessons):
        ids[row, : len(one.ids)] = torch.tensor(one.ids)
        labels[row, : len(one.labels)] = torch.tensor(one.labels)
        positions[row, : len(one.ids)] = torch.tensor(one.positions)

    return ids, labels, positions
