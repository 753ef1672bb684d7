"""Attention and keys of a vision tower, read off the queries and keys of its layers while it runs.

Nothing is computed a second time but one softmax per field, and any attention implementation will do: SDPA and
FlashAttention return no attention, but every tower has the projections that it is made of.

Shapes: T tiles, S tokens of a tile in the tower (patches, and CLS where there is one), C channels of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from selector.tokens import VisualTokens

HEARD = frozenset({"cls_attention", "received_attention", "keys"})
"""Read off an attention layer of the vision tower: of the feature layer under these names, of layer L as ``NAME@L``."""


def attention_of(prefix: int) -> frozenset[str]:
    """What a tower gives of `HEARD`: without a CLS token (no `prefix`), no attention from it."""
    return HEARD if prefix else HEARD - {"cls_attention"}


def quantity(need: str) -> str:
    """Which of `HEARD` a name with a layer asks for: ``"joint_keys@-1"`` is keys; any other name is itself."""
    name, at, layer = need.partition("@")
    return name.removeprefix("joint_") if at and layer.removeprefix("-").isdecimal() else need


@contextmanager
def overheard(tower: Any, layer: int, prefix: int, needs: frozenset[str]) -> Iterator[dict[str, Tensor]]:
    """Reads attention ``[T, patches]`` and keys ``[T, patches, k]`` off a tower that runs within the block.

    Args:
        tower: the vision tower.
        layer: the feature layer, which fields without ``@`` are of.
        prefix: tokens before the patches, which the fields leave out.
        needs: fields that the selectors read; others than `HEARD` are ignored.

    Yields:
        The values by field name: empty while the tower runs, filled when the block has ended.

    Raises:
        ValueError: the tower has no such attention, or normalises its queries and keys behind the projections.
    """
    wanted = sorted(need for need in needs if quantity(need) in HEARD)
    fields: dict[str, Tensor] = {}

    # The hooks see what the projections return; a norm behind them would make other queries and keys of it. Some
    # towers keep an identity in its place, which changes nothing.
    norms = [getattr(part, "q_norm", None) for part in tower.modules()]
    if wanted and any(isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity) for norm in norms):
        raise ValueError(f"{' and '.join(wanted)}: this vision tower normalises its queries and keys")

    # Before the first hook: a layer that is not there is an error that leaves nothing behind.
    attentions = {name: _attention_of(tower, layer, name) for name in wanted}
    projected = {name: _Projected(attention.scale) for name, attention in attentions.items()}
    handles = [
        getattr(attention, part).register_forward_hook(
            functools.partial(projected[name].listen, part, attention.num_heads)
        )
        for name, attention in attentions.items()
        for part in ("q_proj", "k_proj")
    ]
    try:
        yield fields
    finally:
        for handle in handles:
            handle.remove()

    # Only after the block: the caller holds the same mapping.
    fields |= {name: _read(name, own, prefix) for name, own in projected.items()}


def with_fields(tokens: VisualTokens, fields: Mapping[str, Tensor]) -> VisualTokens:
    """Adds what was overheard: the feature layer's to the fields of that name, that of named layers to `layers`."""
    plain = {name: values for name, values in fields.items() if name in HEARD}
    layers = {name: values for name, values in fields.items() if name not in HEARD}
    return replace(tokens, **plain, layers=layers)


class _Projected:
    """Queries and keys ``[T, heads, S, C]`` of one attention layer, once the tower has run.

    Args:
        scale: factor on their products.
    """

    def __init__(self, scale: float):
        self.scale = scale
        self.parts: dict[str, Tensor] = {}

    def listen(self, part: str, heads: int, module: nn.Module, inputs: Any, output: Tensor) -> None:
        """A forward hook of a projection: `part` is ``"q_proj"`` (to queries) or ``"k_proj"`` (to keys)."""
        self.parts[part] = output.unflatten(-1, (heads, -1)).transpose(1, 2)


def _attention_of(tower: Any, layer: int, name: str) -> Any:
    """The attention module that a name speaks of: that of its own layer, or the one that made the feature layer."""
    attentions = [m for m in tower.modules() if hasattr(m, "q_proj") and hasattr(m, "k_proj")]
    if not attentions:  # queries and keys in one projection, for instance
        raise ValueError(f"{name}: no attention with q_proj and k_proj in the vision tower {type(tower).__name__}")

    if "@" in name:
        index = int(name.partition("@")[2])
    elif layer == 0:
        raise ValueError(f"{name}: vision_feature_layer 0 is the embedding, which no attention produced")
    else:
        # hidden_states has one more entry than there are attentions: the embeddings come first.
        index = layer if layer < 0 else layer - 1

    if not -len(attentions) <= index < len(attentions):
        raise ValueError(f"{name}: the vision tower has attention layers 0 to {len(attentions) - 1}, got {index}")
    return attentions[index]


def _read(need: str, projected: _Projected, prefix: int) -> Tensor:
    """What a need asks of the queries and keys of its layer, for the patches behind `prefix` other tokens."""
    # Joint: all heads side by side as a single one, whose scale is by the common width.
    queries, keys, scale = projected.parts["q_proj"], projected.parts["k_proj"], projected.scale
    if need.startswith("joint_"):
        queries, keys = (part.transpose(1, 2).flatten(2)[:, None] for part in (queries, keys))
        scale = keys.shape[-1] ** -0.5

    kind = quantity(need)
    if kind == "keys":
        return keys.mean(1)[:, prefix:]
    if kind == "cls_attention":
        return _attention(queries[:, :, :1], keys, scale).mean((1, 2))[:, prefix:]

    # A tile at a time: all of them would be heads · S² numbers each.
    return torch.stack([_attention(q, k, scale).mean((0, 1))[prefix:] for q, k in zip(queries, keys, strict=True)])


def _attention(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Softmax over all keys, CLS's own included, in float32."""
    return (queries.float() @ keys.float().mT * scale).softmax(-1)
