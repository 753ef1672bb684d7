"""Stage 2, the reader: the language model alone learns to answer from symbolic pages.

A visual slot holds the embedding of the symbol under its patch: characters share the text's embedding, objects and the
background have their own, and an object's centre adds one more vector. A curriculum grows the pages from a few cells
to the real sizes with their base tile; a stage ends when the running accuracy on questions reaches `until`, or after
`at_most` steps.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from training import pages
from training.testbed.lessons import Lesson, by_length, collate, comparisons, lesson
from training.testbed.muon import Muon, matrices_apart
from training.testbed.state import Log, load_state, save_state
from training.testbed.symbols import CHARACTERS, CLASSES
from training.testbed.vocabulary import IMAGE_ID

Hits = Counter[tuple[str, bool]]
"""How many answer tokens of each kind of lesson were predicted correctly (True) and wrongly (False)."""


@dataclass(frozen=True)
class Grade:
    """One stage of the curriculum: which pages, how many at once, and when it is learnt.

    Attributes:
        shares: how often each task is drawn.
        batch: lessons per step.
        rate: the learning rate.
        until: the stage ends at this running accuracy on questions; above 1 it never does.
        at_most: the stage ends after so many steps.
        pages: gives a task smaller pages than its own: sizes "192x96" (width, height) with the least and the largest
            number of lines or objects.
        turns: questions per lesson.
        aloud: see `lesson`.
        drill: see `lesson`.
        base: whether the page has its base tile.
        blanks: see `lesson`.
        hint: see `conversation`.
        compared: the share of lessons without a page, see `comparisons`.

    >>> from training.testbed.vocabulary import build_tokenizer
    >>> small = {"documents": {"192x96": (1, 2)}}  # one or two lines
    >>> grade = Grade({"documents": 1.0}, batch=8, rate=1e-3, until=0.9, at_most=500, pages=small, aloud=0.0)
    >>> lesson = grade.lesson(Random(0), build_tokenizer())
    >>> lesson.kind, lesson.symbols.shape
    ('documents_asked', (2, 444))
    """

    shares: dict[str, float]
    batch: int
    rate: float
    until: float
    at_most: int
    pages: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    turns: int = 4
    aloud: float = 0.5
    drill: float = 0.0
    base: bool = True
    blanks: float = 1.0
    hint: bool = False
    compared: float = 0.0

    def lesson(self, rng: Random, tokenizer: PreTrainedTokenizerFast, draw: bool = False) -> Lesson:
        """A random lesson of this stage.

        Args:
            rng: decides everything about it.
            tokenizer: the testbed's.
            draw: with the image too.

        Raises:
            ValueError: comparisons are wanted, but no task that compares numbers.
        """
        # Comparisons need no page, so they come before a task is drawn.
        if rng.random() < self.compared:
            return comparisons(rng, tokenizer, [task for task in self.shares if task in ("documents", "charts")])

        task = rng.choices(list(self.shares), list(self.shares.values()))[0]

        size, count = None, None
        # Smaller pages than the task's own, where this stage has some for it.
        if task in self.pages:
            name = rng.choice(list(self.pages[task]))
            count = self.pages[task][name]
            size = int(name.split("x")[0]), int(name.split("x")[1])

        page = pages.draft(task, rng, size, count)
        return lesson(
            rng,
            tokenizer,
            task,
            page,
            self.turns,
            self.aloud,
            self.drill,
            self.base,
            self.blanks,
            self.hint,
            draw,
        )


class Reader(nn.Module):
    """The language model with the table of symbols that stands in for the tower and the projector.

    Args:
        config: the language model's configuration.
        tokenizer: the testbed's; it says which tokens the characters are.

    >>> from training.testbed.model import reader_config
    >>> from training.testbed.vocabulary import build_tokenizer
    >>> tokenizer = build_tokenizer()
    >>> reader = Reader(reader_config(tokenizer, width=16, layers=1, heads=2, inner=32), tokenizer)
    >>> reader.embed(torch.tensor([[1, IMAGE_ID, IMAGE_ID]]), symbols=torch.tensor([[0, 5], [0, 0]])).shape
    torch.Size([1, 3, 16])
    """

    def __init__(self, config: LlamaConfig, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.language = LlamaModel(config)
        width = config.hidden_size

        # A row for every class, though characters share the text's: places then are the class numbers.
        self.own = nn.Parameter(torch.randn(len(CLASSES), width) * 0.02)
        self.newline = nn.Parameter(torch.randn(width) * 0.02)
        self.centre = nn.Parameter(torch.randn(width) * 0.02)

        self.characters: Tensor
        # A buffer, so that it is saved and moved with the weights, though it is never trained.
        self.register_buffer("characters", torch.tensor(tokenizer.convert_tokens_to_ids(list(CHARACTERS))))

    def table(self) -> Float[Tensor, "C D"]:
        """The embedding of every symbol, the newline last."""
        last = 1 + len(CHARACTERS)
        text = self.language.embed_tokens.weight[self.characters]
        return torch.cat([self.own[:1], text, self.own[last:], self.newline[None]])

    def embed(self, ids: Int[Tensor, "B L"], symbols: Int[Tensor, "2 S"]) -> Float[Tensor, "B L D"]:
        """Embeddings of text and symbols.

        Args:
            ids: tokens; every visual slot is an image token.
            symbols: class and centre flag of the slots of all pages in the batch, one page after the other.
        """
        # Filled in from left to right, row by row: hence the pages one after the other.
        visual = self.table()[symbols[0]] + symbols[1, :, None] * self.centre
        embedded = self.language.embed_tokens(ids)
        return embedded.masked_scatter(ids.eq(IMAGE_ID)[..., None], visual)


def answer_loss(
    language: LlamaModel,
    embedded: Float[Tensor, "B L D"],
    labels: Int[Tensor, "B L"],
    positions: Int[Tensor, "B L"],
    kinds: list[str],
) -> tuple[Tensor, Hits]:
    """Cross-entropy over the answers, and how many of their tokens were predicted correctly.

    Args:
        language: the language model; its embedding is the output layer too.
        embedded: text and visual slots.
        labels: -100 wherever nothing is asked.
        positions: those of the tokens on the whole page; they have gaps where slots are left out.
        kinds: the kind of each of the B lessons.

    Returns:
        (loss, hits by kind of lesson).
    """
    # The mask of ones matters: without one, positions with gaps would be read as several packed sequences.
    mask = torch.ones_like(positions)
    out = language(inputs_embeds=embedded, position_ids=positions, attention_mask=mask, use_cache=False)

    # Logits only where something is asked: of most slots they would be wasted.
    hidden = out.last_hidden_state[:, :-1]
    # Each token predicts the one after it.
    target = labels[:, 1:]
    asked = target != -100
    logits = hidden[asked] @ language.embed_tokens.weight.T
    loss = F.cross_entropy(logits, target[asked])

    right = logits.argmax(-1) == target[asked]
    of_row = torch.arange(len(kinds))[:, None].expand_as(target)[asked]
    return loss, Counter((kinds[row], hit) for row, hit in zip(of_row.tolist(), right.tolist(), strict=True))


def shares_right(hits: Hits) -> dict[str, float]:
    """The share of answer tokens predicted correctly, by kind of lesson.

    Args:
        hits: those of one or more batches.

    >>> shares_right(Counter({("charts_asked", True): 3, ("charts_asked", False): 1}))
    {'charts_asked': 0.75}
    """
    return {kind: hits[kind, True] / (hits[kind, True] + hits[kind, False]) for kind in sorted({k for k, _ in hits})}


def train_reader(
    config: LlamaConfig,
    tokenizer: PreTrainedTokenizerFast,
    work: Path,
    grades: list[Grade],
    warmup: int,
    seed: int,
    every: int = 25,
) -> Reader:
    """Goes through the grades, going on from the state under `work`, and returns the reader.

    Args:
        config: the language model's configuration.
        tokenizer: the testbed's.
        work: folder of the state and the log.
        grades: one after the other; the optimizer goes on.
        warmup: steps in which the rate rises at the very beginning.
        seed: seed of weights and lessons.
        every: steps from one line of the log to the next.
    """
    torch.manual_seed(seed)
    reader = Reader(config, tokenizer)
    optimizer = Muon(matrices_apart(reader.named_parameters()), grades[0].rate, weight_decay=0.02, betas=(0.9, 0.95))

    path, log = work / "reader.pt", Log(work / "log.jsonl", "reader")
    step, grade, within, running = 0, 0, 0, 0.0
    if state := load_state(path):
        reader.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, grade, within, running = state["step"], state["grade"], state["within"], state["running"]

    # `within` counts the steps of the grade, `running` is its accuracy so far; both begin anew with every grade.
    while grade < len(grades):
        now = grades[grade]
        # Drawn from the step's number, so that a resumed run sees the same lessons.
        rng = Random(f"reader/{seed}/{step}")
        lessons = [now.lesson(rng, tokenizer) for _ in range(now.batch)]

        for group in optimizer.param_groups:
            group["lr"] = now.rate * min(1.0, (step + 1) / warmup)
        optimizer.zero_grad()
        log.count(sum(len(one.ids) for one in lessons))

        # Groups of like length have less padding; their weighted losses add up to that of the whole batch.
        total, hits = 0.0, Counter()
        for part, share in by_length(lessons):
            ids, labels, positions = collate(part)
            symbols = torch.cat([torch.from_numpy(one.symbols) for one in part], dim=1)
            embedded = reader.embed(ids, symbols)
            loss, of_part = answer_loss(reader.language, embedded, labels, positions, [one.kind for one in part])
            (loss * share).backward()
            total, hits = total + share * loss.item(), hits + of_part

        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()

        scores = shares_right(hits)
        asked = [value for name, value in scores.items() if name.endswith("asked")]

        # Only questions count towards the end of a grade: reading everything aloud is learnt sooner.
        step, within = step + 1, within + 1
        # Over about twenty steps; a step without a question leaves it as it is.
        running = 0.95 * running + 0.05 * (sum(asked) / len(asked) if asked else running)

        if step % every == 0:
            log(step, grade=grade, length=max(len(one.ids) for one in lessons), loss=total, running=running, **scores)

        done = running >= now.until or within >= now.at_most
        if done:
            grade, within, running = grade + 1, 0, 0.0

        if done or step % 50 == 0:
            # Where in the curriculum the run stands belongs to the state, or a resumed one would begin the grade anew.
            parts = {"step": step, "grade": grade, "within": within, "running": running}
            save_state(path, model=reader.state_dict(), optimizer=optimizer.state_dict(), **parts)
    return reader
