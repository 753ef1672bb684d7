"""Inside the language model: visual tokens leave between its layers, by hooks on the modules of one instance.

The only file that sets hooks on a language model. `acting` sets them for the time of one call and takes them away
however it ends; no class is patched, and nothing of the call's outcome changes shape: prefill really shortens from the
stage's layer on, so do the caches of these layers, and hidden states are brought back to full length behind the last
layer, so that logits, labels and loss fit the prompt.

How a stage at layer K goes (`selector.base.Stage`): in front of layer K the plug fills the fields of `VisualTokens`
that the stage's selector names in `needs` (those of `selector.layer_view.READERS`; all others are those of the vision
tower), cuts the table down to the tokens still there, and calls `TokenSelector.select` with the number that each image
may keep. The columns of the others are cut out of hidden states, position embeddings and masks, for this layer and all
that follow; position ids stay those of the prompt that enters the language model.

Attention is never asked of the model: queries and keys are overheard at ``q_proj`` and ``k_proj``, and a softmax is
taken for the rows that a selector asks for, so that eager attention, SDPA and FlashAttention serve alike.

**A new method inside** is a file in ``selector/methods`` like any other: a selector with ``acts = "inside"``, its
``needs``, and `stages`, whose layers are `scaled_layer` of the published ones (`selector.methods.fastv` is the
shortest). A new quantity is a function in `READERS`, a field of `VisualTokens` and its name in
`selector.tokens.INSIDE`; `LayerView` has what such functions are made of. Selectors that merge (`Selection.flow`) do so
on the hidden states.

Within a block, caches that were filled under it can be continued, by ``generate`` and by hand. Refused by name: caches
that have one length for all layers (StaticCache), compiled models, flex attention, a second prompt with images on a
filled cache, sliding windows once a sequence is as long as the window, and stages below a layer to which the model adds
further visual features (deepstack, Qwen3-VL).

Shapes: I images, L packed slots, B rows of the prompt, S columns of it, R columns still there, T tiles, N patches.
"""

from __future__ import annotations

import copy
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from selector.base import Stage
from selector.columns import Columns
from selector.devices import synchronize
from selector.layer_view import EMBEDDED, OVERHEARD, READERS, LayerView, Passed
from selector.merging import Selection
from selector.plan import Plan
from selector.stages import Counts
from selector.tokens import INSIDE, PAD


@dataclass
class Memory:
    """Which columns the layers of a cache hold: kept as long as the cache, by the block under which it was filled.

    Example:
        >>> from transformers import DynamicCache
        >>> memory, cache = Memory(), DynamicCache()
        >>> memory.caches[cache] = {}  # a prompt of which nothing left
        >>> memory.knows(cache), memory.knows(DynamicCache()), memory.knows(None)
        (True, False, False)
    """

    caches: weakref.WeakKeyDictionary[Any, dict[int, Columns]] = field(default_factory=weakref.WeakKeyDictionary)
    threads: set[int] = field(default_factory=set)

    def copied(self, cache: Any) -> Any:
        """A copy of a cache, to be continued like the original."""
        copied = copy.deepcopy(cache)
        if cache in self.caches:
            self.caches[copied] = self.caches[cache]
        return copied

    def knows(self, cache: Any) -> bool:
        """Whether a forward pass with this cache, outside of any other call, needs `acting`."""
        return cache is not None and threading.get_ident() not in self.threads and cache in self.caches


def decoder_of(model: Any) -> Any:
    """The language model, whose ``layers`` are decoder layers.

    Raises:
        ValueError: a model without one of this kind.
    """
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    attention = getattr(layers[0], "self_attn", None) if layers is not None and len(layers) else None
    if attention is None or not all(hasattr(attention, part) for part in ("q_proj", "k_proj", "head_dim", "scaling")):
        raise ValueError(
            f"{type(decoder).__name__} has no decoder layers with self_attn, q_proj and k_proj: selectors act before "
            "this language model only"
        )
    return decoder


_ACTING: set[tuple[int, int]] = set()
"""(language model, thread) of the open blocks: two sets of hooks on one model would both cut."""


@contextmanager
def acting(model: Any, plan: Plan | None, memory: Memory | None = None) -> Iterator[None]:
    """Within the block, prompts lose their visual tokens as `plan` has it, and caches that know of it are continued.

    Args:
        model: the whole model.
        plan: of the prompt that the next call reads; None to continue a cache of `memory`.
        memory: of an open `select_tokens` block.

    Raises:
        RuntimeError: such a block is open already, on this model and in this thread.
        ValueError: what this module refuses by name.
    """
    decoder = decoder_of(model)
    _refuse_model(model)
    run, handles, place = _Run(decoder, plan, memory or Memory()), [], (id(decoder), threading.get_ident())

    if place in _ACTING:
        raise RuntimeError("acting: this model is within another block of this thread; one prompt is pruned at a time")
    _ACTING.add(place)
    run.memory.threads.add(run.thread)
    try:
        run.attach(handles)
        yield
    finally:
        for handle in handles:
            handle.remove()
        run.memory.threads.discard(run.thread)
        _ACTING.discard(place)


class _Run:
    """The hooks of one call and what passes between them."""

    def __init__(self, decoder: Any, plan: Plan | None, memory: Memory):
        self.decoder, self.plan, self.memory = decoder, plan, memory
        self.thread = threading.get_ident()
        self.stages = {stage.layer: number for number, stage in enumerate(plan.stages)} if plan else {}
        self.needs = frozenset().union(*(stage.selector.needs for stage in plan.stages)) if plan else frozenset()
        self.depth = len(decoder.layers)
        self.implementation = str(decoder.config._attn_implementation)
        self.prefill = self.started = False
        self.columns: dict[int, Columns] = {}  # of the stages passed, by layer
        self.heard: dict[str, Tensor] = {}  # queries, keys, cos and sin of the layer that a stage will ask for
        self.kept = plan.kept if plan else None
        self.embedded: Tensor | None = None  # what enters the first layer
        self.cut: dict[Any, Any] = {}  # arguments of this pass at the columns still there, shared by layers

    def attach(self, handles: list[Any]) -> None:
        """Sets the hooks, and puts their handles into the list one by one."""
        handles.append(self.decoder.register_forward_pre_hook(self._begin, with_kwargs=True))
        for number, layer in enumerate(self.decoder.layers):
            # The number is bound by default: a closure would see the last one.
            def enter(module: Any, args: Any, kwargs: Any, number: int = number) -> Any:
                return self._enter(number, module, args, kwargs)

            handles.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
            if number + 1 in self.stages and self._needs(number + 1) & OVERHEARD:
                for part in ("q_proj", "k_proj"):

                    def listen(_: Any, __: Any, out: Tensor, part: str = part) -> None:
                        if self.prefill and self.thread == threading.get_ident():
                            self.heard[part] = out.detach()

                    handles.append(getattr(layer.self_attn, part).register_forward_hook(listen))
        handles.append(self.decoder.layers[-1].register_forward_hook(self._leave))

    def _needs(self, layer: int) -> frozenset[str]:
        plan = self.plan
        return plan.stages[self.stages[layer]].selector.needs if plan else frozenset()

    def _begin(self, _: Any, __: Any, kwargs: dict[str, Any]) -> None:
        """A forward pass of the language model starts: a prompt, or the continuation of a cache."""
        if self.thread != threading.get_ident():
            return
        cache, embedded = kwargs.get("past_key_values"), kwargs["inputs_embeds"]
        _refuse_cache(cache)
        past = 0 if cache is None else cache.get_seq_length()
        _refuse_window(self.decoder.config, past + embedded.shape[1])

        self.prefill, self.cut = past == 0, {}
        if not self.prefill:
            if cache not in self.memory.caches or (self.plan is not None and not self.started):
                raise ValueError(
                    "past_key_values must be empty for a prompt with images, and for text filled within this block: "
                    "layers of a cache that was filled elsewhere hold other columns"
                )
            self.columns = self.memory.caches[cache]
            return

        plan = self.plan
        if plan is None:
            return
        if embedded.shape[1] < plan.prompt.shape[1] or embedded.shape[0] % len(plan.prompt):
            raise ValueError(
                f"the language model got {tuple(embedded.shape[:2])} tokens, this prompt has {tuple(plan.prompt.shape)}"
            )
        deep = len(kwargs.get("deepstack_visual_embeds") or ())
        if min(self.stages) < deep:
            raise ValueError(
                f"layer must be >= {deep} for this model, whose first {deep} layers add further visual features "
                f"(deepstack) at all visual tokens, got {min(self.stages)}"
            )
        self.columns, self.kept, plan.last, self.started = {}, plan.kept, plan.kept, True

    def _enter(self, number: int, layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """In front of a layer: a stage, if there is one here, then everything for the columns still there."""
        if self.thread != threading.get_ident() or (self.prefill and self.plan is None):
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        kwargs = dict(kwargs)

        if self.prefill:
            hidden = self._prefill(number, layer, hidden, kwargs)
        else:
            columns = self._current(number)
            # Without a mask there is nothing to cut, unless rows have come to be of unequal length.
            if columns is not None and (columns.padded or kwargs.get("attention_mask") is not None):
                length = kwargs["past_key_values"].get_seq_length(number) + hidden.shape[1]
                columns = columns.repeated(len(hidden)).to(hidden.device).longer(length)
                mask = columns.decoding(kwargs.get("attention_mask"), hidden.shape[1], self.implementation)
                kwargs["attention_mask"] = mask

        if args:
            return (hidden, *args[1:]), kwargs
        kwargs["hidden_states"] = hidden
        return args, kwargs

    def _prefill(self, number: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        whole = dict(kwargs)
        if number == 0 and self.needs & EMBEDDED:
            self.embedded = hidden.detach()
        if number in self.stages:
            hidden = self._stage(number, layer, hidden, whole)
        columns = self._current(number)
        self._watch(number, hidden)
        if columns is not None:
            columns = columns.to(hidden.device)
            self._narrow(number, kwargs, whole, columns)
        if kwargs.get("past_key_values") is not None:  # also where nothing leaves: it is then known to be whole
            self.memory.caches[kwargs["past_key_values"]] = self.columns

        # What the next stage asks of this layer is rotated as this layer rotates it.
        if number + 1 in self.stages:
            cos, sin = kwargs["position_embeddings"]
            self.heard |= {"cos": cos, "sin": sin}
        return hidden

    def _watch(self, number: int, hidden: Tensor) -> None:
        """Notes the visual tokens of a layer, where the plan asks for them."""
        plan, kept, columns = self.plan, self.kept, self._current(number)
        if plan is None or kept is None or plan.watch != number:
            return
        place = None if columns is None else columns.place
        plan.seen = []
        for own, row, column in zip(kept, plan.row, plan.column, strict=True):
            rows, at = row[own], column[own]
            at = at if place is None else place[rows.to(place.device), at.to(place.device)]
            plan.seen.append(hidden[rows.to(hidden.device), at.to(hidden.device)].detach())

    def _narrow(self, number: int, kwargs: dict[str, Any], whole: dict[str, Any], columns: Columns) -> None:
        """Arguments of a layer that have the prompt's length, for the columns still there."""
        mask = whole.get("attention_mask")
        if mask is not None and not isinstance(mask, Tensor):
            raise ValueError(f"attn_implementation must not be flex attention here, got a {type(mask).__name__}")

        def once(given: Any, cut: Callable[[], Any]) -> Any:
            # Layers are handed the same objects: each is cut once per stage. Kept beside the result, so that no other
            # object gets its identity meanwhile.
            key = (max(layer for layer in self.columns if layer <= number), id(given), columns.index.device)
            if key not in self.cut:
                self.cut[key] = given, cut()
            return self.cut[key][1]

        angles = whole["position_embeddings"]
        kwargs["position_embeddings"] = once(angles, lambda: tuple(columns.take(part, -2) for part in angles))
        kwargs["attention_mask"] = once(mask, lambda: columns.queries_and_keys(mask, self.implementation))
        if whole.get("position_ids") is not None:
            # FlashAttention reads gaps in position ids as packed sequences; the rotation is in the embeddings already.
            flash = "flash" in self.implementation
            kwargs["position_ids"] = None if flash else columns.take(whole["position_ids"], -1)

    def _current(self, number: int) -> Columns | None:
        """The columns that this layer sees; None for all."""
        passed = [layer for layer in self.columns if layer <= number]
        return self.columns[max(passed)] if passed else None

    def _stage(self, number: int, layer: Any, hidden: Tensor, whole: dict[str, Any]) -> Tensor:
        """Lets the stage's selector choose, and cuts the hidden states."""
        plan, kept = self.plan, self.kept
        assert plan is not None
        assert kept is not None
        stage, counts = plan.stages[self.stages[number]], plan.counts[self.stages[number]]
        if all(count >= own for count, own in zip(counts, kept.sum(1).tolist(), strict=True)):
            return hidden  # nothing leaves here

        synchronize(hidden.device)
        start = time.perf_counter()
        with torch.no_grad(), plan.around():
            passed = Passed(self.heard, whole["position_embeddings"], self.embedded, self.decoder.norm)
            layers = (self.decoder.layers[number - 1], layer)
            view = LayerView(plan, layers, hidden, self._current(number - 1), kept, passed)
            chosen, order = self._choose(stage, counts, view)
        keep = torch.zeros_like(kept).scatter(1, order, chosen.keep)
        if chosen.flow is not None:
            hidden = view.merged(hidden, chosen)

        # What stays of the prompt: everything but the visual tokens that are gone by now.
        staying = plan.prompt.clone()
        gone = (plan.tokens.slots != PAD) & ~keep
        staying[plan.row[gone].to(staying.device), plan.column[gone].to(staying.device)] = False
        staying = staying.repeat_interleave(len(hidden) // len(staying), 0).to(hidden.device)
        columns = Columns.of(staying, plan.right, view.all_columns.width)

        # From the columns before this stage to those behind it; padding takes any.
        source = view.all_columns.place.gather(1, columns.index).clamp(min=0)
        hidden = hidden.gather(1, source[..., None].expand(-1, -1, hidden.shape[-1]))
        self.columns[number], self.kept, plan.last = columns, keep, keep
        for own, count in zip(plan.layers, keep.sum(1).tolist(), strict=True):
            own[number:] = [count] * (self.depth - number)

        synchronize(hidden.device)
        plan.seconds += time.perf_counter() - start
        return hidden

    def _choose(self, stage: Stage, counts: list[int], view: LayerView) -> tuple[Selection, Int[Tensor, "I L2"]]:
        """What stays of the tokens still there, and which slot of the prompt each of theirs is."""
        order = view.order
        if not any(counts):
            keep = torch.zeros(order.shape, dtype=torch.bool, device=order.device)
            return Selection(keep), order
        assert self.plan is not None
        selector = stage.selector
        fields = {name: READERS[name](view) for name in selector.needs & INSIDE}
        tokens = replace(view.tokens, **fields)
        return selector.select(tokens, Counts.of(self.plan.budget, counts)), order

    def _leave(self, _: Any, __: Any, output: Any) -> Any:
        """Behind the last layer of a prompt: full length again."""
        if self.thread != threading.get_ident() or not self.prefill:
            return None

        # What only stages read is not held through decoding.
        self.heard, self.cut, self.embedded = {}, {}, None
        hidden = output[0] if isinstance(output, tuple) else output
        if self.plan is not None and self.plan.watch == self.depth:
            self._watch(self.depth, self.decoder.norm(hidden))
        if not self.columns:
            return None
        hidden = self.columns[max(self.columns)].to(hidden.device).back(hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _refuse_model(model: Any) -> None:
    """Raises ValueError on a compiled model: its graphs would not see the hooks."""
    compiled = [m for m in (model, *model.modules()) if getattr(m, "_compiled_call_impl", None) is not None]
    if compiled or any(type(m).__name__ == "OptimizedModule" for m in (model, *model.modules())):
        raise ValueError(
            "model must not be compiled: tokens leave inside the language model by hooks; use the plain model"
        )


def _refuse_cache(cache: Any) -> None:
    """Raises ValueError on a cache whose layers cannot differ in length."""
    kinds = {type(layer).__name__ for layer in getattr(cache, "layers", ())}
    if cache is not None and (not hasattr(cache, "layers") or kinds - {"DynamicLayer", "DynamicSlidingWindowLayer"}):
        name = type(cache).__name__
        raise ValueError(
            f"past_key_values must be a DynamicCache where tokens leave inside the language model, got a {name} "
            f"{sorted(kinds)}, whose layers have one length: leave cache_implementation out"
        )


def _refuse_window(config: Any, length: int) -> None:
    """Raises ValueError once a sequence is as long as a sliding window, and for chunked attention."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layer_types must be full or sliding attention, got {sorted(kinds)}")
    window = getattr(config, "sliding_window", None)
    sliding = "sliding_attention" in kinds if kinds else window is not None
    if sliding and window is not None and length >= window:
        raise ValueError(
            f"sliding_window={window} is reached by a sequence of {length} tokens: windows count columns, and do not "
            "fit once tokens have left inside the language model; prune before it, or use shorter prompts"
        )
