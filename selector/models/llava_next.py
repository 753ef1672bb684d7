"""LLaVA-NeXT: AnyRes tiles, unpadding and newline tokens.

The geometry is not re-implemented: an index map sent through the model's own ``pack_image_features`` tells which slot
of the packed sequence each encoder token lands in. Packed order of one image: the base view (h·w tokens, no newline),
then the tiles laid out as one grid, unpadded, row by row with a newline token at the end of each row; an image of one
tile gets a single newline at its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from selector.models import Adapter, Encoded, Relevance
from selector.models._attention import attention_of, overheard, with_fields
from selector.models._layout import padded
from selector.models._towers import check_needs, completed, encoder_output, feature_layer, prefix_of, setting
from selector.tokens import NEWLINE, VisualTokens


def encode(model: Any, inputs: Mapping[str, Any], needs: frozenset[str], relevance: Relevance | None = None) -> Encoded:
    """See `selector.models.encode`."""
    base, config = model.base_model, model.config
    layer, prefix = feature_layer(model, inputs), prefix_of(model, inputs)
    why = "vision_feature_select_strategy is 'full': its vision tower has no CLS token"
    check_needs(model, needs, attention_of(prefix), why, relevance)

    # The model's own encoding, with its own arguments; attention is overheard, not computed a second time.
    with overheard(base.vision_tower, layer, prefix, needs) as fields:
        output = encoder_output(model, inputs)
    features, packed = output.hidden_states[layer][:, prefix:], list(output.pooler_output)

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
        slots=_index_map(model, inputs, tiles, features),
    )
    tokens = completed(with_fields(tokens, fields), packed, model, inputs, needs, relevance)
    return Encoded(tokens, packed, output, config.image_token_id)


def _index_map(model: Any, inputs: Mapping[str, Any], tiles: list[int], features: Tensor) -> Int[Tensor, "I L"]:
    """Where each token lands: float64 indices (exact) through the model's packing, -1 marking its newlines."""
    patches = features.shape[1]
    index = torch.arange(sum(tiles) * patches, dtype=torch.float64, device=features.device).view(-1, patches, 1)
    newline = torch.tensor([float(NEWLINE)], dtype=torch.float64, device=features.device)

    strategy = setting(inputs, model.config, "vision_feature_select_strategy")
    maps, _ = model.base_model.pack_image_features(
        list(index.split(tiles)), inputs["image_sizes"], strategy, image_newline=newline
    )
    return padded([m.flatten().long() for m in maps])


ADAPTER = Adapter(encode)
