"""The plug: a vision-language model with fewer visual tokens, through public arguments of transformers only.

`prune_inputs` encodes the images with the model's own code, lets a selector choose, cuts the dropped tokens'
placeholders out of the prompt and hands the surviving features over as ``mm_encoder_outputs``; prefill and KV cache are
really shorter. `select_tokens` puts that around ``forward`` and ``generate`` of one model instance. No class is
patched, nothing global changes, and all use of this seam is in this file. Needs transformers >= 5.19. For selectors
that act inside the language model, `selector.inside` does the rest.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from selector.base import Stage, TokenSelector
from selector.budget import Budget, Newlines, Scope
from selector.columns import compact
from selector.devices import synchronize
from selector.inside import Memory, acting, decoder_of
from selector.merging import Selection
from selector.models import Adapter, Encoded, Relevance, adapter_of, encode, has_visuals, model_type_of
from selector.plan import Plan
from selector.registry import load_selector
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


@dataclass
class SelectionLog:
    """What a `select_tokens` block did.

    Attributes:
        measured: per image, in the order of the calls, visual tokens that reached the language model; where tokens
            leave inside it, their average over its layers.
        layers: per image its visual tokens in each decoder layer, of selectors that act inside the language model.
        full: as `measured`, before pruning.
        selection_seconds: wall time of all selections.
        last: the outcome of the latest call, whose `tokens` say where tokens lie and have no values: a log that lives
            on must not hold the features of every token (`prune_inputs` returns them).
        reused: calls about the images of the call before, whose kept tokens were taken again.

    Example:
        >>> log = SelectionLog()
        >>> for kept, full in ((64, 320), (16, 80)):  # two calls, one image each
        ...     _ = log.add(Pruned({}, measured=[kept], full=[full]))
        >>> log.measured, sum(log.measured) / sum(log.full)
        ([64, 16], 0.2)
    """

    measured: list[int | float] = field(default_factory=list)
    full: list[int] = field(default_factory=list)
    selection_seconds: float = 0.0
    last: Pruned | None = None
    layers: list[list[int]] = field(default_factory=list)
    reused: int = 0

    def add(self, pruned: Pruned) -> Pruned:
        """Counts one call, and returns its outcome as `last` keeps it."""
        self.measured += pruned.measured
        self.layers += pruned.layers
        self.full += pruned.full
        self.selection_seconds += pruned.selection_seconds
        outline = None if pruned.tokens is None else pruned.tokens.outline()
        plan = None if pruned.inside is None else replace(pruned.inside, tokens=pruned.inside.tokens.outline())
        self.last = replace(pruned, tokens=outline, inside=plan)
        return self.last


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
    return _prune(model, inputs, selector, budget, positions, encoded, relevance, inside)[0]


def _prune(
    model: Any,
    inputs: Mapping[str, Any],
    selector: TokenSelector | None,
    budget: Budget | None,
    positions: Positions,
    encoded: Encoded | None,
    relevance: Relevance | None,
    inside: bool,
) -> tuple[Pruned, _Kept | None]:
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
        kept = _Kept.of(encoded, stages[0].selector, Counts.of(budget, counts[0]) if counts else budget)
    else:
        kept = _Kept.of(encoded, None, None)

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
class _Kept:
    """What a selection has left of the images of a call, whatever is asked about them.

    Attributes:
        keep: ``[I, L]`` keep mask over the packed slots.
        tables: per image the kept tokens ``[K_i, d]``, merged ones in place; then the same of deepstack features.
        tokens: what the selector saw.
        seconds: wall time of the selection.
        image_token_id, modality, approximate: see `Encoded`.
        output: type of the encoder's output, which the model is handed again.
        joined: whether its images stand in one tensor, and not in a list.
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
    def of(cls, encoded: Encoded, selector: TokenSelector | None, budget: Budget | None) -> _Kept:
        """Of the packed tokens, and of deepstack features if there are any, the same rows stay."""
        keep, tables, seconds = _select(encoded, selector, budget)
        masks = _rows_of(keep, encoded.tokens)
        kept = [[feats[mask.to(feats.device)] for feats, mask in zip(table, masks, strict=True)] for table in tables]
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
        used = _encoder_arguments(model, self.modality)
        new = {name: value for name, value in inputs.items() if name not in used}
        _check_rows(new, adapter_of(model), model_type_of(model))
        masks = _rows_of(self.keep, self.tokens)
        new |= _shorten(model, inputs, torch.cat(masks), self.image_token_id, positions)
        new["mm_encoder_outputs"] = {self.modality: self._output()}

        features = self.tables[0]
        measured, full = [len(own) for own in features], self.tokens.lengths.tolist()
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


def _encoder_arguments(model: Any, modality: str) -> frozenset[str]:
    """Names of what the model's encoder takes of the inputs."""
    return frozenset(inspect.signature(getattr(model.base_model, f"get_{modality}_features")).parameters)


class _LastImages:
    """What was kept of the images of the latest call, to answer further questions about the same images.

    Only for selectors that read nothing of the question, and while nothing has changed on which the choice depends:
    pixels are compared one by one, weights by torch's count of their changes.
    """

    def __init__(self, model: Any, selector: TokenSelector):
        self.model, self.selector = model, selector
        self.blind = selector.acts == "before" and not selector.sees_question
        self.images: dict[str, Any] = {}
        self.state: Any = None
        self.kept: _Kept | None = None

    def recall(self, inputs: Mapping[str, Any]) -> _Kept | None:
        """What was kept of these images; None where they are others, or anything else has changed."""
        if self.kept is None or self.state is None or self.state != self._state():
            return None
        images = self._images_of(inputs, self.kept.modality)
        same = images.keys() == self.images.keys() and all(_equal(images[name], self.images[name]) for name in images)
        return self.kept if same else None

    def remember(self, inputs: Mapping[str, Any], kept: _Kept) -> None:
        """Keeps the kept tokens and a copy of the pixels, and nothing of what was dropped."""
        self.kept = None

        # Features with a graph belong to one backward pass; dropout draws anew.
        graph = any(feats.requires_grad for table in kept.tables for feats in table)
        if not self.blind or graph or self.model.training:
            return
        images = self._images_of(inputs, kept.modality)
        self.images = {name: value.clone() if isinstance(value, Tensor) else value for name, value in images.items()}
        self.state, self.kept = self._state(), replace(kept, tokens=kept.tokens.outline(), seconds=0.0)

    def _images_of(self, inputs: Mapping[str, Any], modality: str) -> dict[str, Any]:
        used = _encoder_arguments(self.model, modality)
        return {name: value for name, value in inputs.items() if name in used and value is not None}

    def _state(self) -> Any:
        """What the encoder and the selector depend on beside the images; None where torch does not count changes."""
        parts = (self.model, self.selector)
        tensors = [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]
        if any(tensor.is_inference() for tensor in tensors):
            return None
        kind = self.model.device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        return self.model.training, autocast, [(tensor.data_ptr(), tensor._version) for tensor in tensors]


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.device == two.device and one.dtype == two.dtype and torch.equal(one, two)
    return type(one) is type(two) and one == two


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


@contextmanager
def select_tokens(
    model: Any,
    selector: TokenSelector | str | Mapping[str, Any],
    keep: int | float | str | np.number = 64,
    *,
    scope: Scope = "image",
    newlines: Newlines = "kept_rows",
    positions: Positions = "original",
    relevance: Relevance | None = None,
) -> Iterator[SelectionLog]:
    """Within the block, ``model(...)`` and ``model.generate(...)`` select visual tokens first.

    Selectors that act inside the language model (`TokenSelector.stages`) let tokens leave between its layers. Position
    ids then are those of the prompt that enters it, logits and loss keep the prompt's length, and a cache that was
    filled within the block can be continued there; see `selector.inside`.

    ``generate`` still returns the original prompt followed by the new tokens, so that callers who cut at the prompt's
    length stay right, and `max_length` and `min_length` (as arguments, or from a generation config) mean the original
    prompt's length too. Prompts without images pass through untouched. On leaving the block, however it is left, the
    model is as it was, and so are the device and the training mode of a selector that was given as an object.

    A further question about the images of the call before, pixel by pixel the same, is answered from the tokens that
    were kept then, without encoding or selecting again (`SelectionLog.reused`), unless the selector reads the question
    or acts inside the language model. For this a block holds a copy of these pixels and the kept tokens.

    Blocks may be nested, and left in any order: of those still open, the one entered last selects. They belong to the
    thread (and asyncio task) that opened them; a second one may use the model, but not open a block of its own, since
    a model has one ``forward``. Within a block a model cannot be copied or pickled.

    Args:
        selector: an object or a spec (see `selector.registry`).
        keep, scope, newlines: see `Budget`.
        positions, relevance: see `prune_inputs`.

    Yields:
        A log with the measured visual tokens of every image that went through.

    Raises:
        RuntimeError: another thread or task has a block open on this model.
        ValueError: on a selector without weights, and see `prune_inputs`.
    """
    chosen, budget, log = load_selector(selector), Budget.parse(keep, scope, newlines), SelectionLog()
    memory, last = Memory(), _LastImages(model, chosen)

    def prune(arguments: dict[str, Any]) -> Pruned:
        # Further questions about the images of the latest call: neither encoded nor selected from again.
        if (kept := last.recall(arguments)) is not None:
            log.reused += 1
            return log.add(kept.pruned(model, arguments, positions))

        pruned, kept = _prune(
            model, arguments, chosen, budget, positions, None, relevance, inside=chosen.acts == "inside"
        )
        if kept is not None:
            last.remember(arguments, kept)

        # What left inside is known once the model has run; all others let go of what was dropped before it does.
        return pruned if pruned.inside is not None else log.add(pruned)

    @contextmanager
    def acts(pruned: Pruned) -> Iterator[None]:
        with pruned.acting(model, memory):
            yield
        if pruned.inside is not None:  # what left inside is known once the model has run
            log.add(pruned)

    def resumed(cache: Any) -> AbstractContextManager[None]:
        return acting(model, None, memory) if memory.knows(cache) else nullcontext()

    # On the instance, not on its class: other models of the class go on as they are.
    with _borrowed(chosen, model.device):
        blocks = _Blocks.opened(model)
        block = (
            _pruned_forward(blocks.forward, prune, acts, resumed),
            _pruned_generate(model, blocks.generate, prune, acts, positions),
        )
        blocks.enter(model, block)
        try:
            yield log
        finally:
            blocks.leave(model, block)


class _Blocks:
    """The `select_tokens` blocks open on a model, kept in its ``vars`` while there are any."""

    NAME = "_selection_blocks"
    lock = threading.Lock()

    def __init__(self, model: Any):
        self.owner = _caller()

        # Methods that were set on the instance are put back in the end; those of its class only have to be uncovered.
        self.before = {name: vars(model)[name] for name in ("forward", "generate") if name in vars(model)}
        self.forward, self.generate = model.forward, model.generate
        self.open: list[tuple[Callable, Callable]] = []

    @classmethod
    def opened(cls, model: Any) -> _Blocks:
        """The blocks of a model, made where none is open; a RuntimeError where they are another thread's or task's."""
        # Locked, since two threads may ask at once and both find none.
        with cls.lock:
            blocks = vars(model).get(cls.NAME)
            if blocks is None:
                blocks = vars(model)[cls.NAME] = cls(model)
            if blocks.owner != _caller():
                raise RuntimeError(
                    "select_tokens: another thread or task has a block open on this model; "
                    "open blocks one after the other, or give each thread a model of its own"
                )
            return blocks

    def enter(self, model: Any, block: tuple[Callable, Callable]) -> None:
        """Puts a block's (forward, generate) on the model."""
        self.open.append(block)
        model.forward, model.generate = block

    def leave(self, model: Any, block: tuple[Callable, Callable]) -> None:
        """Takes a block away, wherever it stands among the open ones; after the last, the model is as it was."""
        with self.lock:
            self.open = [other for other in self.open if other is not block]
            if self.open:
                model.forward, model.generate = self.open[-1]
                return

            for name in ("forward", "generate"):
                delattr(model, name)
                if name in self.before:
                    setattr(model, name, self.before[name])
            del vars(model)[self.NAME]

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        # The copy's forward would go on running the original, whatever becomes of the copy's weights.
        raise TypeError("a model must not be copied or pickled within select_tokens: do it outside of the block")


def _caller() -> tuple[int, Any]:
    """The thread, and the asyncio task in it, that is at work."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop
        task = None
    return threading.get_ident(), task


@contextmanager
def _borrowed(selector: TokenSelector, device: torch.device) -> Iterator[None]:
    """In evaluation mode and on `device` within the block; as it was after it."""
    # Refused before anything is moved: from several devices there would be no way back.
    homes = {tensor.device for tensor in (*selector.parameters(), *selector.buffers())}
    if len(homes) > 1:
        raise ValueError(f"selector must be on one device, {type(selector).__name__} is on {sorted(map(str, homes))}")
    home = next(iter(homes), device)
    if home.type == "meta" and device.type != "meta":
        raise ValueError(f"selector must have weights, {type(selector).__name__} is on the meta device")

    # Part by part, since some may be frozen in evaluation mode while the selector trains.
    modes = [(part, part.training) for part in selector.modules()]
    try:
        selector.to(device).eval()
        yield
    finally:
        if home != device:
            selector.to(home)
        for part, training in modes:
            part.training = training


Prune = Callable[[dict[str, Any]], Pruned]
"""Shortens the arguments of a call."""
Acts = Callable[[Pruned], AbstractContextManager[None]]
"""The time in which what leaves inside the language model leaves."""
Resumed = Callable[[Any], AbstractContextManager[None]]
"""The same for the continuation of a cache, which may be None."""


def _pruned_forward(forward: Callable, prune: Prune, acts: Acts, resumed: Resumed) -> Callable:
    """``forward`` of shortened inputs where there are images; decoding steps and text pass through untouched."""

    @functools.wraps(forward)
    def pruned_forward(*args: Any, **kwargs: Any) -> Any:
        arguments = _named(forward, args, kwargs)
        if not has_visuals(arguments):
            with resumed(arguments.get("past_key_values")):
                return forward(*args, **kwargs)
        pruned = prune(arguments)
        with acts(pruned):
            return forward(**pruned.inputs)

    return pruned_forward


def _pruned_generate(model: Any, generate: Callable, prune: Prune, acts: Acts, positions: Positions) -> Callable:
    """``generate`` of shortened inputs, whose result begins with the original prompt."""

    @functools.wraps(generate)
    def pruned_generate(*args: Any, **kwargs: Any) -> Any:
        arguments = _named(generate, args, kwargs)
        if arguments.get("inputs") is not None:
            arguments["input_ids"] = arguments.pop("inputs")
        if not has_visuals(arguments):
            return generate(*args, **kwargs)

        # Settings under which generate would misread a shortened prompt are refused.
        settings = arguments.get("generation_config") or model.generation_config
        if arguments.get("prefill_chunk_size") or getattr(settings, "prefill_chunk_size", None):
            raise ValueError("prefill_chunk_size must be None: chunks are cut by the original prompt's length")
        gaps = positions == "original" and adapter_of(model).positions is None

        with torch.no_grad():  # as generate itself; and an assistant model deep-copies its arguments
            pruned = prune(arguments)
        shortened = pruned.inputs
        cached = arguments.get("use_cache", settings.use_cache) is not False
        if gaps and not cached and shortened.get("position_ids") is not None:
            raise ValueError(
                "positions='original' needs use_cache=True (or use positions='contiguous'): generate() drops a mask of "
                "ones, and without mask and cache transformers reads gaps in position ids as packed sequences"
            )
        prompt, start = arguments["input_ids"], shortened["input_ids"].shape[1]
        with acts(pruned):
            result = generate(**_shorter(shortened, model.generation_config, prompt.shape[1], start))

        # The shortened prompt in front of every sequence is exchanged for the original; beams, and several sequences
        # per row, repeat it.
        sequences = result if isinstance(result, Tensor) else result.sequences
        repeats = sequences.shape[0] // prompt.shape[0]
        sequences = torch.cat([prompt.repeat_interleave(repeats, 0).to(sequences), sequences[:, start:]], 1)
        if isinstance(result, Tensor):
            return sequences
        result.sequences = sequences
        return result

    return pruned_generate


def _named(function: Callable, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Every argument by its name, those that the function takes as ``**kwargs`` among them."""
    arguments = dict(inspect.signature(function).bind_partial(*args, **kwargs).arguments)
    return arguments | arguments.pop("kwargs", {})


def _shorter(arguments: dict[str, Any], defaults: Any, full: int, start: int) -> dict[str, Any]:
    """The arguments of generate with `max_length` and `min_length`, which count the prompt, less what was cut of it.

    They come from an argument, else from the generation config passed, else from the model's (`defaults`); a number of
    new tokens wins over each of them, and needs no correction.

    Args:
        full, start: tokens of the prompt before and after pruning.
    """
    given = arguments.get("generation_config")
    sources = [arguments, *(vars(config) for config in (given, defaults) if config is not None)]

    def setting(name: str) -> Any:
        return next((source[name] for source in sources if source.get(name) is not None), None)

    changed = {}
    longest, shortest = setting("max_length"), setting("min_length")
    if longest is not None and setting("max_new_tokens") is None:
        if longest <= full:
            raise ValueError(f"max_length must be above the prompt's length of {full} tokens, got {longest}")
        changed["max_length"] = longest - (full - start)
    if shortest is not None and setting("min_new_tokens") is None:
        changed["min_length"] = max(0, shortest - (full - start))
    if given is None:
        return arguments | changed

    # transformers wants either a config or arguments: what was no argument is corrected in a copy of the config.
    given = copy.deepcopy(given)
    for name, value in changed.items():
        if arguments.get(name) is None:
            setattr(given, name, value)
    return arguments | {"generation_config": given} | {k: v for k, v in changed.items() if arguments.get(k) is not None}


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
