"""The plug: a vision-language model with fewer visual tokens, through public arguments of transformers only.

`prune_inputs` encodes the images with the model's own code, lets a selector choose, cuts the same placeholders out of
the prompt and hands the surviving features over as ``mm_encoder_outputs``; prefill and KV cache are really shorter.
`select_tokens` puts that around ``forward`` and ``generate`` of one model instance. No class is patched, nothing global
changes, and all use of this seam is in this file. Needs transformers >= 5.19.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from selector.base import TokenSelector
from selector.budget import Budget, Newlines, Scope
from selector.merging import Selection
from selector.models import Encoded, Relevance, encode
from selector.registry import load_selector
from selector.tokens import PAD, VisualTokens

Positions = Literal["contiguous", "original"]


@dataclass
class Pruned:
    """Shortened inputs, and what was cut.

    Attributes:
        inputs: arguments for ``model.forward`` or ``model.generate``.
        keep: ``[I, L]`` keep mask over the packed slots; None without images.
        tokens: what the selector saw; None without images.
        features: per image, the visual tokens that the language model receives, merged where the selector merges.
        measured: visual tokens of each image that reach the language model, base view and newlines included.
        full: the same before pruning.
        selection_seconds: wall time of the selector, the budget and the merging (not of the encoder).
    """

    inputs: dict[str, Any]
    keep: Bool[Tensor, "I L"] | None = None
    tokens: VisualTokens | None = None
    features: list[Tensor] = field(default_factory=list)
    measured: list[int] = field(default_factory=list)
    full: list[int] = field(default_factory=list)
    selection_seconds: float = 0.0


@dataclass
class SelectionLog:
    """What a `select_tokens` block did: one entry an image, in the order of the calls."""

    measured: list[int] = field(default_factory=list)
    full: list[int] = field(default_factory=list)
    selection_seconds: float = 0.0
    last: Pruned | None = None

    def add(self, pruned: Pruned) -> None:
        self.measured += pruned.measured
        self.full += pruned.full
        self.selection_seconds += pruned.selection_seconds
        self.last = pruned


def prune_inputs(
    model: Any,
    inputs: Mapping[str, Any],
    selector: TokenSelector | None,
    budget: Budget | None = None,
    *,
    positions: Positions = "original",
    encoded: Encoded | None = None,
    relevance: Relevance | None = None,
) -> Pruned:
    """Processor outputs with fewer visual tokens.

    Args:
        model: a supported model (see `selector.models.encode`).
        inputs: processor outputs: input_ids, attention_mask, pixel_values, image_sizes, optionally labels and
            position_ids. Batches (padded on either side), several images and text-only rows are fine.
        selector: None keeps every token.
        budget: what may stay; needed with a selector.
        positions: position ids of the shortened prompt: ``"original"`` leaves every token where the full prompt had it,
            so that distances on the page stay what the language model knows; ``"contiguous"`` closes the gaps.
        encoded: the same images already encoded, to prune them many times.
        relevance: where a selector needs `text` and the model has no text tower, see `selector.models.encode`.

    Raises:
        ValueError: placeholders and visual tokens do not match, the selector acts inside the language model, or the
            selector's or budget's own errors.
    """
    if positions not in ("contiguous", "original"):
        raise ValueError(f"positions must be 'contiguous' or 'original', got {positions!r}")
    if (selector is None) != (budget is None):
        raise ValueError("give both a selector and a budget, or neither to keep every token")
    if selector is not None and selector.acts != "before":
        raise ValueError(f"{type(selector).__name__} acts inside the language model, and this plug cuts before it")
    encoded = encoded or encode(model, inputs, selector.needs if selector else (), relevance)
    if encoded is None:
        return Pruned(dict(inputs))
    keep, packed, seconds = _select(encoded, selector, budget)
    lengths = encoded.tokens.lengths.tolist()
    masks = [row[:n] for row, n in zip(keep, lengths, strict=True)]
    kept = [feats[mask.to(feats.device)] for feats, mask in zip(packed, masks, strict=True)]
    encoder_arguments = inspect.signature(model.base_model.get_image_features).parameters
    new = {name: value for name, value in inputs.items() if name not in encoder_arguments}
    new |= _shorten(inputs, torch.cat(masks), encoded.image_token_id, positions, _pad_id(model))
    # A new object every time, with nothing but what is read: beam search edits pooler_output in place.
    new["mm_encoder_outputs"] = {"image": type(encoded.output)(pooler_output=list(kept))}
    return Pruned(new, keep, encoded.tokens, kept, [len(k) for k in kept], lengths, seconds)


@contextmanager
def select_tokens(
    model: Any,
    selector: TokenSelector | str | Mapping[str, Any],
    keep: int | float | str = 64,
    *,
    scope: Scope = "image",
    newlines: Newlines = "kept_rows",
    positions: Positions = "original",
    relevance: Relevance | None = None,
) -> Iterator[SelectionLog]:
    """Within the block, ``model(...)`` and ``model.generate(...)`` select visual tokens first.

    ``generate`` still returns the original prompt followed by the new tokens, so that callers who cut at the prompt's
    length stay right. Prompts without images pass through untouched. On leaving the block, however it is left, the
    model is as it was.

    Args:
        selector: an object or a spec (see `selector.registry`).
        keep, scope, newlines: see `Budget`.
        positions, relevance: see `prune_inputs`.

    Yields:
        A log with the measured visual tokens of every image that went through.
    """
    chosen, budget, log = load_selector(selector), Budget.parse(keep, scope, newlines), SelectionLog()
    chosen = chosen.to(model.device).eval()
    before = {name: vars(model)[name] for name in ("forward", "generate") if name in vars(model)}
    forward, generate = model.forward, model.generate

    def prune(arguments: dict[str, Any]) -> dict[str, Any]:
        pruned = prune_inputs(model, arguments, chosen, budget, positions=positions, relevance=relevance)
        log.add(pruned)
        return pruned.inputs

    @functools.wraps(forward)
    def pruned_forward(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(forward).bind_partial(*args, **kwargs)
        arguments = dict(bound.arguments)
        arguments |= arguments.pop("kwargs", {})
        if arguments.get("pixel_values") is None:
            return forward(*args, **kwargs)
        return forward(**prune(arguments))

    @functools.wraps(generate)
    def pruned_generate(inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        if inputs is not None:
            kwargs["input_ids"] = inputs
        if kwargs.get("pixel_values") is None:
            return generate(*args, **kwargs)
        prompt, settings = kwargs["input_ids"], kwargs.get("generation_config") or model.generation_config
        if kwargs.get("prefill_chunk_size") or getattr(settings, "prefill_chunk_size", None):
            raise ValueError("prefill_chunk_size must be None: chunks are cut by the original prompt's length")
        if positions == "original" and kwargs.get("use_cache", settings.use_cache) is False:
            raise ValueError(
                "positions='original' needs use_cache=True (or use positions='contiguous'): generate() drops a mask of "
                "ones, and without mask and cache transformers reads gaps in position ids as packed sequences"
            )
        with torch.no_grad():  # as generate itself; and an assistant model deep-copies its arguments
            kwargs = prune(kwargs)
        start = kwargs["input_ids"].shape[1]
        for name in ("max_length", "min_length"):
            if kwargs.get(name) is not None:
                kwargs[name] -= prompt.shape[1] - start
        result = generate(*args, **kwargs)
        sequences = result if isinstance(result, Tensor) else result.sequences
        repeats = sequences.shape[0] // prompt.shape[0]
        sequences = torch.cat([prompt.repeat_interleave(repeats, 0).to(sequences), sequences[:, start:]], 1)
        if isinstance(result, Tensor):
            return sequences
        result.sequences = sequences
        return result

    model.forward, model.generate = pruned_forward, pruned_generate
    try:
        yield log
    finally:
        for name in ("forward", "generate"):
            delattr(model, name)
            if name in before:
                setattr(model, name, before[name])


def _select(
    encoded: Encoded, selector: TokenSelector | None, budget: Budget | None
) -> tuple[Bool[Tensor, "I L"], list[Tensor], float]:
    """(keep mask, packed tokens with the merged ones in place, seconds)."""
    if selector is None or budget is None:
        return encoded.tokens.slots != PAD, encoded.packed, 0.0
    device = encoded.tokens.features.device
    _synchronize(device)
    start = time.perf_counter()
    with torch.no_grad():
        chosen: Selection = selector.select(encoded.tokens, budget)
    packed = encoded.packed if chosen.flow is None else chosen.flow.apply(encoded.packed)
    _synchronize(device)
    return chosen.keep, packed, time.perf_counter() - start


def _shorten(
    inputs: Mapping[str, Any], kept: Bool[Tensor, "V"], image_token_id: int, positions: Positions, pad_id: int
) -> dict[str, Tensor]:
    """Cuts the placeholders of dropped tokens, and re-pads every row on the side the batch was padded."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    visual = ids == image_token_id
    if int(visual.sum()) != len(kept):
        raise ValueError(f"input_ids hold {int(visual.sum())} image placeholders, the images give {len(kept)} tokens")
    keep = mask.bool() & ~visual
    keep[visual] = kept.to(keep.device)
    order, real = _compact(keep, right=bool((mask[:, -1] == 0).any()))

    def take(values: Tensor, fill: int) -> Tensor:
        return values.gather(1, order).masked_fill(~real, fill)

    new = {"input_ids": take(ids, pad_id), "attention_mask": real.to(mask.dtype)}
    if inputs.get("position_ids") is not None:
        new["position_ids"] = take(inputs["position_ids"], 0)
    elif positions == "original" and not bool(kept.all()):  # with nothing cut, the model's own positions hold
        new["position_ids"] = take((mask.long().cumsum(-1) - 1).clamp(min=0), 0)
    if inputs.get("labels") is not None:
        new["labels"] = take(inputs["labels"], -100)
    return new


def _compact(keep: Bool[Tensor, "B S"], right: bool) -> tuple[Int[Tensor, "B R"], Bool[Tensor, "B R"]]:
    """Source columns of the shortened rows, order kept, padding on one side; and which columns are real."""
    width = int(keep.sum(1).max())
    order = (~keep if right else keep).int().argsort(dim=1, stable=True)
    order = order[:, :width] if right else order[:, order.shape[1] - width :]
    return order, keep.gather(1, order)


def _pad_id(model: Any) -> int:
    pad = model.generation_config.pad_token_id
    return 0 if pad is None else pad


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
