"""InternVL: square tiles, of which 2 x 2 patches each make one visual token; the thumbnail of an image is packed last.

`features` are the tower's hidden states of a token's patches side by side, as the projector reads them; attention is
their sum, keys are their mean. The model is not told which tiles belong to one image: in its prompts the placeholders
of an image stand together, and are counted here. Of several tiles the last is the thumbnail, the view of the whole
image that the processor adds (``use_thumbnail``). Frames of a video stand apart in the prompt: each is an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from selector.models import Adapter, Encoded, Relevance
from selector.models._attention import attention_of, overheard, with_fields
from selector.models._layout import Runs, Tiles, gathered
from selector.models._towers import check_needs, completed, encoder_output, feature_layer, prefix_of
from selector.tokens import VisualTokens


def encode(model: Any, inputs: Mapping[str, Any], needs: frozenset[str], relevance: Relevance | None = None) -> Encoded:
    """See `selector.models.encode`."""
    base, config = model.base_model, model.config
    layer, prefix = feature_layer(model, inputs), prefix_of(model, inputs)
    attention = attention_of(prefix)
    check_needs(model, needs, attention, "vision_feature_select_strategy is 'full'", relevance)
    with overheard(base.vision_tower, layer, prefix, needs) as fields:
        output = encoder_output(model, inputs)

    # As the model itself reads them: layer -1 means what the tower returns, not its last hidden state before that.
    hidden = (output.last_hidden_state if layer == -1 else output.hidden_states[layer])[:, prefix:]

    # [N, 4]: the patches of each visual token, by the model's own shuffle of their numbers.
    side = int(hidden.shape[1] ** 0.5)
    number = torch.arange(side**2, dtype=torch.float64, device=hidden.device).view(1, side, side, 1)
    patch = base.pixel_shuffle(number, scale_factor=config.downsample_ratio)[0].flatten(0, 1).long()

    # The thumbnail, which the encoder has last, moves to the front of each image.
    count = len(patch)
    tiles = Tiles.base_last(_tiles_of_images(inputs, config.image_token_id, len(hidden), count), count, hidden.device)
    grid = int(count**0.5)
    fields = {name: gathered(values, patch)[tiles.order] for name, values in fields.items()}
    features = hidden[:, patch].flatten(2)[tiles.order]
    tokens = with_fields(VisualTokens(features, (grid, grid), tiles.image, tiles.slots), fields)

    # Packed tokens stay in the encoder's order, as they stand in the prompt.
    packed = [own.flatten(0, 1) for own in output.pooler_output.split(torch.bincount(tiles.image).tolist())]
    tokens = completed(tokens, packed, model, inputs, needs, relevance)
    return Encoded(tokens, packed, output, config.image_token_id)


def _tiles_of_images(inputs: Mapping[str, Any], image_token_id: int, tiles: int, patches: int) -> list[int]:
    """Number of tiles of each image, by placeholders that stand together; without a prompt every tile is an image."""
    if inputs.get("input_ids") is None:
        return [1] * tiles

    length = Runs.of(inputs["input_ids"], image_token_id).length
    if bool((length % patches).any()) or int(length.sum()) != tiles * patches:
        raise ValueError(
            f"input_ids must hold {patches} image placeholders for each of {tiles} tiles, those of an image together; "
            f"got runs of {length.tolist()} placeholders"
        )
    return (length // patches).tolist()


ADAPTER = Adapter(encode)
