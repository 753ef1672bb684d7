"""Idefics3: square tiles, of which blocks of patches make one visual token; the view of the whole image is packed last.

`features` are the tower's hidden states of a token's patches side by side, as the connector reads them; attention is
their sum, keys are their mean. The model is not told which tiles belong to one image. In its prompts every tile stands
alone behind a token that names it, ``<row_1_col_2>`` or ``<global-img>``, and the whole image ends its tiles: the token
before the last tile of a row of the batch is ``<global-img>``, and every tile behind such a token ends an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from selector.models import Adapter, Encoded, Relevance
from selector.models._attention import attention_of, overheard, with_fields
from selector.models._layout import Runs, Tiles, gathered
from selector.models._towers import check_needs, completed, encoder_output
from selector.tokens import VisualTokens


def encode(model: Any, inputs: Mapping[str, Any], needs: frozenset[str], relevance: Relevance | None = None) -> Encoded:
    """See `selector.models.encode`."""
    base, config = model.base_model, model.config
    check_needs(model, needs, attention_of(0), "its vision tower has no CLS token", relevance)

    # The tower masks hidden patches as keys alone.
    mask = inputs.get("pixel_attention_mask")
    if any("received_attention" in need for need in needs) and mask is not None and not bool(mask.all()):
        raise ValueError("received_attention: the patches that pixel_attention_mask hides would be queries too")

    with overheard(base.vision_model, -1, 0, needs) as fields:
        output = encoder_output(model, inputs)
    hidden = output.last_hidden_state

    # [N, blocks]: the patches of each visual token, by the model's own shuffle of their numbers.
    number = torch.arange(hidden.shape[1], dtype=torch.float64, device=hidden.device).view(1, -1, 1)
    patch = base.connector.pixel_shuffle(number, config.scale_factor)[0].long()

    # The base view, which the encoder has last, moves to the front of each image.
    count = len(patch)
    tiles = Tiles.base_last(_tiles_of_images(inputs, config.image_token_id, len(hidden), count), count, hidden.device)
    grid = int(count**0.5)
    fields = {name: gathered(values, patch)[tiles.order] for name, values in fields.items()}
    features = hidden[:, patch].flatten(2)[tiles.order]
    tokens = with_fields(VisualTokens(features, (grid, grid), tiles.image, tiles.slots), fields)

    # The model's own list has an entry per row of the batch, with all its images.
    counts = (torch.bincount(tiles.image) * count).tolist()
    packed = list(torch.cat(list(output.pooler_output)).split(counts))
    tokens = completed(tokens, packed, model, inputs, needs, relevance)
    return Encoded(tokens, packed, output, config.image_token_id)


def _tiles_of_images(inputs: Mapping[str, Any], image_token_id: int, tiles: int, patches: int) -> list[int]:
    """Number of tiles of each image, read off the prompt as above; without a prompt every tile is an image."""
    if inputs.get("input_ids") is None:
        return [1] * tiles
    runs = Runs.of(inputs["input_ids"], image_token_id)
    if runs.length.tolist() != [patches] * tiles:
        raise ValueError(
            f"input_ids must hold {patches} image placeholders together for each of {tiles} tiles; "
            f"got runs of {runs.length.tolist()} placeholders"
        )

    # What stands before the last tile of a row is <global-img>, whichever id it has: the config does not name it.
    last = torch.ones_like(runs.row, dtype=torch.bool)
    last[:-1] = runs.row[1:] != runs.row[:-1]
    ends = torch.isin(runs.before, runs.before[last]).nonzero().flatten()
    return torch.diff(ends, prepend=ends.new_tensor([-1])).tolist()


ADAPTER = Adapter(encode)
