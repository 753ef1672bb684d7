"""LLaVA-NeXT: AnyRes tiles, unpadding and newline tokens.

The geometry is not re-implemented: an index map sent through the model's own ``pack_image_features`` tells which slot
of the packed sequence each encoder token lands in. Packed order of one image: the base view (h·w tokens, no newline),
then the tiles laid out as one grid, unpadded, row by row with a newline token at the end of each row; an image of one
tile gets a single newline at its end.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from selector.models import Encoded
from selector.tokens import NEWLINE, PAD, VisualTokens

GIVES = frozenset({"features", "projected", "cls_attention"})


def encode(model: Any, inputs: Mapping[str, Any], needs: frozenset[str]) -> Encoded:
    """See `selector.models.encode`."""
    if needs - GIVES:
        raise ValueError(
            f"a LLaVA-NeXT gives no {', '.join(sorted(needs - GIVES))} to a selector; it gives {sorted(GIVES)}"
        )
    base, config = model.base_model, model.config
    layer = _setting(inputs, config, "vision_feature_layer")
    strategy = _setting(inputs, config, "vision_feature_select_strategy")
    if not isinstance(layer, int):
        raise ValueError(f"vision_feature_layer must be one layer for selection, got {layer}")
    names = inspect.signature(base.get_image_features).parameters
    arguments = {name: inputs[name] for name in names if inputs.get(name) is not None}
    if "cls_attention" in needs:
        arguments["output_attentions"] = True
    output = base.get_image_features(**arguments, return_dict=True)
    prefix = 1 if strategy == "default" else 0
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
        cls_attention=_cls_attention(output, layer, prefix) if "cls_attention" in needs else None,
    )
    if "projected" in needs:
        tokens = _with_projected(tokens, packed)
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


def _cls_attention(output: Any, layer: int, prefix: int) -> Tensor:
    if prefix == 0:
        raise ValueError("cls_attention: this vision tower has no CLS token (vision_feature_select_strategy is 'full')")
    if layer == 0:
        raise ValueError("cls_attention: vision_feature_layer 0 is the embedding, which no attention produced")
    if not output.attentions:
        raise ValueError(
            "cls_attention: the vision tower returned no attentions; load the model with "
            'attn_implementation={"vision_config": "eager", "text_config": "sdpa"}'
        )
    # hidden_states has one more entry than attentions: the embeddings come first.
    attention = output.attentions[layer if layer < 0 else layer - 1]
    return attention[:, :, 0, 1:].mean(1)
