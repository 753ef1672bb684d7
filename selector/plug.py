"""The plug: a vision-language model whose ``forward`` and ``generate`` select visual tokens first, for a while.

`select_tokens` puts `selector.pruning.prune_inputs` around the two methods of one model instance; prefill and KV cache
are really shorter. No class is patched and nothing global changes. For selectors that act inside the language model,
`selector.inside` does the rest.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from selector.base import TokenSelector
from selector.budget import Budget, Newlines, Scope
from selector.inside import Memory, acting
from selector.models import Relevance, adapter_of, has_visuals
from selector.pruning import Kept, Positions, Pruned, encoder_arguments, pruned_and_kept
from selector.registry import load_selector


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

        pruned, kept = pruned_and_kept(
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
        self.kept: Kept | None = None

    def recall(self, inputs: Mapping[str, Any]) -> Kept | None:
        """What was kept of these images; None where they are others, or anything else has changed."""
        if self.kept is None or self.state is None or self.state != self._state():
            return None
        images = self._images_of(inputs, self.kept.modality)
        same = images.keys() == self.images.keys() and all(_equal(images[name], self.images[name]) for name in images)
        return self.kept if same else None

    def remember(self, inputs: Mapping[str, Any], kept: Kept) -> None:
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
        used = encoder_arguments(self.model, modality)
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
