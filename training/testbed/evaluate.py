"""Stage 4: what the saved checkpoint reaches on held-out pages, through its own processor and `generate`.

Exact match of the whole answer after stripping blanks, greedy, all visual tokens; and blind, the same questions
without an image.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from selector.evaluation.tasks import documents, scenes
from selector.evaluation.tasks.sample import Sample

TASKS = {"documents": documents, "scenes": scenes}


def wilson(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% Wilson score interval of a proportion."""
    share, spread = right / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * (share * (1 - share) / total + spread / (4 * total)) ** 0.5
    return middle - half, middle + half


def answers(model: Any, processor: Any, samples: list[Sample], batch: int, blind: bool) -> list[str]:
    found = []
    for start in range(0, len(samples), batch):
        part = samples[start : start + batch]
        seen = [] if blind else [{"type": "image"}]
        chats = [[{"role": "user", "content": [*seen, {"type": "text", "text": one.question}]}] for one in part]
        prompts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        images = {} if blind else {"images": [one.image for one in part]}
        inputs = processor(text=prompts, return_tensors="pt", padding=True, **images)
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        found += processor.batch_decode(new, skip_special_tokens=True)
    return [text.strip() for text in found]


def evaluate(checkpoint: Path, count: int, seed: int, batch: int = 16) -> dict[str, Any]:
    """Accuracy and interval of every task, seen and blind, on `count` held-out questions."""
    processor = AutoProcessor.from_pretrained(checkpoint, backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    results: dict[str, Any] = {"samples": count, "seed": seed}
    for name, task in TASKS.items():
        samples = list(task.samples(count, seed))
        for way in ("seen", "blind"):
            begun = time.monotonic()
            given = answers(model, processor, samples, batch, blind=way == "blind")
            hits = [text == one.answer for text, one in zip(given, samples, strict=True)]
            low, high = wilson(sum(hits), count)
            kinds: dict[str, list[bool]] = {}
            for one, hit in zip(samples, hits, strict=True):
                kinds.setdefault(" ".join((one.question or "").split()[:2]), []).append(hit)
            results.setdefault(name, {})[way] = {
                "accuracy": round(sum(hits) / count, 4),
                "interval_95": [round(low, 4), round(high, 4)],
                "by_question": {kind: [sum(found), len(found)] for kind, found in sorted(kinds.items())},
                "seconds": round(time.monotonic() - begun, 1),
            }
    return results
