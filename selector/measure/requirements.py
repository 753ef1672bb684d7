"""What a comparison on a large model needs, by formula: memory of one GPU, and hours. Nothing here is measured.

    python -m selector.measure.requirements configs/compare/llava-next-7b.yaml

prints the lines that stand at the head of that file. With S tokens per prompt (the visual ones and `TEXT` of text), b
prompts at once, width d, hidden width m of the MLP, and e bytes per number:

    weights      parameters · e                                    counted on torch's meta device
    KV cache     2 · layers · heads · head width · e · S · b        twice for b > 1: answers given are read on a copy
    activations  (3·d + 3·m) · e · S · b                            one layer's MLP, the largest moment of a prefill
    time         operations / (peak · `BUSY`) + new tokens · weights / (b · bandwidth · `STREAMING`)

Attention is counted as sdpa runs it: eager attention would add heads · e · S² · b. A row whose answer changes is read
once more where b = 1. Selection, image processing and downloads are not counted, nor is Python's own time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForImageTextToText

from selector.errors import UsageError
from selector.measure.flops import cache_bytes, language_flops, qwen_tower_flops, tower_flops
from selector.measure.geometry import Geometry, find_geometry

MODELS = {
    "llava-hf/llava-v1.6-mistral-7b-hf": "llava-next-mistral-7b",
    "llava-hf/llava-v1.6-vicuna-13b-hf": "llava-next-13b",
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": "llava-onevision-7b",
    "Qwen/Qwen2.5-VL-7B-Instruct": "qwen2.5-vl-7b",
}
"""The geometry of each model by its name on the hub."""
VISUAL, TEXT = 2928, 64
"""Tokens per prompt: those of a 672 x 672 image in LLaVA-NeXT, for all models alike, and a question in its template."""
ELEMENT = 2
"""Bytes per number in bfloat16."""
CONTEXT = 10**9
"""Bytes of CUDA itself and of gaps between allocations."""
BUSY, STREAMING = 0.4, 0.5
"""Assumed: the share of the peak that a prefill reaches, and the share of the bandwidth that decoding reaches."""


@dataclass(frozen=True)
class Card:
    """A kind of GPU, by its data sheet.

    Attributes:
        name: what it is called here.
        flops: dense bfloat16 operations per second.
        bandwidth: bytes per second.
        number: how many share the samples.

    Example:
        >>> Card("24 GB", flops=165e12, bandwidth=1.008e12).number
        1
    """

    name: str
    flops: float
    bandwidth: float
    number: int = 1


CARDS = (Card("one 24 GB (RTX 4090)", 165e12, 1.008e12), Card("8 x 80 GB (A100)", 312e12, 2.039e12, 8))


@dataclass(frozen=True)
class Memory:
    """Bytes that one GPU holds at the fullest moment.

    Attributes:
        weights: of the whole model.
        cache: keys and values of a batch.
        activations: of the largest moment of a prefill.

    Example:
        >>> Memory(weights=15 * 10**9, cache=3 * 10**9, activations=10**9).total
        20000000000
    """

    weights: int
    cache: int
    activations: int

    @property
    def total(self) -> int:
        """All of it, and CUDA itself."""
        return self.weights + self.cache + self.activations + CONTEXT


def parameters(geometry: Geometry) -> int:
    """Parameters of a model of that size; no weight is allocated."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(geometry.config())
    return sum(weight.numel() for weight in model.parameters())


def memory(geometry: Geometry, batch: int, weight_bytes: int = ELEMENT, visual: int = VISUAL) -> Memory:
    """The memory of a prefill of `batch` prompts with all their visual tokens.

    Args:
        weight_bytes: per parameter; 1 where weights are stored in int8.
    """
    config, tokens = geometry.config(), visual + TEXT
    text = config.text_config
    copies = 2 if batch > 1 else 1
    return Memory(
        weights=parameters(geometry) * weight_bytes,
        cache=cache_bytes(config, tokens, ELEMENT) * batch * copies,
        activations=activation_bytes(text, tokens * batch, ELEMENT),
    )


def activation_bytes(text: Any, tokens: int, element: int) -> int:
    """Bytes of a prefill's largest moment: the MLP of one layer, whose gate, product and output meet.

    Args:
        text: configuration of the language model, with a gated MLP.
        tokens: of all prompts of a batch.
        element: bytes per number.
    """
    # Of width d: the embeddings, which the caller holds, the residual and what was normed of it.
    return (3 * text.hidden_size + 3 * text.intermediate_size) * element * tokens


def prompts(settings: Mapping[str, Any], visual: int = VISUAL) -> list[int]:
    """Tokens of the prompt of every row of a comparison: unpruned, blind, and each selector at each budget.

    Raises:
        UsageError: a budget that is neither a count nor a share.
    """
    kept = []
    for keep in settings["keep"]:
        if isinstance(keep, bool) or not isinstance(keep, (int, float)):
            raise UsageError(f"keep must be counts and shares here, got {keep!r}")
        kept.append(min(keep, visual) if isinstance(keep, int) else round(keep * visual))
    return [visual + TEXT, TEXT, *([count + TEXT for count in kept] * len(settings["selectors"]))]


def operations(geometry: Geometry, settings: Mapping[str, Any]) -> int:
    """Floating-point operations of one question: the image encoded once, and a prefill of every row."""
    config = geometry.config()
    tower = tower_flops(config, geometry.tiles) or qwen_tower_flops(config, VISUAL)

    # Without batches, an answer that changed is read again for its divergence: at most every pruned one.
    again = 2 if settings["batch_size"] == 1 else 1
    rows = [(language_flops(config, tokens, tokens), tokens) for tokens in prompts(settings)]
    if tower is None or any(flops is None for flops, _ in rows):
        raise UsageError(f"model must be of a kind whose operations are known, {geometry.kind} is not")
    return tower + sum((flops or 0) * (again if place > 1 else 1) for place, (flops, _) in enumerate(rows))


def hours(geometry: Geometry, settings: Mapping[str, Any], card: Card, weight_bytes: int = ELEMENT) -> float:
    """Hours of a comparison, shared by the cards; every answer as long as allowed."""
    rows, batch = len(prompts(settings)), settings["batch_size"]
    weights = parameters(geometry) * weight_bytes
    decoding = rows * settings["max_new_tokens"] * weights / (batch * card.bandwidth * STREAMING)
    seconds = operations(geometry, settings) / (card.flops * BUSY) + decoding
    return seconds * settings["samples"] * len(settings["tasks"]) / card.number / 3600


def described(settings: Mapping[str, Any]) -> list[str]:
    """The lines at the head of a config: what it needs, with the formulas filled in.

    Args:
        settings: of the config; model, selectors, keep, tasks, samples, max_new_tokens and batch_size must be there.

    Raises:
        UsageError: a setting that is not there, or a model of unknown size.
    """
    wanted = ("model", "selectors", "keep", "tasks", "samples", "max_new_tokens", "batch_size")
    if missing := [name for name in wanted if name not in settings]:
        raise UsageError(f"config must say {', '.join(missing)}")
    if settings["model"] not in MODELS:
        raise UsageError(f"model must be one of {', '.join(MODELS)}, got {settings['model']!r}")

    geometry = find_geometry(MODELS[settings["model"]])
    config, batch, rows = geometry.config(), settings["batch_size"], len(prompts(settings))
    text, count, tokens = config.text_config, parameters(geometry), VISUAL + TEXT
    packed = memory(geometry, batch).total > 24e9  # too much for the smaller card: 8 bits there
    per_token = cache_bytes(config, 1, ELEMENT)
    at_once = f"{tokens:,} tokens" + (f" x {batch} prompts" if batch > 1 else "")
    copies = " x 2 copies" if batch > 1 else ""
    held = memory(geometry, batch)
    lines = [
        "Needs, by formula (python -m selector.measure.requirements FILE prints these lines; nothing is measured):",
        f"  weights      {count:,} parameters x {ELEMENT} bytes = {held.weights / 1e9:.1f} GB",
        f"  KV cache     {per_token:,} bytes per token x {at_once}{copies} = {held.cache / 1e9:.1f} GB",
        f"  activations  (3 x {text.hidden_size:,} + 3 x {text.intermediate_size:,}) x {ELEMENT} bytes x {at_once} = "
        f"{held.activations / 1e9:.1f} GB",
        f"  together     {held.total / 1e9:.1f} GB with {CONTEXT / 1e9:.0f} GB for CUDA itself",
    ]
    if packed:
        small = memory(geometry, batch, 1)
        lines.append(f"  in int8      {small.total / 1e9:.1f} GB (one byte per weight), for a card of 24 GB")

    times = [hours(geometry, settings, card, 1 if packed and card.number == 1 else ELEMENT) for card in CARDS]
    said = " ".join(f"{card.name}: {time:.1f} h." for card, time in zip(CARDS, times, strict=True))
    tera = operations(geometry, settings) / 1e12
    lines += [
        f"  time         {rows} rows x {settings['samples'] * len(settings['tasks']):,} questions, {tera:,.0f} TFLOP "
        f"and at most {rows * settings['max_new_tokens']:,} new tokens per question, at {BUSY:.0%} of the peak",
        f"               and {STREAMING:.0%} of the bandwidth of the data sheets: {said}",
    ]
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Entry point of ``python -m selector.measure.requirements``."""
    parser = argparse.ArgumentParser(prog="python -m selector.measure.requirements")
    parser.add_argument("config", type=Path, help="a YAML file of selector compare")
    path = parser.parse_args(arguments).config
    try:
        lines = described(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (UsageError, OSError, yaml.YAMLError) as error:
        print(f"selector.measure.requirements: {error}", file=sys.stderr)
        return 2
    print(*(f"# {line}" for line in lines), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
