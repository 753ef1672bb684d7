"""LLaVA-NeXT: AnyRes tiles, unpadding and newline tokens.

The geometry is not re-implemented: an index map sent through the model's own ``pack_image_features`` tells which slot
of the packed sequence each encoder token lands in. Packed order of one image: the base view (h·w tokens, no newline),
then the tiles laid out as one grid, unpadded, row by row with a newline token at the end of each row; an image of one
tile gets a single newline at its end.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from selector.models import Adapter, Encoded, Relevance
from selector.tokens import NEWLINE, PAD, VisualTokens

HEARD = frozenset({"cls_attention", "received_attention", "keys"})
"""Read off an attention layer of the vision tower: of the feature layer under these names, of layer L as ``NAME@L``."""
GIVES = frozenset({"features", "projected", "text", "question"}) | HEARD
"""Fields of `VisualTokens` that this model gives, beside those of named layers."""


def encode(model: Any, inputs: Mapping[str, Any], needs: frozenset[str], relevance: Relevance | None = None) -> Encoded:
    """See `selector.models.encode`."""
    _check_needs(needs, relevance)
    base, config = model.base_model, model.config
    layer = _setting(inputs, config, "vision_feature_layer")
    strategy = _setting(inputs, config, "vision_feature_select_strategy")
    if not isinstance(layer, int):  # several layers: no single attention produced them
        raise ValueError(f"vision_feature_layer must be one layer for selection, got {layer}")
    prefix = 1 if strategy == "default" else 0  # tokens before the patches that the model itself cuts off: CLS

    # What is read off attention layers; without a CLS token nothing is attended to from it.
    wanted = frozenset(need for need in needs if _quantity(need) in HEARD)
    without_cls = sorted(need for need in wanted if _quantity(need) == "cls_attention")
    if without_cls and prefix == 0:
        raise ValueError(
            f"{', '.join(without_cls)}: this vision tower has no CLS token (vision_feature_select_strategy is 'full'); "
            "selectors that read attention take attention=received"
        )

    # The model's own encoding, with its own arguments; attention is overheard, not computed a second time.
    names = inspect.signature(base.get_image_features).parameters
    arguments = {name: inputs[name] for name in names if inputs.get(name) is not None}
    with _listening(base.vision_tower, layer, wanted) as heard:
        output = base.get_image_features(**arguments, return_dict=True)
    read = {need: _read(need, heard[need], prefix) for need in wanted}
    features = output.hidden_states[layer][:, prefix:]
    packed = list(output.pooler_output)

    # Where the tokens lie: tiles per image by the model's own rule, and the index map.
    tiles = [
        image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
        for size in inputs["image_sizes"]
    ]
    side = config.vision_config.image_size // config.vision_config.patch_size

    tokens = VisualTokens(
        features=features,
        grid=(side, side),
        image=torch.repeat_interleave(torch.tensor(tiles, device=features.device)),
        slots=_index_map(base, tiles, features, inputs["image_sizes"], strategy),
        layers={need: read.pop(need) for need in wanted - HEARD},
        **read,
    )

    # What is read off the tokens, once they are there.
    if "projected" in needs:
        tokens = _with_projected(tokens, packed)
    if "text" in needs and relevance is not None:
        tokens = replace(tokens, text=relevance(tokens, inputs))
    if "question" in needs:
        tokens = _with_question(tokens, model, inputs)

    return Encoded(tokens, packed, output, config.image_token_id)


def _check_needs(needs: frozenset[str], relevance: Relevance | None) -> None:
    """Refuses, by name, what this model cannot give."""
    unknown = {need for need in needs if need not in GIVES and _quantity(need) not in HEARD}
    if unknown:
        raise ValueError(
            f"a LLaVA-NeXT gives no {', '.join(sorted(unknown))} to a selector; it gives {sorted(GIVES)}, and of any "
            f"layer L of its vision tower NAME@L and joint_NAME@L for {sorted(HEARD)}"
        )

    if "text" in needs and relevance is None:
        raise ValueError(
            "text: a LLaVA-NeXT has the vision half of its CLIP only, no text tower to compare tokens with; pass "
            "relevance=, a function (tokens, inputs) -> [tiles, patches]"
        )


def _setting(inputs: Mapping[str, Any], config: Any, name: str) -> Any:
    """A setting of this call where the caller gives one, as the model itself reads it; else the checkpoint's."""
    return inputs[name] if inputs.get(name) is not None else getattr(config, name)


def _index_map(base: Any, tiles: list[int], features: Tensor, sizes: Tensor, strategy: str) -> Int[Tensor, "I L"]:
    """Where each token lands: float64 indices (exact) through the model's packing, -1 marking its newlines."""
    patches = features.shape[1]
    index = torch.arange(sum(tiles) * patches, dtype=torch.float64, device=features.device).view(-1, patches, 1)
    newline = torch.tensor([float(NEWLINE)], dtype=torch.float64, device=features.device)
    maps, _ = base.pack_image_features(list(index.split(tiles)), sizes, strategy, image_newline=newline)
    return torch.nn.utils.rnn.pad_sequence([m.flatten().long() for m in maps], batch_first=True, padding_value=PAD)


def _with_projected(tokens: VisualTokens, packed: list[Tensor]) -> VisualTokens:
    """Adds the projected tokens, read back from the packed ones (projecting twice would cost more)."""
    # The newlines' rows have no encoder token, and tokens that unpadding removed stay zero.
    shape = tokens.features.shape[:2]
    table = packed[0].new_zeros(shape[0] * shape[1], packed[0].shape[-1])
    for slots, feats in zip(tokens.slots, packed, strict=True):
        slots = slots[: len(feats)]
        table[slots[slots >= 0]] = feats[slots >= 0]
    return replace(tokens, projected=table.view(*shape, -1))


def _with_question(
    tokens: VisualTokens, model: Any, inputs: Mapping[str, Any], placeholder: int | None = None
) -> VisualTokens:
    """Adds the embedded text that follows each image in its row of the prompt, up to the end of the row."""
    ids = inputs.get("input_ids")
    if ids is None:
        raise ValueError("question: a selector that reads the question needs input_ids beside the images")

    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    visual = ids == (model.config.image_token_id if placeholder is None else placeholder)
    column = torch.arange(ids.shape[1], device=ids.device)

    # The placeholders of all images stand one behind the other, row by row; an image's text starts behind its last.
    row, position = visual.nonzero(as_tuple=True)
    last = tokens.lengths.to(ids.device).cumsum(0) - 1
    if len(position) != int(last[-1]) + 1:
        raise ValueError(
            f"input_ids hold {len(position)} image placeholders, the images give {int(last[-1]) + 1} tokens"
        )

    # Words behind the last placeholder of each image, in its row; other images' placeholders are no words.
    row, position = row[last], position[last]
    words = mask.bool() & ~visual
    if inputs.get("labels") is not None:  # what is to be predicted is no part of the question
        words = words & (inputs["labels"] == -100)
    text = words[row] & (column > position[:, None])

    # Each image's text moves to the left; the rest is padding.
    width = max(1, int(text.sum(1).max()))
    order = (~text).int().argsort(dim=1, stable=True)[:, :width]
    real = text.gather(1, order)
    with torch.no_grad():
        embedded = model.get_input_embeddings()(ids[row].gather(1, order))
    device = tokens.features.device
    return replace(tokens, question=embedded.masked_fill(~real[..., None], 0).to(device), question_mask=real.to(device))


def _quantity(need: str) -> str:
    """``"joint_keys@-1"`` is keys; a name without a layer is itself."""
    name, at, layer = need.partition("@")
    return name.removeprefix("joint_") if at and layer.removeprefix("-").isdecimal() else need


@contextmanager
def _listening(tower: Any, layer: int, wanted: frozenset[str]) -> Iterator[dict[str, dict[str, Any]]]:
    """For everything wanted, queries and keys ``[T, heads, S, C]`` of its attention layer, as they pass by.

    The hooks of these modules are gone when the block ends; the tower may use any attention implementation.
    """
    # Before the first hook: a layer that is not there is an error that leaves nothing behind.
    attentions = {name: _attention_of(tower, layer, name) for name in sorted(wanted)}
    heard: dict[str, dict[str, Any]] = {name: {"scale": attention.scale} for name, attention in attentions.items()}
    handles = []

    def listen(name: str, part: str, heads: int, out: Tensor) -> None:
        heard[name][part] = out.unflatten(-1, (heads, -1)).transpose(1, 2)

    for name, attention in attentions.items():
        for part in ("q_proj", "k_proj"):
            handles.append(
                getattr(attention, part).register_forward_hook(
                    lambda _, __, out, name=name, part=part, heads=attention.num_heads: listen(name, part, heads, out)
                )
            )

    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


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


def _read(need: str, heard: Mapping[str, Any], prefix: int) -> Tensor:
    """What a need asks of the queries and keys of its layer, for the patches behind `prefix` other tokens."""
    # Joint: all heads side by side as a single one, whose scale is by the common width.
    queries, keys, scale = heard["q_proj"], heard["k_proj"], heard["scale"]
    if need.startswith("joint_"):
        queries, keys = (part.transpose(1, 2).flatten(2)[:, None] for part in (queries, keys))
        scale = keys.shape[-1] ** -0.5

    quantity = _quantity(need)
    if quantity == "keys":
        return keys.mean(1)[:, prefix:]
    if quantity == "cls_attention":
        return _attention(queries[:, :, :1], keys, scale).mean((1, 2))[:, prefix:]

    # A tile at a time: all of them would be heads · S² numbers each.
    return torch.stack([_attention(q, k, scale).mean((0, 1))[prefix:] for q, k in zip(queries, keys, strict=True)])


def _attention(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Softmax over all keys, CLS's own included, in float32."""
    return (queries.float() @ keys.float().mT * scale).softmax(-1)


ADAPTER = Adapter(encode)
