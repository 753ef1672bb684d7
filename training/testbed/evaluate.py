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
from selector.tasks import GENERATED, SCORED_BY_ANLS, generator
from selector.tasks.sample import Sample


class BaseView(TokenSelector):
    """Keeps the downscaled base view of every image and nothing else, whatever the budget."""

    def forward(self, tokens: VisualTokens, budget: Budget) -> Bool[Tensor, "I L"]:
        return tokens.base


def wilson(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% Wilson score interval of a proportion."""
    share, spread = right / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * (share * (1 - share) / total + spread / (4 * total)) ** 0.5
    return middle - half, middle + half


def answers(model: Any, processor: Any, samples: list[Sample], batch: int, way: str) -> list[str]:
    """The answers to all questions; `way` is "seen", "base" or "blind"."""
    found = []
    for start in range(0, len(samples), batch):
        part = samples[start : start + batch]
        seen = [] if way == "blind" else [{"type": "image"}]
        chats = [[{"role": "user", "content": [*seen, {"type": "text", "text": one.question}]}] for one in part]
        prompts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        images = {} if way == "blind" else {"images": [one.image for one in part]}
        inputs = processor(text=prompts, return_tensors="pt", padding=True, **images)
        cut = select_tokens(model, BaseView(), keep=1) if way == "base" else nullcontext()
        with torch.no_grad(), cut:
            out = model.generate(**inputs, max_new_tokens=48, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        found += processor.batch_decode(new, skip_special_tokens=True)
    return [text.strip() for text in found]


def kind_of(task: str, question: str) -> str:
    """The first words of a question, enough to tell the kinds of the task apart."""
    return " ".join(question.split()[: 3 if task == "charts" else 2])


def evaluate_task(model: Any, processor: Any, name: str, count: int, seed: int, batch: int) -> dict[str, Any]:
    """Accuracy, interval and ANLS of one task, seen, base and blind, on `count` held-out questions."""
    task = generator(name)
    try:
        samples = list(task.samples(count, seed))
    except UsageError as error:
        return {"skipped": str(error)}
    results: dict[str, Any] = {"anls": name in SCORED_BY_ANLS}
    for way in ("seen", "base", "blind"):
        begun = time.monotonic()
        part = samples[: -(-count // 4)] if way == "base" else samples
        given = answers(model, processor, part, batch, way)
        pairs = [(text, one.answer or "") for text, one in zip(given, part, strict=True)]
        hits = [exact_match(text, answer) for text, answer in pairs]
        low, high = wilson(sum(hits), len(part))
        kinds: dict[str, list[bool]] = {}
        for one, hit in zip(part, hits, strict=True):
            kinds.setdefault(kind_of(name, one.question or ""), []).append(hit)
        results[way] = {
            "accuracy": round(sum(hits) / len(part), 4),
            "interval_95": [round(low, 4), round(high, 4)],
            "anls": round(sum(anls(text, answer) for text, answer in pairs) / len(part), 4),
            "by_question": {kind: [sum(found), len(found)] for kind, found in sorted(kinds.items())},
            "seconds": round(time.monotonic() - begun, 1),
        }
    return results


def evaluate(
    checkpoint: Path, count: int, seed: int, batch: int = 16, tasks: Iterable[str] = tuple(GENERATED)
) -> dict[str, Any]:
    """What `evaluate_task` says of every task; a task whose data is not there says why it was skipped."""
    processor = AutoProcessor.from_pretrained(checkpoint, backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    results: dict[str, Any] = {"samples": count, "seed": seed}
    return results | {name: evaluate_task(model, processor, name, count, seed, batch) for name in tasks}
