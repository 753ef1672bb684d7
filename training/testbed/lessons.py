"""A lesson: one page with its exchanges, as drawn for the reader (labels only) and for the joint tuning (pixels too).

Half of the lessons ask for everything on the page, half are several questions in random order: with questions alone the
reader never learns to look.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from selector.evaluation.tasks import documents, scenes
from training.testbed.symbols import CLASSES, page_labels
from training.testbed.vocabulary import IMAGE, LIST, READ, conversation

NEWLINE = len(CLASSES)
"""The symbol that ends a row of the packed page."""


@dataclass(frozen=True)
class Lesson:
    """`symbols` [2, slots]: class and centre flag of every visual slot in `kept` (packed order); `positions` of
    all tokens."""

    kind: str
    ids: list[int]
    labels: list[int]
    positions: list[int]
    symbols: np.ndarray
    kept: np.ndarray
    image: Image.Image | None


def pack_symbols(base: np.ndarray | None, full: np.ndarray) -> np.ndarray:
    """[2, slots]: the base tile, then every row of the page with a newline behind it, as LLaVA-NeXT packs them."""
    newline = np.zeros((2, full.shape[1], 1), full.dtype)
    newline[0] = NEWLINE
    rows = np.concatenate([full, newline], axis=2).reshape(2, -1)
    return rows if base is None else np.concatenate([base.reshape(2, -1), rows], axis=1)


def lesson(
    rng: Random,
    tokenizer: PreTrainedTokenizerFast,
    task: str,
    size: tuple[int, int],
    count: tuple[int, int],
    turns: int,
    aloud: float,
    base: bool = True,
    blanks: float = 1.0,
    draw: bool = False,
) -> Lesson:
    """One page of `task` with `count` (least, most) lines or things.

    `aloud`: the share of lessons that tell everything. `blanks`: the share of background slots that stay; the
    others are
    left out of the sequence while all positions stay as on the whole page, which makes early lessons several times
    cheaper.
    """
    if task == "documents":
        lines = documents.layout(rng, size, rng.randint(*count))
        marks, asked = documents.marks(lines, size), documents.turns(lines, size)
        everything = (READ, documents.transcript(asked))
        image = documents.draw_page(rng, size, lines) if draw else None
    else:
        things = scenes.layout(rng, size, rng.randint(*count))
        marks, asked = scenes.marks(things), scenes.turns(rng, things)
        everything = (LIST, scenes.transcript(marks))
        image = scenes.draw_page(rng, size, things) if draw else None
    tells = rng.random() < aloud
    chosen = rng.sample(asked, min(turns, len(asked)))
    exchanges = [everything] if tells else [(turn.question, turn.answer) for turn in chosen]
    first, full = page_labels(marks, size)
    symbols = pack_symbols(first if base else None, full)
    ids, labels = conversation(tokenizer, exchanges, symbols.shape[1])
    kind = f"{task}_{'all' if tells else 'asked'}"
    empty = (symbols[0] == 0) | (symbols[0] == NEWLINE)
    stays = ~empty | (np.random.default_rng(rng.getrandbits(64)).random(symbols.shape[1]) < blanks)
    start = ids.index(tokenizer.convert_tokens_to_ids(IMAGE))
    whole = np.ones(len(ids), bool)
    whole[start : start + len(stays)] = stays
    positions, kept = np.flatnonzero(whole).tolist(), np.flatnonzero(stays)
    shorter = [ids[i] for i in positions], [labels[i] for i in positions]
    return Lesson(kind, *shorter, positions, symbols[:, kept], kept, image)


def collate(lessons: list[Lesson], pad: int) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B L"], Int[Tensor, "B L"]]:
    """Ids, labels and positions, padded on the right (a causal model never sees what comes later)."""
    length = max(len(one.ids) for one in lessons)
    ids = torch.full((len(lessons), length), pad)
    labels = torch.full((len(lessons), length), -100)
    positions = torch.arange(length).repeat(len(lessons), 1)
    for row, one in enumerate(lessons):
        ids[row, : len(one.ids)] = torch.tensor(one.ids)
        labels[row, : len(one.labels)] = torch.tensor(one.labels)
        positions[row, : len(one.ids)] = torch.tensor(one.positions)
    return ids, labels, positions
