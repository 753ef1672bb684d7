"""Mistral 3: images of any size from a Pixtral tower, 2 x 2 patches merged to a visual token.

Each image lies in the upper left corner of a grid that fits them all; its ``[IMG_BREAK]`` tokens are text of the
prompt, which stays. `features` are the tower's hidden states of a token's patches side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from selector.models import Adapter, Encoded, Relevance
from selector.models._layout import Canvas
from selector.models._towers import check_needs, completed, encoder_output, feature_layer
from selector.tokens import VisualTokens


def encode(model: Any, inputs: Mapping[str, Any], needs: frozenset[str], relevance: Relevance | None = None) -> Encoded:
    """See `selector.models.encode`."""
    config, layer = model.config, feature_layer(model, inputs)
    why = "its vision tower reads all images as one sequence, without a CLS token"
    check_needs(model, needs, frozenset(), why, relevance)
    output = encoder_output(model, inputs)
    packed = list(output.pooler_output)

    side, merge = config.vision_config.patch_size, config.spatial_merge_size

    # The tower's one row of all images' patches, cut up by their sizes; unfold puts each 2 x 2 block side by side.
    sizes = [(int(h) // side, int(w) // side) for h, w in inputs["image_sizes"]]
    rows = output.hidden_states[layer][0].split([h * w for h, w in sizes])
    blocks = [
        torch.nn.functional.unfold(own.mT.view(1, -1, h, w), merge, stride=merge)[0].mT
        for own, (h, w) in zip(rows, sizes, strict=True)
    ]

    canvas = Canvas.of([(h // merge, w // merge) for h, w in sizes], blocks[0].device)
    tokens = VisualTokens(canvas.spread(blocks), canvas.grid, canvas.image, canvas.slots)
    tokens = completed(tokens, packed, model, inputs, needs, relevance)
    return Encoded(tokens, packed, output, config.image_token_id)


ADAPTER = Adapter(encode, whole=True)
