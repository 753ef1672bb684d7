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

GIVES = frozenset({"features", "projected", "cls_attention", "keys", "text", "question"})


def encode(model: Any, inputs: Mapping[str, Any], needs: frozenset[str], relevance: Relevance | None = None) -> Encoded:
    """See `selector.models.encode`."""
    if needs - GIVES:
        raise ValueError(
            f"a LLaVA-NeXT gives no {', '.join(sorted(needs - GIVES))} to a selector; it gives {sorted(GIVES)}"
        )
    if "text" in needs and relevance is None:
        raise ValueError(
            "text: a LLaVA-NeXT has the vision half of its CLIP only, no text tower to compare tokens with; pass "
            "relevance=, a function (tokens, inputs) -> [tiles, patches]"
        )
    base, config = model.base_model, model.config
    layer = _setting(inputs, config, "vision_feature_layer")
    strategy = _setting(inputs, config, "vision_feature_select_strategy")
    if not isinstance(layer, int):
        raise ValueError(f"vision_feature_layer must be one layer for selection, got {layer}")
    names = inspect.signature(base.get_image_features).parameters
    arguments = {name: inputs[name] for name in names if inputs.get(name) is not None}
    prefix = 1 if strategy == "default" else 0
    wanted = needs & {"cls_attention", "keys"}
    if "cls_attention" in needs and prefix == 0:
        raise ValueError("cls_attention: this vision tower has no CLS token (vision_feature_select_strategy is 'full')")
    with _listening(base.vision_tower, layer, wanted) as heard:
        output = base.get_image_features(**arguments, return_dict=True)
    features = output.hidden_states[layer][:, prefix:]
    packed = list(output.pooler_output)
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
        cls_attention=_cls_attention(heard) if "cls_attention" in needs else None,
        keys=heard["k_proj"].mean(1)[:, prefix:] if "keys" in needs else None,
    )
    if "projected" in needs:
        tokens = _with_projected(tokens, packed)
    if "text" in needs and relevance is not None:
        tokens = replace(tokens, text=relevance(tokens, inputs))
    if "question" in needs:
        tokens = _with_question(tokens, model, inputs)
    return Encoded(tokens, packed, output, config.image_token_id)


def _setting(inputs: Mapping[str, Any], config: Any, name: str) -> Any:
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


@contextmanager
def _listening(tower: Any, layer: int, wanted: frozenset[str]) -> Iterator[dict[str, Any]]:
    """Queries and keys ``[T, heads, 1 + N, C]`` of the attention that produced the feature layer, as they pass by.

    The hooks of these two modules are gone when the block ends; the tower may use any attention implementation.
    """
    heard: dict[str, Any] = {}
    handles = []
    if wanted:
        name = " and ".join(sorted(wanted))
        if layer == 0:
            raise ValueError(f"{name}: vision_feature_layer 0 is the embedding, which no attention produced")
        attentions = [m for m in tower.modules() if hasattr(m, "q_proj") and hasattr(m, "k_proj")]
        if not attentions:
            raise ValueError(f"{name}: no attention with q_proj and k_proj in the vision tower {type(tower).__name__}")
        # hidden_states has one more entry than there are attentions: the embeddings come first.
        attention = attentions[layer if layer < 0 else layer - 1]
        heard["scale"] = attention.scale

        def listen(name: str, out: Tensor) -> None:
            heard[name] = out.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)

        for part in ("q_proj", "k_proj"):
            handles.append(
                getattr(attention, part).register_forward_hook(lambda _, __, out, part=part: listen(part, out))
            )
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _cls_attention(heard: Mapping[str, Any]) -> Tensor:
    """Attention from CLS to the patches, mean over heads: softmax over all keys, CLS's own included."""
    queries, keys = heard["q_proj"].float(), heard["k_proj"].float()
    scores = (queries[:, :, :1] @ keys.mT)[:, :, 0] * heard["scale"]
    return scores.softmax(-1)[..., 1:].mean(1)


ADAPTER = Adapter(encode)
