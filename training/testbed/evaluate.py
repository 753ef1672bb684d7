"""Stage 4: what the saved checkpoint reaches on held-out pages, through its own processor and `generate`.

Greedy, three ways: seen (all visual tokens), base (the downscaled base view alone: a page whose text can be read there
would not test selection; on the first quarter of the questions) and blind (the same questions without an image).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from selector import Budget, TokenSelector, VisualTokens, select_tokens
from selector.errors import UsageError
from selector.measure.metrics import anls, exact_match
from selector.report.statistics import wilson
from selector.tasks import GENERATED, SCORED_BY_ANLS, generator
from selector.tasks.sample import Sample


class _BaseView(TokenSelector):
    """Keeps the downscaled base view of every image and nothing else, whatever the budget."""

    def forward(self, tokens: VisualTokens, budget: Budget) -> Bool[Tensor, "I L"]:
        """The patches of the base tiles, True at those kept."""
        return tokens.base


def answers(model: Any, processor: Any, samples: list[Sample], batch: int, way: str) -> list[str]:
    """The answers to all questions, in their order.

    Args:
        model: a LLaVA-NeXT.
        processor: its processor.
        samples: questions with their images.
        batch: questions per call of `generate`.
        way: "seen" (all visual tokens), "base" (those of the base view) or "blind" (no image).
    """
    texts = []
    for start in range(0, len(samples), batch):
        part = samples[start : start + batch]
        # Blind: the same prompt without the image's place.
        seen = [] if way == "blind" else [{"type": "image"}]
        chats = [[{"role": "user", "content": [*seen, {"type": "text", "text": one.question}]}] for one in part]
        prompts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        images = {} if way == "blind" else {"images": [one.image for one in part]}
        inputs = processor(text=prompts, return_tensors="pt", padding=True, **images)
        # Any budget does: `_BaseView` does not look at it.
        cut = select_tokens(model, _BaseView(), keep=1) if way == "base" else nullcontext()
        with torch.no_grad(), cut:
            # 48 tokens just hold the longest answer, five values compared on a chart.
            out = model.generate(**inputs, max_new_tokens=48, do_sample=False)

        new = out[:, inputs["input_ids"].shape[1] :]
        texts += processor.batch_decode(new, skip_special_tokens=True)

    return [text.strip() for text in texts]


def kind_of(task: str, question: str) -> str:
    """The first words of a question, enough to tell the kinds of the task apart.

    >>> kind_of("charts", "what is the value of JAN?"), kind_of("scenes", "what color is the cross?")
    ('what is the', 'what color')
    """
    return " ".join(question.split()[: 3 if task == "charts" else 2])


def evaluate_task(model: Any, processor: Any, name: str, count: int, seed: int, batch: int) -> dict[str, Any]:
    """Accuracy, interval and ANLS of one task, seen, base and blind.

    Args:
        model: a LLaVA-NeXT.
        processor: its processor.
        name: a name of `selector.tasks.GENERATED`.
        count: held-out questions; the base view gets the first quarter of them.
        seed: number of the held-out stream.
        batch: questions per call of `generate`.

    Returns:
        results by way, and "anls": whether ANLS applies; {"skipped": why} where the task's data is not there.
    """
    task = generator(name)
    try:
        samples = list(task.samples(count, seed))
    except UsageError as error:
        return {"skipped": str(error)}

    results: dict[str, Any] = {"anls": name in SCORED_BY_ANLS}

    for way in ("seen", "base", "blind"):
        begun = time.monotonic()
        # A quarter, rounded up: that view only has to show that pages cannot be read in it.
        part = samples[: -(-count // 4)] if way == "base" else samples

        given = answers(model, processor, part, batch, way)
        pairs = [(text, one.answer or "") for text, one in zip(given, part, strict=True)]
        hits = [exact_match(text, answer) for text, answer in pairs]

        low, high = wilson(sum(hits), len(part))

        kinds: dict[str, list[bool]] = {}
        for one, hit in zip(part, hits, strict=True):
            # By kind too: a task's mean may hide that one kind of question is never answered.
            kinds.setdefault(kind_of(name, one.question or ""), []).append(hit)

        results[way] = {
            "accuracy": round(sum(hits) / len(part), 4),
            "interval_95": [round(low, 4), round(high, 4)],
            "anls": round(sum(anls(text, answer) for text, answer in pairs) / len(part), 4),
            "by_question": {kind: [sum(of_kind), len(of_kind)] for kind, of_kind in sorted(kinds.items())},
            "seconds": round(time.monotonic() - begun, 1),
        }
    return results


def evaluate(
    checkpoint: Path, count: int, seed: int, batch: int = 16, tasks: Iterable[str] = tuple(GENERATED)
) -> dict[str, Any]:
    """What `evaluate_task` says of every task, with the settings.

    Args:
        checkpoint: folder of the saved model and processor.
        count: held-out questions per task.
        seed: number of the held-out stream.
        batch: questions per call of `generate`.
        tasks: names of `selector.tasks.GENERATED`.
    """
    # Loaded from the folder, as a user would: what is measured is what is shipped.
    processor = AutoProcessor.from_pretrained(checkpoint, backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()

    results: dict[str, Any] = {"samples": count, "seed": seed}
    return results | {name: evaluate_task(model, processor, name, count, seed, batch) for name in tasks}
