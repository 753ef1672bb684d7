"""LLaVA-OneVision: AnyRes tiles as in LLaVA-NeXT, shrunk where they are many; one tile each for several images.

A grid of more tiles than ``vision_aspect_ratio`` allows (``anyres_max_9``: nine) is shrunk bilinearly after the
projector. There `slots` is approximate: a packed token is then a mixture of up to four encoder tokens, and it is traced
to the nearest of them, whose features stand for it; `projected` is the mixture itself, as the language model sees it.
`Encoded.approximate` and `selector.pruning.Pruned.approximate` say when. Encoder tokens that are nearest to none count
as unpadded away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.models.llava_onevision.modeling_llava_onevision import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
)

from selector.models import Adapter, Encoded, Relevance
from selector.models._attention import attention_of, overheard, with_fields
from selector.models._layout import padded
from selector.models._towers import check_needs, completed, encoder_output, feature_layer, prefix_of, setting
from selector.tokens import NEWLINE, VisualTokens


def encode(model: Any, inputs: Mapping[str, Any], needs: frozenset[str], relevance: Relevance | None = None) -> Encoded:
    """See `selector.models.encode`."""
    layer, prefix = feature_layer(model, inputs), prefix_of(model, inputs)
    attention = attention_of(prefix)
    why = "vision_feature_select_strategy is 'full': its vision tower has no CLS token"
    check_needs(model, needs, attention, why, relevance)

    with overheard(model.base_model.vision_tower, layer, prefix, needs) as fields:
        output = encoder_output(model, inputs)
    features, packed = output.hidden_states[layer][:, prefix:], list(output.pooler_output)

    # Slots of each image by itself, then counted through the batch.
    tiles = _tiles(model, inputs)
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    maps, exact, first = [], True, 0
    for size, count in zip(inputs["image_sizes"], tiles, strict=True):
        slots, same = _slots(model, inputs, size, count, side, features.device)
        maps.append(torch.where(slots >= 0, slots + first * side**2, slots))
        exact, first = exact and same, first + count

    image = torch.repeat_interleave(torch.tensor(tiles, device=features.device))
    tokens = with_fields(VisualTokens(features, (side, side), image, padded(maps)), fields)
    tokens = completed(tokens, packed, model, inputs, needs, relevance)
    return Encoded(tokens, packed, output, model.config.image_token_id, approximate=not exact)


def _tiles(model: Any, inputs: Mapping[str, Any]) -> list[int]:
    """Number of tiles of each image, the base view included: one where a prompt has several images."""
    counts = inputs.get("batch_num_images")
    alone = [True] * len(inputs["image_sizes"]) if counts is None else [n == 1 for n in counts for _ in range(int(n))]
    config = model.config
    return [
        image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size) if single else 1
        for size, single in zip(inputs["image_sizes"], alone, strict=True)
    ]


def _slots(
    model: Any, inputs: Mapping[str, Any], size: Tensor, tiles: int, side: int, device: torch.device
) -> tuple[Int[Tensor, "L"], bool]:
    """Where each packed token of an image comes from: coordinates sent through the model's own packing and shrinking.

    Args:
        size: height and width of the image in pixels.
        tiles: tiles of the image, the base view included.
        side: patches per row of a tile.

    Returns:
        ``[L]`` ``tile * side² + patch`` of the nearest encoder token, or `NEWLINE`; and whether that is exactly it.
    """
    # [tiles, side², 2] row and column of every patch, in place of its features. Bilinear shrinking averages them as it
    # does features, so that what comes out is the point that a packed token shows.
    line = torch.arange(side, dtype=torch.float64, device=device)
    within = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).flatten(0, 1)
    places, width = within.repeat(tiles, 1, 1), 1
    if tiles > 1:  # rows and columns of the tiles laid out as one grid
        _, width = _grid(model, size)
        tile = torch.arange(tiles - 1, device=device)
        places[1:] += side * torch.stack([tile // width, tile % width], -1)[:, None]

    newline = torch.full((2,), float(NEWLINE), dtype=torch.float64, device=device)
    limit = setting(inputs, model.config, "vision_aspect_ratio")
    (points,), _ = model.base_model.pack_image_features(
        [places], [size], image_newline=newline, vision_aspect_ratio=limit
    )

    # From the nearest point back to a tile and a patch in it.
    y, x = points.round().long().unbind(-1)
    tile = 1 + y.div(side, rounding_mode="floor") * width + x.div(side, rounding_mode="floor")
    tile[: side**2] = 0  # the base view, or the only one
    patch = y.remainder(side) * side + x.remainder(side)
    slots = (tile * side**2 + patch).masked_fill(points[:, 0] < 0, NEWLINE)
    return slots, bool((points == points.round()).all())


def _grid(model: Any, size: Tensor) -> Sequence[int]:
    """Rows and columns in which the tiles of an image of that size are laid out."""
    config = model.config
    return get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)


ADAPTER = Adapter(encode)
