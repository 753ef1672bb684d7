"""What a stage inside the language model can be asked: hidden states, attention and keys of the tokens still there.

Attention is computed for the rows that are asked for, from queries and keys that passed by or from a layer's own
weights; the model's attention implementation never matters.

Shapes: I images, L2 packed slots still there, B rows of the prompt, S columns of it, R of them still there, T tiles,
N patches, H heads, c channels per head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selector.columns import Columns
from selector.merging import Selection
from selector.plan import Plan
from selector.tokens import PAD


@dataclass
class Passed:
    """What passed by on the way to a stage.

    Attributes:
        heard: of the layer before, the outputs of ``q_proj`` and ``k_proj`` ``[B, R, ...]`` and the ``cos`` and ``sin``
            with which it rotates them.
        angles: cos and sin ``[B or 1, S, c]`` of the whole prompt, as the layer of the stage is handed them.
        embedded: ``[B, S, d]`` what entered the first layer, where a selector asks for it.
        norm: the norm behind the last layer.

    Example:
        >>> angles = torch.arange(3.0)[None, :, None]  # three positions, one frequency
        >>> passed = Passed({}, (angles.cos(), angles.sin()))
        >>> passed.embedded is None
        True
    """

    heard: dict[str, Tensor]
    angles: tuple[Tensor, Tensor]
    embedded: Tensor | None = None
    norm: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Heads:
    """Queries and keys of a layer by heads.

    Attributes:
        queries: ``[B, H, R, c]`` before their rotation.
        keys: ``[B, H', R, c]`` the same; H is a multiple of H'.
        cos, sin: ``[B or 1, 1, R, r]`` of their rotation.
        attention: the module.

    Example:
        >>> from types import SimpleNamespace
        >>> one, angle = torch.ones(1, 2, 3, 4), torch.zeros(1, 1, 3, 4)
        >>> heads = Heads(one, one[:, :1], angle.cos(), angle.sin(), SimpleNamespace(scaling=0.5))
        >>> heads.scores(*heads.rotated).shape, float(heads.scores(*heads.rotated).max())
        (torch.Size([1, 2, 3, 3]), 2.0)
    """

    queries: Float[Tensor, "B H R c"]
    keys: Float[Tensor, "B G R c"]
    cos: Tensor
    sin: Tensor
    attention: Any

    @cached_property
    def rotated(self) -> tuple[Tensor, Tensor]:
        """Queries and keys as they meet in the layer."""
        return rotated(self.queries, self.cos, self.sin), rotated(self.keys, self.cos, self.sin)

    def scores(self, queries: Float[Tensor, "n H Q c"], keys: Float[Tensor, "n G R c"]) -> Float[Tensor, "n H Q R"]:
        """What the layer takes the softmax of, in float32 at least, as the model's own."""
        # Grouped queries share keys.
        keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)
        precision = torch.promote_types(keys.dtype, torch.float32)
        scores = queries.to(precision) @ keys.to(precision).mT * self.attention.scaling
        cap = getattr(self.attention, "attn_logit_softcapping", None)
        return scores if cap is None else torch.tanh(scores / cap) * cap


class LayerView:
    """What a stage can be asked: hidden states, attention and keys of the columns still there.

    Attributes:
        tokens: the table, cut down to the visual tokens still there.
        order: ``[I, L2]`` which slot of the prompt each slot of that table is.
        hidden: ``[B, R, d]`` states that enter the layer of the stage.
        columns: of these states; `all_columns` with the rows that beams repeat.

    Example:
        >>> from selector import FastV
        >>> FastV().needs <= READERS.keys()  # what a selector may name in `needs`: each is a function of a view
        True
    """

    def __init__(
        self,
        plan: Plan,
        layers: tuple[Any, Any],
        hidden: Float[Tensor, "B R d"],
        columns: Columns | None,
        kept: Bool[Tensor, "I L"],
        passed: Passed,
    ):
        self.plan, (self.before, self.layer), self.passed = plan, layers, passed
        self.times = len(hidden) // len(plan.prompt)  # beams repeat every row: one of each is enough
        self.hidden = hidden[:: self.times]

        if columns is None:
            every = torch.ones(len(hidden), plan.prompt.shape[1], dtype=torch.bool, device=hidden.device)
            columns = Columns.of(every, plan.right, hidden.shape[1])
        self.all_columns = columns.to(hidden.device)
        self.columns = self.all_columns.every(self.times)

        # As if the tokens that are gone had never been: packed to the left.
        width = int(kept.sum(1).max())
        self.order = (~kept).int().argsort(dim=1, stable=True)[:, :width]
        slots = torch.where(kept, plan.tokens.slots, PAD).gather(1, self.order)
        self.tokens = replace(plan.tokens, slots=slots)
        self.row, self.column = (part.gather(1, self.order) for part in (plan.row, plan.column))
        self.heads: dict[bool, Heads] = {}

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

    def projected(self, own: bool) -> Heads:
        """Queries and keys by heads, before their rotation.

        Args:
            own: of the layer of this stage, by its weights on what enters it; else of the layer before.
        """
        if own not in self.heads:
            self.heads[own] = self._projected(own)
        return self.heads[own]

    def _projected(self, own: bool) -> Heads:
        if own:
            attention, embeddings = self.layer.self_attn, self.passed.angles
            entering = self.layer.input_layernorm(self.hidden)
            queries, keys = attention.q_proj(entering), attention.k_proj(entering)
            cos, sin = (self.columns.take(part[:: self.times], -2) for part in embeddings)
        else:
            attention, heard = self.before.self_attn, self.passed.heard
            queries, keys, cos, sin = (heard[part][:: self.times] for part in ("q_proj", "k_proj", "cos", "sin"))
        if cos.ndim != 3:
            raise ValueError("position embeddings of several axes need a newer transformers")

        queries, keys = (part.unflatten(-1, (-1, attention.head_dim)) for part in (queries, keys))
        if getattr(attention, "q_norm", None) is not None:
            queries, keys = attention.q_norm(queries), attention.k_norm(keys)
        cos, sin = cos[:, None].to(queries.device), sin[:, None].to(queries.device)
        return Heads(queries.transpose(1, 2), keys.transpose(1, 2), cos, sin, attention)

    def seen(self, row: Int[Tensor, "n"], column: Int[Tensor, "n Q"]) -> Bool[Tensor, "n Q R"]:
        """The columns still there that a token may look at: no padding, and nothing behind it.

        Args:
            row, column: of the prompt.
        """
        index = self.columns.index[row]
        prompt = self.plan.prompt.to(index.device)
        prompt = torch.nn.functional.pad(prompt, (0, self.columns.width - prompt.shape[1]))[row]
        return (self.columns.real[row] & prompt.gather(1, index))[:, None] & (index[:, None] <= column[..., None])

    def head_attention(
        self, row: Int[Tensor, "n"], column: Int[Tensor, "n Q"], own: bool = False
    ) -> Float[Tensor, "n H Q R"]:
        """What some tokens pay all columns still there: of each head the softmax over what each of them sees.

        Args:
            row: of the prompt, in which the paying tokens stand.
            column: of the prompt (not of what is left of it).
            own: see `projected`.
        """
        heads = self.projected(own)
        row, column = row.to(heads.keys.device), column.to(heads.keys.device)
        queries, keys = heads.rotated
        place = self.columns.place[row].gather(1, column)
        queries = queries[row].gather(2, place[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3]))

        scores = heads.scores(queries, keys[row])
        return scores.masked_fill(~self.seen(row, column)[:, None], -torch.inf).softmax(-1)

    def attention(self, row: Int[Tensor, "n"], column: Int[Tensor, "n Q"], own: bool = False) -> Float[Tensor, "n Q R"]:
        """The mean of `head_attention` over heads."""
        return self.head_attention(row, column, own).mean(1)

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

    def raters(self, reader: str) -> list[tuple[int, Int[Tensor, "_"]]]:
        """Per image its row, and the columns of the text behind it that its visual tokens are most like, as embedded.

        Args:
            reader: see `words`.
        """
        embedded = self.passed.embedded
        assert embedded is not None
        embedded = embedded[:: self.times].float()
        plan, raters = self.plan, []
        for image, (row, text) in enumerate(self.words(reader)):
            present = plan.tokens.slots[image] != PAD
            visual = embedded[row, plan.column[image][present].to(embedded.device)]
            alike = (visual @ embedded[row, text.to(embedded.device)].mT).softmax(-1).mean(0)

            # Above the mean; where all are equal nothing is, and all of them rate.
            above = (alike > alike.mean()).to(text.device)
            raters.append((row, text[above] if bool(above.any()) else text))
        return raters

    def rater_attention(self) -> Float[Tensor, "T N"]:
        """What SparseVLM's raters pay, mean over heads."""
        rows = []
        for image, (row, raters) in enumerate(self.raters("rater_attention")):
            paid = self.attention(torch.tensor([row]), raters[None])[0].mean(0)
            rows.append(paid[self.position[image].to(paid.device)])
        return self.unpacked(torch.stack(rows))

    def rater_attention_plus(self) -> Float[Tensor, "T N"]:
        """What SparseVLM+'s raters pay once the decay with distance is divided out, mean over the heads it picks."""
        rows, heads = [], self.projected(own=False)
        ones = torch.ones_like(heads.queries[:, :1], dtype=torch.float32)
        turned = rotated(ones, heads.cos, heads.sin)[:, 0]
        for image, (row, raters) in enumerate(self.raters("rater_attention_plus")):
            paid = self.head_attention(torch.tensor([row]), raters[None])[0]
            position = self.position[image].to(paid.device)
            paid = paid[..., position]

            # What rotation alone makes of equal queries and keys, which falls with their distance.
            place = self.columns.place[row, raters.to(turned.device)]
            paid = paid / (turned[row, place] @ turned[row, position].mT / heads.attention.head_dim**0.5)

            # Padding of the packed slots repeats some column: it must not count.
            real = (self.tokens.slots[image] != PAD).to(paid.device)
            mass = paid.masked_fill(~real, 0).sum((1, 2))
            most = mass.topk(priority_heads(len(mass))).indices
            rows.append(paid[most].mean((0, 1)))
        return self.unpacked(torch.stack(rows))

    def mean_query_attention(self) -> Float[Tensor, "T N"]:
        """What the mean query of the prompt up to each image's end pays, positions left out (PACT)."""
        heads, plan = self.projected(own=True), self.plan
        device = heads.keys.device
        present = plan.tokens.slots != PAD
        row, last = plan.row.amax(1).to(device), plan.column.masked_fill(~present, 0).amax(1).to(device)

        seen = self.seen(row, last[:, None])[:, 0]
        weight = seen / seen.sum(1, keepdim=True)
        wide = torch.promote_types(heads.queries.dtype, torch.float32)
        query = (heads.queries[row].to(wide) * weight[:, None, :, None]).sum(2, keepdim=True)
        scores = heads.scores(query, heads.keys[row])[:, :, 0]
        paid = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1).mean(1)
        return self.unpacked(paid.gather(1, self.position.to(device)))

    def keys(self, own: bool = False) -> Float[Tensor, "B R g"]:
        """Rotated, all key heads side by side; `own` as in `projected`."""
        return self.projected(own).rotated[1].transpose(1, 2).flatten(2)

    def normed(self) -> Float[Tensor, "B R h"]:
        """The hidden states under the norm behind the last layer."""
        assert self.passed.norm is not None
        return self.passed.norm(self.hidden.detach())

    def at_words(self, values: Float[Tensor, "B R C"]) -> Float[Tensor, "I Q C"]:
        """Of columns to the text tokens behind each image, zero behind the last one of them."""
        words = self.words("word_normed or word_keys")
        taken = [values[row, self.columns.place[row, text.to(values.device)]] for row, text in words]
        return torch.nn.utils.rnn.pad_sequence(taken, batch_first=True)


READERS: dict[str, Callable[[LayerView], Tensor]] = {
    "hidden": lambda view: view.at_tokens(view.hidden.detach()),
    "text_attention": lambda view: view.text_attention(own=False),
    "own_text_attention": lambda view: view.text_attention(own=True),
    "rater_attention": LayerView.rater_attention,
    "rater_attention_plus": LayerView.rater_attention_plus,
    "mean_query_attention": LayerView.mean_query_attention,
    "normed": lambda view: view.at_tokens(view.normed()),
    "layer_keys": lambda view: view.at_tokens(view.keys()),
    "own_keys": lambda view: view.at_tokens(view.keys(own=True)),
    "word_normed": lambda view: view.at_words(view.normed()),
    "word_keys": lambda view: view.at_words(view.keys()),
}
"""What fills each field of `selector.tokens.INSIDE` at a stage."""

OVERHEARD = frozenset({"text_attention", "rater_attention", "rater_attention_plus", "layer_keys", "word_keys"})
"""Those that need queries or keys of the layer before the stage, as they pass by."""

EMBEDDED = frozenset({"rater_attention", "rater_attention_plus"})
"""Those that need what entered the first layer."""


def priority_heads(heads: int) -> int:
    """How many heads SparseVLM+ reads: its 14 of 32, as a share of the model's, halves up, and at least 1.

    >>> priority_heads(32), priority_heads(28), priority_heads(4), priority_heads(1)
    (14, 12, 2, 1)
    """
    return max(1, (2 * 14 * heads + 32) // (2 * 32))


def rotated(heads: Float[Tensor, "B H R c"], cos: Float[Tensor, "#B 1 R r"], sin: Float[Tensor, "#B 1 R r"]) -> Tensor:
    """Rotary position embedding, halves paired, on as many leading channels as the angles have.

    Su et al. 2021 (arXiv 2104.09864), in the layout of Llama.
    """
    turned, rest = heads[..., : cos.shape[-1]], heads[..., cos.shape[-1] :]
    half = turned.shape[-1] // 2
    other = torch.cat([-turned[..., half:], turned[..., :half]], -1)
    return torch.cat([turned * cos + other * sin, rest], -1)
