"""Shortened prompts: images encoded, a selector's choice, and the placeholders of dropped tokens cut out of the prompt.

`prune_inputs` is one pass through it: the model's own code encodes the images, a selector chooses, and the surviving
features go to the model as ``mm_encoder_outputs``, with a prompt that has a placeholder for each of them and no more.
All use of this seam of transformers (>= 5.19) is in this file; `selector.plug` puts it around a model's methods.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from selector.base import Stage, TokenSelector
from selector.budget import Budget
from selector.columns import compact
from selector.devices import synchronize
from selector.inside import Memory, acting, decoder_of
from selector.merging import Selection
from selector.models import Adapter, Encoded, Relevance, adapter_of, encode, has_visuals, model_type_of
from selector.plan import Plan
from selector.stages import Counts, checked_stages, mean_tokens, outside_needs, planned_counts
from selector.tokens import PAD, VisualTokens

Positions = Literal["contiguous", "original"]
"""Position ids of a shortened prompt, see `prune_inputs`."""


@dataclass
class Pruned:
    """Shortened inputs, and what was cut.

    Attributes:
        inputs: arguments for ``model.forward`` or ``model.generate``.
        keep: ``[I, L]`` keep mask over the packed slots; None without images.
        tokens: what the selector saw; None without images.
        features: per image, the visual tokens that the language model receives, merged where the selector merges.
        measured: visual tokens of each image that reach the language model, base view and newlines included; where
            tokens leave inside it, their average over its layers.
        full: the same before pruning.
        selection_seconds: wall time of the selector, the budget and the merging (not of the encoder).
        approximate: whether `keep` traces each packed token to the nearest encoder token only, see `Encoded`.
        inside: what is to leave inside the language model, which takes running the model within `acting`; None where
            nothing does. `keep` and `features` then are what reaches its first layer, until the model has run.

    Example:
        >>> from PIL import Image
        >>> from selector import load_selector
        >>> from selector.commands.loading import load_model
        >>> model, processor = load_model("checkpoints/llava-next-tiny", "cpu")
        >>> inputs = processor(text="<image> what is TOTAL?", images=Image.new("RGB", (96, 96)), return_tensors="pt")
        >>> pruned = prune_inputs(model, inputs, load_selector("norm"), Budget(16))
        >>> pruned.full, pruned.measured, inputs["input_ids"].shape[1] - pruned.inputs["input_ids"].shape[1]
        ([300], [16], 284)
    """

    inputs: dict[str, Any]
    keep: Bool[Tensor, "I L"] | None = None
    tokens: VisualTokens | None = None
    features: list[Tensor] = field(default_factory=list)
    measured: list[int | float] = field(default_factory=list)
    full: list[int] = field(default_factory=list)
    selection_seconds: float = 0.0
    approximate: bool = False
    inside: Plan | None = None

    @property
    def layers(self) -> list[list[int]]:
        """Per image, its visual tokens in each decoder layer; empty where tokens leave before the language model."""
        return self.inside.layers if self.inside else []

    @contextmanager
    def acting(self, model: Any, memory: Memory | None = None) -> Iterator[None]:
        """Within the block, one ``forward`` or ``generate`` of `inputs` loses the tokens that leave inside.

        Behind it `keep` is what is left after the last stage, `measured` and `layers` are as they were, and
        `selection_seconds` include the stages.

        Args:
            model: that the inputs are of.
            memory: of a block in which the cache is continued later.

        Raises:
            ValueError: on what `selector.inside` refuses by name.
        """
        plan = self.inside
        if plan is None:
            yield
            return
        outside, plan.seconds = self.selection_seconds - plan.seconds, 0.0  # of this run alone, not of earlier ones
        with acting(model, plan, memory):
            yield
        self.selection_seconds = outside + plan.seconds
        self.measured = [mean_tokens(own) for own in plan.layers]
        self.keep = self.keep if plan.last is None else plan.last


def prune_inputs(
    model: Any,
    inputs: Mapping[str, Any],
    selector: TokenSelector | None,
    budget: Budget | None = None,
    *,
    positions: Positions = "original",
    encoded: Encoded | None = None,
    relevance: Relevance | None = None,
    inside: bool = False,
) -> Pruned:
    """Processor outputs with fewer visual tokens.

    Args:
        model: a supported model (see `selector.models.encode`).
        inputs: processor outputs: input_ids, attention_mask, pixel_values and what the model wants beside them
            (image_sizes, image_grid_thw, ...), optionally labels and position_ids. Batches (padded on either side),
            several images and text-only rows are fine.
        selector: None keeps every token.
        budget: what may stay; needed with a selector.
        positions: position ids of the shortened prompt: ``"original"`` leaves every token where the full prompt had it,
            so that distances on the page stay what the language model knows; ``"contiguous"`` closes the gaps, which
            M-RoPE models refuse: rows and columns of an image have no gaps to close.
        encoded: the same images already encoded, to prune them many times.
        relevance: where a selector needs `text` and the model has no text tower, see `selector.models.encode`.
        inside: whether the caller runs the model within `Pruned.acting`. Without it selectors that act inside the
            language model are refused, since all their tokens would stay.

    Returns:
        Arguments for ``forward`` or ``generate``, with ``mm_encoder_outputs`` in place of the pixels, and what was cut.

    Raises:
        ValueError: images without input_ids, placeholders and visual tokens do not match, an argument of the prompt's
            length that the model's adapter does not know, a selector that acts inside the language model without
            `inside`, a budget that it cannot meet, or the selector's or budget's own errors.
    """
    return pruned_and_kept(model, inputs, selector, budget, positions, encoded, relevance, inside)[0]


def pruned_and_kept(
    model: Any,
    inputs: Mapping[str, Any],
    selector: TokenSelector | None,
    budget: Budget | None,
    positions: Positions,
    encoded: Encoded | None,
    relevance: Relevance | None,
    inside: bool,
) -> tuple[Pruned, Kept | None]:
    """`prune_inputs`, and what has been kept; None without images."""
    # What is wrong whatever the images show is refused before they are encoded.
    if positions not in ("contiguous", "original"):
        raise ValueError(f"positions must be 'contiguous' or 'original', got {positions!r}")
    if (selector is None) != (budget is None):
        raise ValueError("give both a selector and a budget, or neither to keep every token")
    if selector is not None and selector.acts == "inside" and not inside:
        raise ValueError(
            f"{type(selector).__name__} acts inside the language model: use select_tokens, or give inside=True and run "
            "the model within Pruned.acting"
        )
    if has_visuals(inputs) and inputs.get("input_ids") is None:
        raise ValueError("input_ids must be given with pixel_values: inputs_embeds have no placeholders to cut")

    stages, depth = _stages_of(model, selector)
    encoded = encoded or encode(model, inputs, outside_needs(stages), relevance)
    if encoded is None:
        return Pruned(dict(inputs)), None

    adapter = adapter_of(model)
    if adapter.positions is not None and positions == "contiguous":
        raise ValueError(
            f"positions='contiguous' has no meaning for a {model_type_of(model)!r} model, whose position ids of an "
            "image are its rows and columns; use positions='original'"
        )

    counts = _counts(selector, stages, depth, budget, encoded.tokens)
    if stages and stages[0].layer == 0 and budget is not None:
        kept = Kept.of(encoded, stages[0].selector, Counts.of(budget, counts[0]) if counts else budget)
    else:
        kept = Kept.of(encoded, None, None)

    pruned = kept.pruned(model, inputs, positions)
    if counts and budget is not None:
        inner = [n for n, stage in enumerate(stages) if stage.layer > 0]
        within = [stages[n] for n in inner], [counts[n] for n in inner]
        pruned.inside = Plan.of(
            *within, budget, encoded.tokens, kept.keep, pruned.inputs, encoded.image_token_id, depth
        )
        pruned.measured = [mean_tokens(own) for own in pruned.inside.layers]
    return pruned, kept


@dataclass(frozen=True)
class Kept:
    """What a selection has left of the images of a call, whatever is asked about them.

    Attributes:
        keep: ``[I, L]`` keep mask over the packed slots.
        tables: per image the kept tokens ``[K_i, d]``, merged ones in place; then the same of deepstack features.
        tokens: what the selector saw.
        seconds: wall time of the selection.
        image_token_id, modality, approximate: see `Encoded`.
        output: type of the encoder's output, which the model is handed again.
        joined: whether its images stand in one tensor, and not in a list.

    Example:
        >>> from PIL import Image
        >>> from selector import load_selector
        >>> from selector.commands.loading import load_model
        >>> model, processor = load_model("checkpoints/llava-next-tiny", "cpu")
        >>> asked = {"images": Image.new("RGB", (96, 96)), "return_tensors": "pt"}
        >>> first, second = (processor(text=f"<image> {text}", **asked) for text in ("is it red?", "or blue?"))
        >>> kept = Kept.of(encode(model, first, {"features"}), load_selector("norm"), Budget(16))
        >>> [kept.pruned(model, inputs, "original").measured for inputs in (first, second)]  # chosen once
        [[16], [16]]
    """

    keep: Bool[Tensor, "I L"]
    tables: list[list[Tensor]]
    tokens: VisualTokens
    seconds: float
    image_token_id: int
    modality: str
    approximate: bool
    output: type
    joined: bool

    @classmethod
    def of(cls, encoded: Encoded, selector: TokenSelector | None, budget: Budget | None) -> Kept:
        """Of the packed tokens, and of deepstack features if there are any, the same rows stay."""
        keep, tables, seconds = _select(encoded, selector, budget)
        masks = _rows_of(keep, encoded.tokens)
        kept = [[feats[mask.to(feats.device)] for feats, mask in zip(table, masks, strict=True)] for table in tables]

        # Of the encoding only what a prompt needs: the features of dropped tokens are let go of.
        return cls(
            keep,
            kept,
            encoded.tokens,
            seconds,
            encoded.image_token_id,
            encoded.modality,
            encoded.approximate,
            type(encoded.output),
            isinstance(encoded.output.pooler_output, Tensor),
        )

    def pruned(self, model: Any, inputs: Mapping[str, Any], positions: Positions) -> Pruned:
        """The prompt with these tokens in place of the images."""
        # What the encoder took (pixels, image sizes) is used up; the rest goes on to the language model.
        used = encoder_arguments(model, self.modality)
        new = {name: value for name, value in inputs.items() if name not in used}
        _check_rows(new, adapter_of(model), model_type_of(model))
        masks = _rows_of(self.keep, self.tokens)
        new |= _shorten(model, inputs, torch.cat(masks), self.image_token_id, positions)
        new["mm_encoder_outputs"] = {self.modality: self._output()}

        features = self.tables[0]
        measured: list[int | float] = [len(own) for own in features]
        full = self.tokens.lengths.tolist()
        return Pruned(new, self.keep, self.tokens, features, measured, full, self.seconds, self.approximate)

    def _output(self) -> Any:
        """A new object every time, with nothing but what is read: beam search edits its fields in place."""
        fields: dict[str, Any] = {"pooler_output": list(self.tables[0])}
        if self.joined:
            # Where the model wants one tensor, every token stands as an image of its own. Beam search repeats what
            # belongs to a row and finds the rows by counting tokens: images of unequal length would be too few to be
            # told apart.
            fields["pooler_output"] = torch.cat(self.tables[0])[:, None]
        if len(self.tables) > 1:
            fields["deepstack_features"] = [list(layer) for layer in self.tables[1:]]
        return self.output(**fields)


def _rows_of(keep: Bool[Tensor, "I L"], tokens: VisualTokens) -> list[Bool[Tensor, "_"]]:
    """The keep mask of each image, without the batch's padding."""
    return [row[:n] for row, n in zip(keep, tokens.lengths.tolist(), strict=True)]


def encoder_arguments(model: Any, modality: str) -> frozenset[str]:
    """Names of what the model's encoder takes of the inputs."""
    return frozenset(inspect.signature(getattr(model.base_model, f"get_{modality}_features")).parameters)


def _stages_of(model: Any, selector: TokenSelector | None) -> tuple[list[Stage], int]:
    """Where a selector's tokens leave this model (nowhere without a selector), and its layers where that matters."""
    if selector is None:
        return [], 0
    # Only what acts inside has to know the language model: adapters serve models whose decoder is of any kind.
    if selector.acts == "before":
        return [Stage(0, 1.0, selector)], 0
    depth = len(decoder_of(model).layers)
    return checked_stages(selector, depth), depth


def _counts(
    selector: TokenSelector | None, stages: list[Stage], depth: int, budget: Budget | None, tokens: VisualTokens
) -> list[list[int]]:
    """Per stage, the visual tokens that each image keeps; empty where the budget itself says it, before the model."""
    if selector is None or budget is None or selector.acts == "before":
        return []
    if isinstance(budget.keep, str):
        raise ValueError(
            f"keep={budget.keep!r} is adaptive: {type(selector).__name__} acts inside the language model and needs a "
            "count or a share"
        )

    # A share is of the image's tokens, rounded as it is before the language model; its average is over the layers.
    name, wanted, lengths = type(selector).__name__, budget.counts(tokens).tolist(), tokens.lengths.tolist()
    per_image = [
        planned_counts(name, length, count, depth, stages, selector.count)
        for length, count in zip(lengths, wanted, strict=True)
    ]
    return [list(stage) for stage in zip(*per_image, strict=True)]


def _select(
    encoded: Encoded, selector: TokenSelector | None, budget: Budget | None
) -> tuple[Bool[Tensor, "I L"], list[list[Tensor]], float]:
    """(keep mask, packed tokens and deepstack features with the merged ones in place, seconds)."""
    tables = [encoded.packed, *encoded.deepstack]
    if selector is None or budget is None:
        return encoded.tokens.slots != PAD, tables, 0.0

    # A GPU works on after its calls have returned: both ends of what is timed wait for it.
    device = encoded.tokens.features.device
    synchronize(device)
    start = time.perf_counter()
    with torch.no_grad():
        chosen: Selection = selector.select(encoded.tokens, budget)
    if chosen.flow is not None:
        tables = [chosen.flow.apply(table) for table in tables]

    synchronize(device)
    return chosen.keep, tables, time.perf_counter() - start


def _check_rows(rest: Mapping[str, Any], adapter: Adapter, kind: str) -> None:
    """Refuses what has the prompt's length and would go on uncut: models take it without a word, and are wrong."""
    ids = rest["input_ids"]
    known = {"input_ids", "attention_mask", "position_ids", "labels", *adapter.rows}
    for name, value in rest.items():
        if not isinstance(value, Tensor) or name in known:
            continue

        # [..., B or 1, S]: the prompt's length behind its rows, or alone.
        shape = (1, *value.shape)
        if any(shape[axis] == ids.shape[1] and shape[axis - 1] in (1, len(ids)) for axis in range(1, len(shape))):
            raise ValueError(
                f"{name} has the prompt's length (its shape is {tuple(value.shape)}), and the adapter of {kind!r} "
                "models does not say how to shorten it: leave it out, or add it to the adapter's rows"
            )


def _shorten(
    model: Any, inputs: Mapping[str, Any], kept: Bool[Tensor, "V"], image_token_id: int, positions: Positions
) -> dict[str, Tensor]:
    """Cuts the placeholders of dropped tokens, and re-pads every row on the side the batch was padded."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    visual = ids == image_token_id

    # A token more or less than there are placeholders would shift all behind it.
    if int(visual.sum()) != len(kept):
        raise ValueError(f"input_ids hold {int(visual.sum())} image placeholders, the images give {len(kept)} tokens")
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask must be of the shape of input_ids, {tuple(ids.shape)}, got {tuple(mask.shape)}"
        )

    # What stays of each row: its text, and the placeholders of kept tokens, which come in packed order.
    keep = mask.bool() & ~visual
    keep[visual] = kept.to(keep.device)
    order, real = compact(keep, right=bool((mask[:, -1] == 0).any()))

    def take(values: Tensor, fill: int) -> Tensor:
        return values.gather(-1, order.expand(*values.shape[:-1], -1)).masked_fill(~real, fill)

    # Everything that has the prompt's shape, each with what it holds at padding (-100: no label).
    adapter = adapter_of(model)
    new = {"input_ids": take(ids, _pad_id(model)), "attention_mask": real.to(mask.dtype)}
    padding = {"labels": -100} | {name: fill for name, (fill, _) in adapter.rows.items()}
    for name, fill in padding.items():
        if inputs.get(name) is not None:
            new[name] = take(inputs[name], fill)

    # Positions of the caller's, of a model with axes of its own, or counted along the full prompt.
    if inputs.get("position_ids") is not None:
        new["position_ids"] = take(inputs["position_ids"], 0)
    elif adapter.positions is not None:
        # The axis in front is for masks alone, and counts what is there: a gap in it would be read as a new sequence.
        count = (real.long().cumsum(-1) - 1).clamp(min=0)
        new["position_ids"] = torch.cat([count[None], take(adapter.positions(model, inputs), 0)])
    elif positions == "original" and not bool(kept.all()):  # with nothing cut, the model's own positions hold
        new["position_ids"] = take((mask.long().cumsum(-1) - 1).clamp(min=0), 0)
    return new


def _pad_id(model: Any) -> int:
    """What fills up shorter rows; masked, so that any id does where the model names none."""
    pad = model.generation_config.pad_token_id
    return 0 if pad is None else pad
