"""Inside the language model: visual tokens leave between its layers, by hooks on the modules of one instance.

The only file that sets hooks on a language model. `acting` sets them for the time of one call and takes them away
however it ends; no class is patched, and nothing of the call's outcome changes shape: prefill really shortens from the
stage's layer on, so do the caches of these layers, and hidden states are brought back to full length behind the last
layer, so that logits, labels and loss fit the prompt.

How a stage at layer K goes (`selector.base.Stage`): in front of layer K the plug fills the fields of `VisualTokens`
that the stage's selector names in `needs` (those of `READERS`; all others are those of the vision tower), cuts the
table down to the tokens still there, and calls `TokenSelector.select` with the number that each image may keep. The
columns of the others are cut out of hidden states, position embeddings and masks, for this layer and all that follow;
position ids stay those of the prompt that enters the language model.
Attention is never asked of the model: queries and keys are overheard at ``q_proj`` and ``k_proj``, and a softmax is
taken for the rows that a selector asks for, so that eager attention, SDPA and FlashAttention serve alike.

**A new method inside** is a file in ``selector/methods`` like any other: a selector with ``acts = "inside"``, its
``needs``, and `stages`, whose layers are `scaled_layer` of the published ones (`selector.methods.fastv` is the
shortest). A new quantity is a function in `READERS`, a field of `VisualTokens` and its name in
`selector.tokens.INSIDE`; `_View` has what such functions are made of. Selectors that merge (`Selection.flow`) do so on
the hidden states.

Within a block, caches that were filled under it can be continued, by ``generate`` and by hand. Refused by name: caches
that have one length for all layers (StaticCache), compiled models, flex attention, a second prompt with images on a
filled cache, sliding windows once a sequence is as long as the window, and stages below a layer to which the model adds
further visual features (deepstack, Qwen3-VL).

Shapes: I images, L packed slots, B rows of the prompt, S columns of it, R columns still there, T tiles, N patches.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selector.base import Stage
from selector.budget import Budget
from selector.columns import Columns
from selector.merging import Selection
from selector.stages import Counts, per_layer
from selector.tokens import INSIDE, PAD, VisualTokens


@dataclass
class Plan:
    """What is to leave a prompt inside the language model, and, once the model has run, what has left.

    Attributes:
        stages: those inside, by rising layer.
        counts: per stage, the visual tokens that each image keeps.
        budget: whose scope and newline policy the stages are under.
        tokens: the visual tokens that reach the language model: slots of others are `PAD`.
        row, column: ``[I, L]`` where each slot's token stands in the prompt; 0 where there is none.
        prompt: ``[B, S]`` real columns of the prompt.
        asker: ``[B]`` column of the last token of each row's prompt, in front of any labelled token.
        right: whether rows are padded on the right.
        kept: ``[I, L]`` slots that reach the language model.
        last: the same behind the last stage; None until the model has run.
        layers: per image, the visual tokens in each decoder layer; as planned, and as it was after a run.
        seconds: wall time of selection and merging at the stages.
    """

    stages: list[Stage]
    counts: list[list[int]]
    budget: Budget
    tokens: VisualTokens
    row: Int[Tensor, "I L"]
    column: Int[Tensor, "I L"]
    prompt: Bool[Tensor, "B S"]
    asker: Int[Tensor, "B"]
    right: bool
    kept: Bool[Tensor, "I L"]
    layers: list[list[int]] = field(default_factory=list)
    last: Bool[Tensor, "I L"] | None = None
    seconds: float = 0.0

    @classmethod
    def of(
        cls,
        stages: list[Stage],
        counts: list[list[int]],
        budget: Budget,
        tokens: VisualTokens,
        keep: Bool[Tensor, "I L"],
        inputs: dict[str, Any],
        image_token_id: int,
        depth: int,
    ) -> Plan:
        """The plan of a prompt.

        Args:
            stages, counts: those inside the language model.
            budget: see the class.
            tokens: what the vision tower gave.
            keep: what of it reaches the language model.
            inputs: of the prompt as the language model gets it, placeholders of dropped tokens cut.
            image_token_id: placeholder of a visual token.
            depth: decoder layers of the language model.
        """
        ids = inputs["input_ids"]
        prompt = inputs["attention_mask"].bool() if inputs.get("attention_mask") is not None else torch.ones_like(ids)
        prompt = prompt.bool()

        # Placeholders stand in the order of the packed tokens, row by row.
        where = (ids == image_token_id).nonzero().to(keep.device)
        row, column = (torch.zeros_like(tokens.slots) for _ in range(2))
        row[keep], column[keep] = where.unbind(1)

        # The question ends where the answer that is to be learned begins.
        asks, labels = prompt, inputs.get("labels")
        if labels is not None:
            asks = prompt & (labels.to(prompt.device) == -100)
        asker = (asks * torch.arange(1, ids.shape[1] + 1, device=ids.device)).amax(1) - 1

        slots = tokens.slots.masked_fill(~keep, PAD)
        lengths = keep.sum(1).tolist()
        layers = [per_layer(n, own, depth, stages) for n, own in zip(lengths, zip(*counts, strict=True), strict=True)]
        right = bool((~prompt[:, -1]).any())
        return cls(
            stages, counts, budget, replace(tokens, slots=slots), row, column, prompt, asker, right, keep, layers
        )


@dataclass
class Memory:
    """Which columns the layers of a cache hold: kept as long as the cache, by the block under which it was filled."""

    caches: weakref.WeakKeyDictionary[Any, dict[int, Columns]] = field(default_factory=weakref.WeakKeyDictionary)
    threads: set[int] = field(default_factory=set)

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
        if number == 0 and "rater_attention" in self.needs:
            self.embedded = hidden.detach()
        if number in self.stages:
            hidden = self._stage(number, layer, hidden, whole)
        columns = self._current(number)
        if columns is not None:
            columns = columns.to(hidden.device)
            self._narrow(kwargs, whole, columns)
        if kwargs.get("past_key_values") is not None:  # also where nothing leaves: it is then known to be whole
            self.memory.caches[kwargs["past_key_values"]] = self.columns

        # What the next stage asks of this layer is rotated as this layer rotates it.
        if number + 1 in self.stages:
            cos, sin = kwargs["position_embeddings"]
            self.heard |= {"cos": cos, "sin": sin}
        return hidden

    def _narrow(self, kwargs: dict[str, Any], whole: dict[str, Any], columns: Columns) -> None:
        """Arguments of a layer that have the prompt's length, for the columns still there."""
        mask = whole.get("attention_mask")
        if mask is not None and not isinstance(mask, Tensor):
            raise ValueError(f"attn_implementation must not be flex attention here, got a {type(mask).__name__}")

        # Layers are handed the same objects, which live as long as the pass: each is cut once per stage.
        given, width = whole["position_embeddings"], columns.index.shape[1]
        device = columns.index.device
        angles, masks = (width, id(given), device, "angles"), (width, id(mask), device)
        if angles not in self.cut:
            self.cut[angles] = tuple(columns.take(part, -2) for part in given)
        if masks not in self.cut:
            self.cut[masks] = columns.queries_and_keys(mask, self.implementation)
        kwargs["position_embeddings"], kwargs["attention_mask"] = self.cut[angles], self.cut[masks]
        if whole.get("position_ids") is not None:
            # FlashAttention reads gaps in position ids as packed sequences; the rotation is in the embeddings already.
            ids = whole["position_ids"]
            flash = "flash" in self.implementation
            kwargs["position_ids"] = None if flash else columns.take(ids, -1)

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

        _synchronize(hidden.device)
        start = time.perf_counter()
        with torch.no_grad():
            view = _View(self, number, layer, hidden, whole, kept)
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

        _synchronize(hidden.device)
        plan.seconds += time.perf_counter() - start
        return hidden

    def _choose(self, stage: Stage, counts: list[int], view: _View) -> tuple[Selection, Int[Tensor, "I L2"]]:
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
        if self.thread != threading.get_ident() or not self.prefill or not self.columns:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = self.columns[max(self.columns)].to(hidden.device).back(hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


class _View:
    """What a stage can be asked: hidden states, attention and keys of the columns still there.

    Attributes:
        tokens: the table, cut down to the visual tokens still there.
        order: ``[I, L2]`` which slot of the prompt each slot of that table is.
        hidden: ``[B, R, d]`` states that enter the layer of the stage.
        columns: of these states; `all_columns` with the rows that beams repeat.
    """

    def __init__(
        self,
        run: _Run,
        number: int,
        layer: Any,
        hidden: Float[Tensor, "B R d"],
        whole: dict[str, Any],
        kept: Bool[Tensor, "I L"],
    ):
        plan = run.plan
        assert plan is not None
        self.run, self.plan, self.layer, self.whole = run, plan, layer, whole
        self.before = run.decoder.layers[number - 1]
        self.times = len(hidden) // len(plan.prompt)  # beams repeat every row: one of each is enough
        self.hidden = hidden[:: self.times]

        current = run._current(number - 1)
        if current is None:
            every = torch.ones(len(hidden), plan.prompt.shape[1], dtype=torch.bool, device=hidden.device)
            current = Columns.of(every, plan.right, hidden.shape[1])
        self.all_columns = current.to(hidden.device)
        self.columns = self.all_columns.every(self.times)

        # As if the tokens that are gone had never been: packed to the left.
        width = int(kept.sum(1).max())
        self.order = (~kept).int().argsort(dim=1, stable=True)[:, :width]
        slots = torch.where(kept, plan.tokens.slots, PAD).gather(1, self.order)
        self.tokens = replace(plan.tokens, slots=slots)
        self.row, self.column = (part.gather(1, self.order) for part in (plan.row, plan.column))
        self.heads: dict[bool, tuple[Tensor, Tensor, Any]] = {}

    @property
    def position(self) -> Int[Tensor, "I L2"]:
        """Where the token of each slot stands among the columns still there."""
        place = self.columns.place
        return place[self.row.to(place.device), self.column.to(place.device)].clamp(min=0)

    def at_tokens(self, values: Tensor) -> Tensor:
        """``[B, R]`` or ``[B, R, C]`` of columns to ``[T, N]`` or ``[T, N, C]`` of encoder tokens, zero elsewhere."""
        return self.unpacked(values[self.row.to(values.device), self.position])

    def unpacked(self, packed: Tensor) -> Tensor:
        """``[I, L2]`` or ``[I, L2, C]`` of slots to ``[T, N]`` or ``[T, N, C]`` of encoder tokens, zero elsewhere."""
        tokens = self.tokens
        packed = packed.to(tokens.features.device)
        table = packed.new_zeros(tokens.features.shape[0] * tokens.features.shape[1], *packed.shape[2:])
        table[tokens.slots[tokens.is_patch]] = packed[tokens.is_patch]
        return table.view(*tokens.features.shape[:2], *packed.shape[2:])

    def merged(self, hidden: Tensor, chosen: Selection) -> Tensor:
        """Hidden states with merged tokens in their targets' places."""
        assert chosen.flow is not None
        row, position, real = self.row.to(hidden.device), self.position, (self.tokens.slots != PAD).to(hidden.device)
        hidden = hidden.clone()
        for beam in range(self.times):
            own = hidden[beam :: self.times]
            packed = [own[r[m], p[m]] for r, p, m in zip(row, position, real, strict=True)]
            hidden[row[real] * self.times + beam, position[real]] = torch.cat(chosen.flow.apply(packed))
        return hidden

    def queries_and_keys(self, own: bool) -> tuple[Tensor, Tensor, Any]:
        """Rotated queries ``[B, H, R, c]``, rotated keys ``[B, H', R, c]`` and the attention module.

        Args:
            own: of the layer of this stage, by its weights on what enters it; else of the layer before.
        """
        if own not in self.heads:
            self.heads[own] = self._queries_and_keys(own)
        return self.heads[own]

    def _queries_and_keys(self, own: bool) -> tuple[Tensor, Tensor, Any]:
        if own:
            attention, embeddings = self.layer.self_attn, self.whole["position_embeddings"]
            entering = self.layer.input_layernorm(self.hidden)
            queries, keys = attention.q_proj(entering), attention.k_proj(entering)
            cos, sin = (self.columns.take(part[:: self.times], -2) for part in embeddings)
        else:
            attention, heard = self.before.self_attn, self.run.heard
            queries, keys, cos, sin = (heard[part][:: self.times] for part in ("q_proj", "k_proj", "cos", "sin"))
        if cos.ndim != 3:
            raise ValueError("position embeddings of several axes need a newer transformers")

        queries, keys = (part.unflatten(-1, (-1, attention.head_dim)) for part in (queries, keys))
        if getattr(attention, "q_norm", None) is not None:
            queries, keys = attention.q_norm(queries), attention.k_norm(keys)
        cos, sin = cos[:, None].to(queries.device), sin[:, None].to(queries.device)
        return rotated(queries.transpose(1, 2), cos, sin), rotated(keys.transpose(1, 2), cos, sin), attention

    def attention(self, row: Int[Tensor, "n"], column: Int[Tensor, "n Q"], own: bool = False) -> Float[Tensor, "n Q R"]:
        """What some tokens pay all columns still there: mean over heads of the softmax over what each of them sees.

        Args:
            row: of the prompt, in which the paying tokens stand.
            column: of the prompt (not of what is left of it).
            own: see `queries_and_keys`.
        """
        queries, keys, attention = self.queries_and_keys(own)
        row, column = row.to(keys.device), column.to(keys.device)
        queries, keys, index = queries[row], keys[row], self.columns.index[row]
        place = self.columns.place[row].gather(1, column)
        queries = queries.gather(2, place[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3]))

        # Grouped queries share keys. In float32 at least, as the model's own softmax.
        keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)
        precision = torch.promote_types(keys.dtype, torch.float32)
        scores = queries.to(precision) @ keys.to(precision).mT * attention.scaling
        cap = getattr(attention, "attn_logit_softcapping", None)
        if cap is not None:
            scores = torch.tanh(scores / cap) * cap

        # Neither padding nor what follows: the prompt, up to the paying token.
        prompt = self.plan.prompt.to(keys.device)
        prompt = torch.nn.functional.pad(prompt, (0, self.columns.width - prompt.shape[1]))[row]
        seen = (self.columns.real[row] & prompt.gather(1, index))[:, None] & (index[:, None] <= column[..., None])
        return scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1).mean(1)

    def text_attention(self, own: bool) -> Float[Tensor, "T N"]:
        """Of the last token of each row's prompt."""
        rows = torch.arange(len(self.plan.prompt))
        return self.at_tokens(self.attention(rows, self.plan.asker[:, None], own)[:, 0])

    def words(self, reader: str) -> list[tuple[int, Int[Tensor, "_"]]]:
        """Per image its row, and the columns of the text behind it: prompt tokens that are neither visual nor labelled.

        Args:
            reader: what is to be read of them, for the error.

        Raises:
            ValueError: an image has no text behind it.
        """
        plan = self.plan
        present = plan.tokens.slots != PAD
        text = plan.prompt.clone()
        text[plan.row[present].to(text.device), plan.column[present].to(text.device)] = False
        column = torch.arange(text.shape[1], device=text.device)
        text &= column <= plan.asker[:, None]

        found = []
        for row, own, there in zip(plan.row, plan.column, present, strict=True):
            number, last = int(row[there][0]), int(own[there].max())
            behind = (text[number] & (column > last)).nonzero()[:, 0]
            if not len(behind):
                raise ValueError(f"{reader} needs text behind every image, and an image of this batch has none")
            found.append((number, behind))
        return found

    def rater_attention(self) -> Float[Tensor, "T N"]:
        """Of the text tokens behind an image that its visual tokens are most like (SparseVLM's raters)."""
        embedded = self.run.embedded
        assert embedded is not None
        embedded = embedded[:: self.times].float()
        plan, rows = self.plan, []
        for image, (row, text) in enumerate(self.words("rater_attention")):
            present = plan.tokens.slots[image] != PAD
            visual = embedded[row, plan.column[image][present].to(embedded.device)]
            alike = (visual @ embedded[row, text.to(embedded.device)].mT).softmax(-1).mean(0)

            # Above the mean; where all are equal nothing is, and all of them rate.
            above = (alike > alike.mean()).to(text.device)
            raters = text[above] if bool(above.any()) else text
            paid = self.attention(torch.tensor([row]), raters[None])[0].mean(0)
            rows.append(paid[self.position[image].to(paid.device)])
        return self.unpacked(torch.stack(rows))

    def keys(self) -> Float[Tensor, "B R g"]:
        """Of the layer before this stage, all key heads side by side."""
        return self.queries_and_keys(own=False)[1].transpose(1, 2).flatten(2)

    def normed(self) -> Float[Tensor, "B R h"]:
        """The hidden states under the norm behind the last layer."""
        return self.run.decoder.norm(self.hidden.detach())

    def at_words(self, values: Float[Tensor, "B R C"]) -> Float[Tensor, "I Q C"]:
        """Of columns to the text tokens behind each image, zero behind the last one of them."""
        words = [
            values[row, self.columns.place[row, text.to(values.device)]]
            for row, text in self.words("word_normed or word_keys")
        ]
        return torch.nn.utils.rnn.pad_sequence(words, batch_first=True)


READERS: dict[str, Callable[[_View], Tensor]] = {
    "hidden": lambda view: view.at_tokens(view.hidden.detach()),
    "text_attention": lambda view: view.text_attention(own=False),
    "own_text_attention": lambda view: view.text_attention(own=True),
    "rater_attention": _View.rater_attention,
    "normed": lambda view: view.at_tokens(view.normed()),
    "layer_keys": lambda view: view.at_tokens(view.keys()),
    "word_normed": lambda view: view.at_words(view.normed()),
    "word_keys": lambda view: view.at_words(view.keys()),
}
"""What fills each field of `selector.tokens.INSIDE` at a stage."""

OVERHEARD = frozenset({"text_attention", "rater_attention", "layer_keys", "word_keys"})
"""Those that need queries or keys of the layer before the stage, as they pass by."""


def rotated(heads: Float[Tensor, "B H R c"], cos: Float[Tensor, "#B 1 R r"], sin: Float[Tensor, "#B 1 R r"]) -> Tensor:
    """Rotary position embedding, halves paired, on as many leading channels as the angles have.

    Su et al. 2021 (arXiv 2104.09864), in the layout of Llama.
    """
    turned, rest = heads[..., : cos.shape[-1]], heads[..., cos.shape[-1] :]
    half = turned.shape[-1] // 2
    other = torch.cat([-turned[..., half:], turned[..., :half]], -1)
    return torch.cat([turned * cos + other * sin, rest], -1)


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


def _synchronize(device: torch.device) -> None:
    """Waits for a GPU to finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
